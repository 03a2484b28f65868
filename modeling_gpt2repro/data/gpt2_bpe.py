"""GPT-2's vocabulary, converted between tiktoken, which is fast, and `tokenizers`, which transformers reads.

tiktoken stores a token as its bytes and a rank: the lower, the earlier it is merged; the rank is also the id.
`tokenizers` stores it as a string that spells each byte as a printable character, a space as "Ġ", and it needs the
merges as pairs, in order. Both follow from OpenAI's file of merges, which tiktoken downloads and keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import tiktoken
from tiktoken.load import read_file_cached
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import ByteLevel as ByteLevelProcessor

if TYPE_CHECKING:  # importing transformers takes a second, and --help does without
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts text into words before merging (Radford et al. 2019, section 2.2; encoder.py of their release).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


# One of the two files that `tiktoken.get_encoding("gpt2")` reads, kept under the same name; and its SHA-256.
GPT2_MERGES = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer, built from the merges that tiktoken has or downloads.

    Raises:
        ValueError: If it cannot download them.
    """
    try:
        lines = read_file_cached(GPT2_MERGES, GPT2_MERGES_SHA256).decode("utf-8").splitlines()
    except OSError as error:
        raise ValueError(
            f"tiktoken could not download GPT-2's vocabulary ({type(error).__name__}; is there a network?): give "
            "--tokenizer a folder that holds it, or put tiktoken's files in TIKTOKEN_CACHE_DIR."
        ) from error
    merges = [tuple(line.split()) for line in lines[1:]]  # the first line is a version
    # Ids count the 256 bytes, then a token for each merge, then end-of-text: 50,257.
    tokens = [*_byte_of_character(), *map("".join, merges), END_OF_TEXT]
    bpe = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    bpe.add_special_tokens([END_OF_TEXT])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return as_gpt2_tokenizer(bpe, max_length=1024)


def as_gpt2_tokenizer(bpe: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with what GPT-2's tokenizer has besides its vocabulary: decoder, special tokens, length."""
    from transformers import PreTrainedTokenizerFast

    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = ByteLevelProcessor(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def tiktoken_encoding(tokenizer: PreTrainedTokenizerFast) -> tiktoken.Encoding:
    """A tiktoken encoding that gives the same ids; for tokenizers with GPT-2's vocabulary and merges only."""
    byte_of = str.maketrans(_byte_of_character())
    ranks = {
        token.translate(byte_of).encode("latin-1"): rank  # the bytes of the characters U+0000 to U+00FF
        for token, rank in tokenizer.get_vocab().items()
        if rank != tokenizer.eos_token_id
    }
    special = {END_OF_TEXT: tokenizer.eos_token_id}  # without a special token, tiktoken takes twice as long
    return tiktoken.Encoding("gpt2repro", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _byte_of_character() -> dict[str, int]:
    """How GPT-2's files spell bytes: printable ones as themselves, the others as the characters from U+0100 on.

    It is `bytes_to_unicode` of encoder.py in OpenAI's release, inverted; space is the 33rd of the others, "Ġ" (U+0120).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
