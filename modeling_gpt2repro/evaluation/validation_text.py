"""The text on which a validation loss is measured, in the tokens of any model.

It is the first N + 1 tokens of a split, documents one behind the other with an end-of-text before each. The first token
is only read; the other N = R * T are scored, in R sequences of T, each token predicted from those before it in its
sequence. With the tokenizer of the shards these are the sequences of the training loop.

A model with another tokenizer is scored on the same text: the N + 1 tokens are decoded, document by document, and
encoded again, with its own end-of-text before each document. The sequences are then T of its own tokens long, the last
one maybe shorter. Its tokens cover more or less text, so nats per token do not compare, but bits per byte do: both
losses are sums over the same text, divided by its bytes in UTF-8. End-of-text tokens are scored, as in training, and
count as no bytes. The last document is usually cut; a character that the cut has halved is left out. In a split that
has fewer tokens than were asked for, N depends on T: give all models the same `--block_size`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from modeling_gpt2repro.data.batches.sequences import TokenSequences, as_batch, validation_batches

DOCUMENTS_PER_CALL = 1_000  # limits the memory of the Python lists that tokenizers take and return


@dataclass(frozen=True)
class ValidationText:
    """Text to score, as ids of the model's tokenizer."""

    ids: np.ndarray  # (N + 1,) int64; each but the first is scored once
    block_size: int  # T, tokens of a sequence
    text_bytes: int  # bytes of the text in UTF-8
    split_tokens: int  # tokens of the text in the split, by the shards' tokenizer
    encoded_again: bool  # whether the ids are of another tokenizer than the shards'

    @property
    def tokens(self) -> int:
        """N, the scored ones."""
        return len(self.ids) - 1


def load_validation_text(
    shards: Sequence[np.ndarray],
    shards_tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    block_size: int,
    other_tokenizer: PreTrainedTokenizerBase | None = None,
) -> ValidationText:
    """The first `tokens` tokens of a split.

    Args:
        other_tokenizer: The model's, if it is not the shards'; None keeps the ids as they are.

    Raises:
        ValueError: If the split holds less than one sequence, or the other tokenizer cannot encode the text.
    """
    ids = TokenSequences(list(shards), block_size, "validation").first_ids(tokens)
    split_tokens = len(ids) - 1
    text_bytes = 0
    encoded = []
    for texts in decode_documents(ids, shards_tokenizer):
        text_bytes += sum(len(text.encode()) for text in texts)
        if other_tokenizer is not None:
            encoded.append(encode_documents(texts, other_tokenizer))
    ids = np.concatenate(encoded) if encoded else ids
    return ValidationText(ids, block_size, text_bytes, split_tokens, encoded_again=bool(encoded))


def bytes_per_token(
    shards: Sequence[np.ndarray], shards_tokenizer: PreTrainedTokenizerBase, tokens: int, block_size: int
) -> float:
    """Mean bytes of text of a scored token, by which nats per token become bits per byte.

    Raises:
        ValueError: If the split holds less than one sequence.
    """
    text = load_validation_text(shards, shards_tokenizer, tokens, block_size)
    return text.text_bytes / text.tokens


def decode_documents(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[str]]:
    """The documents among ids (N,) as text, a thousand at a time; the last one without a halved character."""
    starts = np.flatnonzero(ids == tokenizer.eos_token_id)
    before, *documents = np.split(ids, starts)
    documents = [document[1:] for document in documents]  # without the end-of-text
    if len(before) or not documents:  # the split begins inside of a document
        documents.insert(0, before)
    for first in range(0, len(documents), DOCUMENTS_PER_CALL):
        some = [document.tolist() for document in documents[first : first + DOCUMENTS_PER_CALL]]
        texts = tokenizer.batch_decode(some, clean_up_tokenization_spaces=False)
        if first + len(some) == len(documents):
            texts[-1] = texts[-1].rstrip("\ufffd")  # part of a character is decoded to this
        yield texts


def encode_documents(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The documents in the tokenizer's ids, an end-of-text before each: (M,) int64.

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
            "the model's tokenizer has no tokens for part of the text and would leave it out, so bits per byte would "
            "not compare: give a model whose tokenizer encodes any text."
        )
    return ids


def text_batches(
    text: ValidationText, batch_size: int, process_index: int = 0, num_processes: int = 1
) -> Iterator[dict[str, torch.Tensor]]:
    """This process's sequences, every `num_processes`-th: `input_ids` and the tokens after them, `shift_labels`.

    Batches are (B, T) with B = `batch_size`, fewer in the last one; a sequence of less than T follows alone.
    """
    num_full = text.tokens // text.block_size
    if num_full:
        sequences = TokenSequences([text.ids], text.block_size, "validation")
        yield from validation_batches(sequences, text.tokens, batch_size, process_index, num_processes)
    if text.tokens % text.block_size and num_full % num_processes == process_index:
        yield as_batch(text.ids[None, num_full * text.block_size :])
