"""Documents to token ids: an end-of-text token before each document, and a validation split by hash of its id.

In GPT-2's ids, two documents "Hi" and "Yo", both for training, become train [50256, 17250, 50256, 38101] and
validation [].
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from modeling_gpt2repro.data.contamination import NgramIndex
from modeling_gpt2repro.data.sources.documents import Document


@dataclass
class TokenizedPartition:
    """The token ids of one partition of a source."""

    # Per split, (n,) uint16: GPT-2's 50,257 ids fit in 16 bits, and int32 would double the disk space.
    ids: dict[str, np.ndarray]
    text_bytes: dict[str, int]  # per split, UTF-8 bytes of text
    skipped: dict[str, int] = field(default_factory=dict)  # how many documents were left out, by reason
    bad_lines: dict[str, int] = field(default_factory=dict)  # how many bad lines were skipped, by reason
    first_bad_line: list | None = None  # position and problem of the first of them, see `BadLine`
    source_sha256: str = ""  # of all that was read for it; empty in files of the first releases
    # Of each document that was compared with a benchmark, the training tokens before it, so that max_tokens cuts the
    # counts, too; and of those that share words with its items [tokens before, item, item, ...].
    compared: list[int] = field(default_factory=list)
    contaminated: list[list] = field(default_factory=list)


def is_validation(document_id: str, share: float) -> bool:
    """Whether a document is held out for validation.

    The hash of its id decides, not its position or a random draw: the same documents are held out on any machine, by
    any number of workers, and after more text was added to the source. A larger share holds the smaller one.
    """
    digest = hashlib.sha256(document_id.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class HoldOutCheck:
    """Detects early that ids cannot decide what is held out, such as those of a column with a single value.

    It raises if all documents so far fall to the same split, and there are DOCUMENTS_PER_ID times as many of them as of
    their ids. The pieces of a whole file are one document.

    Args:
        share: Fraction held out for validation; nothing is checked if it is 0 or 1.
    """

    DOCUMENTS_PER_ID = 1_000
    MAX_IDS = 10_000  # kept: so many different ids are not those of a column with few values

    def __init__(self, share: float):
        self.share = share
        self.is_passed = not 0 < share < 1
        self._ids = set()
        self._splits = set()
        self._documents = 0

    def watch(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents, and count those of earlier calls as well.

        Raises:
            ValueError: If their ids put all of them in the same split.
        """
        for document in documents:
            if not (self.is_passed or document.continues):
                self._check(document.id)
            yield document

    def _check(self, document_id: str):
        self._documents += 1
        self._ids.add(document_id)
        self._splits.add(is_validation(document_id, self.share))
        self.is_passed = len(self._splits) > 1 or len(self._ids) >= self.MAX_IDS
        if not self.is_passed and self._documents >= self.DOCUMENTS_PER_ID * len(self._ids):
            ids = ", ".join(sorted(self._ids)[:3])
            counted = "one id" if len(self._ids) == 1 else f"only {len(self._ids)} different ids"
            split = "validation" if self._splits == {True} else "training"
            raise ValueError(
                f"{self._documents:,} documents have {counted} ({ids}), by which all of them fell to {split}: rename "
                "or remove 'id', and each document gets an id from its position instead."
            )


def tokenize_documents(
    documents: Iterable[Document],
    encode: Callable[[str], np.ndarray],
    end_of_text_id: int,
    validation_share: float,
    document_length: int | None = None,
    benchmark: NgramIndex | None = None,
    drop_contaminated: bool = False,
) -> TokenizedPartition:
    """Encode documents, each after an end-of-text token; a piece that continues the one before has none.

    Args:
        document_length: Make every document as long, see `pad_document`.
        benchmark: Compare training documents with its items; a piece of one is compared, and left out, by itself.
        drop_contaminated: Leave out those that share words with them.

    Raises:
        ValueError: If a document is longer than that; the message names the length that the longest one needs.
    """
    # Bytes that grow in place: a compressed file is one partition, and joining a list of arrays would hold it twice.
    ids = {"train": bytearray(), "validation": bytearray()}
    text_bytes = {"train": 0, "validation": 0}
    # Before each document, not after it: the first token of a text is then predicted from end-of-text, which is also
    # the prompt of an unconditional sample. (The lecture's fineweb.py does the same.)
    end_of_text = np.array([end_of_text_id], dtype=np.uint16).tobytes()
    previous_split = None
    padding = encode("\n")
    longest = 0
    compared, contaminated = [], []
    for document in documents:
        split = "validation" if is_validation(document.id, validation_share) else "train"
        if benchmark is not None and split == "train":
            compared.append(len(ids["train"]) // 2)
            if items := benchmark.find(document.text):
                contaminated.append([compared[-1], *sorted(items)])
                if drop_contaminated:
                    previous_split = None  # what follows continues nothing
                    continue
        text_bytes[split] += len(document.text.encode())
        if document_length is not None:
            document_ids = encode(document.text)
            longest = max(longest, len(document_ids) + 1)
            if longest <= document_length:
                ids[split] += pad_document(document_ids, end_of_text_id, padding, document_length).tobytes()
            continue
        # Pieces of one text may fall to different splits; then it is no continuation of what this split holds.
        if not (document.continues and split == previous_split):
            ids[split] += end_of_text
        ids[split] += encode(document.text).tobytes()
        previous_split = split
    if document_length is not None and longest > document_length:
        raise ValueError(
            f"the longest document and its end-of-text are {longest} tokens, which do not fit into sequences of "
            f"{document_length}: give --block_size {longest} or more."
        )
    arrays = {split: np.frombuffer(data, np.uint16) for split, data in ids.items()}
    return TokenizedPartition(arrays, text_bytes, compared=compared, contaminated=contaminated)


def pad_document(ids: np.ndarray, end_of_text_id: int, padding: np.ndarray, length: int) -> np.ndarray:
    """A document (n,), its end-of-text, and line breaks up to `length`: (length,) uint16.

    With the block size as length, every training sequence is one whole document, which begins at position 0, as a
    prompt does.
    """
    return np.concatenate([ids, [end_of_text_id], np.resize(padding, length - len(ids) - 1)]).astype(np.uint16)
