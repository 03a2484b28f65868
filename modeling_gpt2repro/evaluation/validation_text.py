"""What a validation loss is measured on: the first tokens of a split, and the same text in any model's own tokens.

The scored tokens are the N = R * T behind the first one of the split, in R rows of T, each predicted from those before
it in its row: with the tokenizer of the shards these are the rows of the training loop. Documents stand one behind the
other, an end-of-text before each.

A model with another tokenizer is scored on the same text: the first N + 1 tokens are decoded, document by document, and
encoded again, its own end-of-text before each document; the first one is only read, all others are scored, in rows of
T of its own tokens, the last one maybe shorter. Its tokens are of another length, so nats per token do not compare, but
bits per byte do: both sums are over the same text, and both are divided by its bytes in UTF-8. The end-of-text tokens
are scored on both sides, as in training, and have no bytes. The last document is cut in most cases; a character that
the cut has halved is left out. Where a split is smaller than what was asked for, N depends on T: give all models the
same `--block_size`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

DOCUMENTS_AT_ONCE = 1_000  # bounds the lists of Python numbers that tokenizers take and give


@dataclass(frozen=True)
class ValidationText:
    """Text to score, as ids of the model's tokenizer.

    Args:
        ids: (N + 1,) int64; each but the first is scored once.
        block_size: T, tokens a row.
        text_bytes: What the text takes in UTF-8.
        split_tokens: How many tokens of the split it is.
        encoded_again: Whether the ids are of another tokenizer than the shards'.
    """

    ids: np.ndarray
    block_size: int
    text_bytes: int
    split_tokens: int
    encoded_again: bool

    @property
    def tokens(self) -> int:
        """N, the scored ones."""
        return len(self.ids) - 1


def open_validation_text(
    shards: Sequence[np.ndarray],
    shards_tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    block_size: int,
    other_tokenizer: PreTrainedTokenizerBase | None = None,
) -> ValidationText:
    """The first `tokens` tokens of a split.

    Args:
        other_tokenizer: The model's, where it is not the shards'; None for the ids as they are.

    Raises:
        ValueError: If the split holds less than one row, or the other tokenizer cannot say the text.
    """
    ids = first_rows(shards, tokens, block_size)
    split_tokens, text_bytes, parts = len(ids) - 1, 0, []
    for texts in texts_of(ids, shards_tokenizer):
        text_bytes += sum(len(text.encode()) for text in texts)
        if other_tokenizer is not None:
            parts.append(encode_again(texts, other_tokenizer))
    ids = np.concatenate(parts) if parts else ids
    return ValidationText(ids, block_size, text_bytes, split_tokens, bool(parts))


def bytes_per_token(
    shards: Sequence[np.ndarray], shards_tokenizer: PreTrainedTokenizerBase, tokens: int, block_size: int
) -> float:
    """Bytes of text that a scored one of the first `tokens` tokens of a split stands for, as the command counts them.

    Raises:
        ValueError: If the split holds less than one row.
    """
    text = open_validation_text(shards, shards_tokenizer, tokens, block_size)
    return text.text_bytes / text.tokens


def first_rows(shards: Sequence[np.ndarray], tokens: int, block_size: int) -> np.ndarray:
    """The first ids of a split, (R * T + 1,) int64, for the R = `tokens` // T rows there, at least 1 and at most all.

    Raises:
        ValueError: If the split holds less than one row.
    """
    total = sum(len(shard) for shard in shards)
    if total < block_size + 1:
        raise ValueError(
            f"the validation split holds {total} tokens, but one row takes {block_size + 1}: give a smaller "
            "--block_size, or prepare more text."
        )
    rows = min((total - 1) // block_size, max(1, tokens // block_size))
    parts, missing = [], rows * block_size + 1
    for shard in shards:
        parts.append(np.asarray(shard[:missing], dtype=np.int64))
        missing -= len(parts[-1])
    return np.concatenate(parts)


def texts_of(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[str]]:
    """The documents among ids (N,) as text, a thousand at a time; of the last one as much as whole characters."""
    cuts = np.flatnonzero(ids == tokenizer.eos_token_id)
    documents = [part[1:] for part in np.split(ids, cuts)[1:]]
    if not len(cuts) or cuts[0] > 0:  # what stands before the first end-of-text
        documents.insert(0, ids[: cuts[0] if len(cuts) else None])
    for first in range(0, len(documents), DOCUMENTS_AT_ONCE):
        some = [document.tolist() for document in documents[first : first + DOCUMENTS_AT_ONCE]]
        texts = tokenizer.batch_decode(some, clean_up_tokenization_spaces=False)
        if first + len(some) == len(documents):
            texts[-1] = texts[-1].rstrip("\ufffd")  # what halves of characters are decoded to
        yield texts


def encode_again(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The documents in this tokenizer's ids, an end-of-text before each: (M,) int64.

    Raises:
        ValueError: If it has no end-of-text, or no tokens for part of the text.
    """
    end_of_text = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.bos_token_id
    if end_of_text is None:
        raise ValueError(
            "the model's tokenizer has no end-of-text token to put between documents: give it an eos_token."
        )
    # A literal <|endoftext|> is text here, not the token.
    encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    ids = np.concatenate([np.array([end_of_text, *document], dtype=np.int64) for document in encoded])
    unknown = tokenizer.unk_token_id
    if unknown is not None and unknown != end_of_text and (ids == unknown).any():
        raise ValueError(
            "the model's tokenizer has no tokens for part of the text and would leave it out: bits per byte do not "
            "compare."
        )
    return ids


def row_batches(
    text: ValidationText, batch_rows: int, process_index: int = 0, num_processes: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's rows, every `num_processes`-th: `input_ids` and the tokens behind them, `shift_labels`.

    Batches are (B, T) with B = `batch_rows`, fewer in the last one; a row of less than T comes alone behind them.
    """
    ids, block_size, tokens = text.ids, text.block_size, text.tokens
    starts = np.arange(process_index * block_size, tokens, num_processes * block_size)
    whole = starts[starts + block_size <= tokens]
    for first in range(0, len(whole), batch_rows):
        places = whole[first : first + batch_rows, None] + np.arange(block_size + 1)
        yield as_batch(ids[places])
    for start in starts[len(whole) :]:
        yield as_batch(ids[None, start:])


def as_batch(rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Rows (B, T + 1) -> inputs and labels (B, T)."""
    rows = torch.from_numpy(rows)
    return {"input_ids": rows[:, :-1].contiguous(), "shift_labels": rows[:, 1:].contiguous()}
