"""Benchmark items in training text: documents that share 13 words in a row with an item, as GPT-3's authors counted.

"We define a gram as a lowercase, whitespace delimited word with no punctuation" (GPT-3, appendix C, arXiv:2005.14165).
Accents and whatever else is not ASCII are dropped, too: "Don't, café—bar" has the words "dont" and "cafebar".
"""

import string
import unicodedata
from collections import defaultdict

from modeling_gpt2repro.storage.json_files import is_count, require, shown

BENCHMARKS = {"hellaswag": "HellaSwag"}
NGRAM_WORDS = 13  # GPT-3, appendix C; an item of fewer words is never found
# Looked up are only the 5 words that begin at positions 0, 9, 18, ... of a text: any 13 in a row hold such 5.
KEY_WORDS = 5
STRIDE = NGRAM_WORDS - KEY_WORDS + 1
BLOCK_WORDS = 2**20  # of a long document, held as a list at a time: some 60 MB
PUNCTUATION = string.punctuation.encode()
TO_LOWER = bytes(ord(chr(byte).lower()) if 32 < byte < 127 else ord(" ") for byte in range(256))
COUNTS = ("ngram_words", "items", "short_items", "documents", "contaminated_documents", "contaminated_items")


def normalize(text: str) -> bytes:
    """The text's words, in lower case and without punctuation, with whitespace in between."""
    if not text.isascii():
        text = " ".join(unicodedata.normalize("NFKD", text).splitlines())
    return text.encode("ascii", "ignore").translate(TO_LOWER, PUNCTUATION)


class NgramIndex:
    """Finds the items that share NGRAM_WORDS words in a row with a text.

    Hashes of 5 words find candidates, and all 13 are then compared, so what is found does not depend on a hash.
    """

    def __init__(self, items: list[str]):
        self.items = [b" %b " % b" ".join(normalize(item).split()) for item in items]
        self.first = {}  # hash of KEY_WORDS words -> position of the first item that holds them
        self.others = defaultdict(list)  # and of the other ones; most have none, and a list each would take 50 MB
        for number, item in enumerate(self.items):
            words = item.split()
            for begin in range(len(words) - KEY_WORDS + 1):
                key = hash_words(words, begin)
                if self.first.setdefault(key, number) != number:
                    self.others[key].append(number)

    def find(self, text: str) -> set[int]:
        """The positions of the items that share words with a text."""
        found, compared, words, rest = set(), set(), [], normalize(text)
        while rest:
            block = rest.split(maxsplit=BLOCK_WORDS)
            rest = block.pop() if len(block) > BLOCK_WORDS else b""
            words = words[1 - NGRAM_WORDS :] + block
            keys = zip(*(words[offset::STRIDE] for offset in range(KEY_WORDS)), strict=False)
            for number, key in enumerate(map(hash, map(b" ".join, keys))):
                if key in self.first:
                    found |= self._find_around(words, STRIDE * number, compared)
        return found

    def _find_around(self, words: list[bytes], key_begin: int, compared: set[bytes]) -> set[int]:
        """Search the NGRAM_WORDS words around a key, unless they are among those `compared` before, for this text."""
        found = set()
        key = hash_words(words, key_begin)
        candidates = [self.first[key], *self.others.get(key, [])]
        for begin in range(max(0, key_begin - STRIDE + 1), min(key_begin, len(words) - NGRAM_WORDS) + 1):
            # Both ends first, because "at the end of the" is in hundreds of items.
            if all(hash_words(words, begin + offset) in self.first for offset in (0, STRIDE - 1)):
                ngram = b" %b " % b" ".join(words[begin : begin + NGRAM_WORDS])
                if ngram not in compared:
                    compared.add(ngram)
                    found.update(number for number in candidates if ngram in self.items[number])
        return found


def hash_words(words: list[bytes], begin: int) -> int:
    """Hash of the KEY_WORDS words from `begin` on; another one in each process."""
    return hash(b" ".join(words[begin : begin + KEY_WORDS]))


def contamination_counts(decontamination: dict, items: list[str], compared: int, contaminated: list[list]) -> dict:
    """The part of the manifest on a benchmark: `PrepareSpec.decontamination`, and what was found.

    Args:
        contaminated: See `TokenizedPartition`.
    """
    return {
        **decontamination,
        "ngram_words": NGRAM_WORDS,
        "items": len(items),
        "short_items": sum(len(normalize(item).split()) < NGRAM_WORDS for item in items),
        "documents": compared,
        "contaminated_documents": len(contaminated),
        "contaminated_items": len({item for _, *found in contaminated for item in found}),
    }


def check_contamination(counts: object):
    """Raise ValueError unless it is what `contamination_counts` returns."""
    is_right = type(counts) is dict and counts.get("benchmark") in list(BENCHMARKS) and type(counts.get("drop")) is bool
    require(is_right and all(is_count(counts.get(name)) for name in COUNTS), f"contamination is {shown(counts)}")


def describe_contamination(manifest: dict) -> str | None:
    """What was found, a sentence without its full stop; None if these shards were not compared with a benchmark."""
    if (counts := manifest.get("contamination")) is None:
        return None
    items = f"{counts['items']:,} validation items of {BENCHMARKS[counts['benchmark']]}"
    if short := counts["short_items"]:
        items += f" ({short:,} too short to be found)"
    words = f"{counts['ngram_words']} words in a row with {counts['contaminated_items']:,} of the {items}"
    found = counts["contaminated_documents"]
    fate = f" ({'left out' if counts['drop'] else 'kept'})" if found else ""
    return f"{found:,} of {counts['documents']:,} training documents{fate} share {words}"
