"""Token shards as sequences of T + 1 ids, and sequences as batches of inputs and targets.

    B  sequences of a batch
    T  tokens of a sequence, `block_size`

A split is one long run of ids, cut into shards where a file was full. Sequence i of it is
`ids[i * T : i * T + T + 1]`: T inputs, and for each of them the token after it.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from modeling_gpt2repro.data.shards.shard_file import ShardFile

IGNORE_INDEX = -100  # torch's cross_entropy leaves out targets of this value: its default `ignore_index`


class TokenSequences:
    """Sequences of T + 1 ids, read from several shards as if they were one; a sequence may cross into the next shard.

    Args:
        shards: Token ids, (n,) each; memory maps and `ShardFile`s are read where they are used only.

    Raises:
        ValueError: If the shards hold less than one sequence.
    """

    def __init__(self, shards: list[np.ndarray | ShardFile], block_size: int, name: str = "training"):
        # Plain views of the same mapped memory: each slice of an `np.memmap` builds another memmap object, and copying
        # 1,025 ids takes 7 microseconds instead of 2.
        self.shards = [shard.view(np.ndarray) if isinstance(shard, np.memmap) else shard for shard in shards]
        self.block_size = block_size
        self.offsets = np.cumsum([0, *map(len, shards)])  # where each shard begins in the split; its end comes last
        tokens = int(self.offsets[-1])
        if tokens < block_size + 1:
            raise ValueError(
                f"the {name} split holds {tokens} tokens, but one sequence takes {block_size + 1}: give more text, or "
                "a smaller --block_size."
            )

    def __len__(self) -> int:
        # The last token is a target only. Up to T - 1 tokens at the end, too few for a sequence, are never used.
        return (int(self.offsets[-1]) - 1) // self.block_size

    def read(self, indices: np.ndarray) -> np.ndarray:
        """Sequence indices (n,) -> ids (n, T + 1) int64.

        T + 1, because the target of an input is the token after it. Neighbours overlap by one: the last target of a
        sequence is the first input of the next, so an epoch predicts every token exactly once.
        """
        # Shards hold 16 bits an id; torch's embedding and cross_entropy take 64.
        ids = np.empty((len(indices), self.block_size + 1), dtype=np.int64)  # (n, T + 1)
        for sequence, index in zip(ids, indices, strict=True):
            position = int(index) * self.block_size
            shard = int(np.searchsorted(self.offsets, position, side="right")) - 1
            filled = 0
            while filled < len(sequence):  # more than once only where the sequence crosses into the next shard
                first = position - int(self.offsets[shard])
                part = self.shards[shard][first : first + len(sequence) - filled]  # less at the end of a shard
                sequence[filled : filled + len(part)] = part
                filled += len(part)
                position += len(part)
                shard += 1
        return ids

    def sequences_in(self, tokens: int) -> int:
        """How many whole sequences `tokens` predicted tokens are: at least one, and at most all there are."""
        return min(len(self), max(1, tokens // self.block_size))

    def first_ids(self, tokens: int) -> np.ndarray:
        """The ids of the first n = `sequences_in(tokens)` sequences in one piece: (n * T + 1,) int64."""
        parts = first_tokens(self.shards, self.sequences_in(tokens) * self.block_size + 1)
        return np.concatenate(parts).astype(np.int64)


def first_tokens(shards: Sequence[np.ndarray | ShardFile], tokens: int) -> list[np.ndarray]:
    """The first `tokens` ids of a split, or all if it has fewer: views of its shards, or what is read of the files.

    Example: shards of 5, 5 and 5 ids, 7 tokens -> views of 5 and 2 ids.
    """
    parts = []
    for shard in shards:
        if tokens <= 0:
            break
        parts.append(shard[:tokens])
        tokens -= len(parts[-1])
    return parts


def as_batch(ids: np.ndarray, end_of_text: int | None = None, pad_to: int = 0) -> dict[str, torch.Tensor]:
    """ids (B, T + 1) -> `input_ids` and the tokens after them, `shift_labels`: (B, T) int64 on the CPU.

    With the id before each document, also `position_ids` (B, T), which start again at it: the model keeps the documents
    of a sequence apart.

    Args:
        pad_to: Sequences without targets are added up to so many.
    """
    num_sequences = len(ids)
    num_padding = max(0, pad_to - num_sequences)
    ids = torch.from_numpy(np.pad(ids, ((0, num_padding), (0, 0))))
    # transformers shifts what is called `labels`, and takes `shift_labels` as they are.
    # Cloned, or the two would share memory where B is 1: a write to one would show in the other.
    batch = {"input_ids": ids[:, :-1].clone(), "shift_labels": ids[:, 1:].clone()}  # (B, T) each
    # Padding takes part in the forward, but no loss or gradient comes from it, and it is not among the targets that the
    # loss is divided by: the step is that of its R sequences, whatever P and B are.
    batch["shift_labels"][num_sequences:] = IGNORE_INDEX
    if end_of_text is not None:
        batch["position_ids"] = document_positions(batch["input_ids"], end_of_text)
    return batch


def hash_sequences(micro_batches: Iterable[np.ndarray]) -> int:
    """64 bits of the ids (B, T + 1) of a step: the sum of the sequences' BLAKE2 hashes, modulo 2**64.

    A sum, so that it does not depend on how the sequences are divided into micro-batches and processes: the sum of the
    processes' hashes is the hash of the step.
    """
    digests = [
        hashlib.blake2b(sequence.astype("<u4"), digest_size=8).digest() for ids in micro_batches for sequence in ids
    ]
    return sum(int.from_bytes(digest, "little") for digest in digests) % 2**64


def document_positions(ids: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Positions within documents, (B, T): [[5, 6, 0, 7, 8, 0]] with 0 before each document -> [[0, 1, 0, 1, 2, 0]]."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    document_starts = torch.where(ids == end_of_text, positions, 0).cummax(dim=1).values  # the latest one so far
    return positions - document_starts


def validation_batches(
    sequences: TokenSequences,
    tokens: int,
    micro_batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    end_of_text: int | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the sequences of the first `tokens` tokens of a split in their order, each on one process.

    Never shuffled, so that every evaluation of every run is on the same tokens. Nothing is padded either: the last
    batch may be smaller, and a process may have fewer batches than another.
    """
    indices = np.arange(process_index, sequences.sequences_in(tokens), num_processes)
    for first in range(0, len(indices), micro_batch_size):
        yield as_batch(sequences.read(indices[first : first + micro_batch_size]), end_of_text)
