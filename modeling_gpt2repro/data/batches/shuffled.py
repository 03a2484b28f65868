"""Training sequences and their order: which sequence comes when is a pure function of (seed, step).

    T  tokens of a sequence, `block_size`
    B  sequences of a micro-batch, which is what one forward on one process sees
    R  sequences of an optimizer step, over all processes and micro-batches
    P  processes; p is the index of this one

A split is one long run of token ids, and sequence i of it is `ids[i * T : i * T + T + 1]`. An epoch is a seeded shuffle
of all sequences. A sample index counts along the epochs, one after another: step s trains on samples s * R, ...,
s * R + R - 1, and process p takes every P-th of them.

    R = 8, P = 2    sample   0  1  2  3  4  5  6  7 |  8  9 10 ...
                    step     0  0  0  0  0  0  0  0 |  1  1  1
                    process  0  1  0  1  0  1  0  1 |  0  1  0

Neither P nor B changes what a step trains on. So a run resumes from nothing but its step, on any number of processes,
and any step of it, a diverged one for example, can be looked at without those before it.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .sequences import TokenSequences, as_batch

ROUNDS = 8  # with 8 all orders of 3, 4, 5 or 6 items come up equally often over 30,000 seeds; with 4 they do not


@dataclass(frozen=True)
class BatchConfig:
    """How sequences become batches."""

    block_size: int  # T, tokens of a sequence
    sequences_per_step: int  # R, sequences of an optimizer step over all processes and micro-batches
    micro_batch_size: int  # B, the most sequences of one forward on one process
    seed: int  # decides the order
    process_index: int = 0  # p
    num_processes: int = 1  # P
    document_mask: bool = False  # whether batches say where documents begin, so that attention stays inside them
    order: str = "keyed"  # or "argsort", that of older runs; see SHUFFLES
    overfit_one_batch: bool = False  # whether every step trains on the sequences of the first


def keyed_permutation(indices: np.ndarray, size: int, seed: Sequence[int]) -> np.ndarray:
    """Indices (n,) out of 0, ..., size - 1 -> where a shuffle of all of them takes these, (n,) int64.

    Only what is asked for is computed, because shuffling 100 M indices as a whole takes 20 seconds and gigabytes, in
    every process and every epoch. Imagine the indices written into a table, row by row. Each column is rolled by its
    own pseudo-random amount, then each row, and that eight times:

        0 1 2     0 7 5     5 0 7
        3 4 5     3 1 8     3 1 8     columns rolled by 0, 1, 2, then rows by 1, 0, 2
        6 7 8     6 4 2     4 2 6

    To follow one index takes only its row, its column and a hash. And since a roll can be undone, no two indices ever
    end in the same cell: this is a permutation, whatever the hash. It is the generalized Feistel cipher of Black and
    Rogaway, "Ciphers with Arbitrary Finite Domains" (2002), used for shuffling and not for secrecy.
    """
    columns = math.isqrt(size - 1) + 1  # the square root, rounded up
    rows = -(-size // columns)  # as many as it takes, so that less than one row of cells is left over
    keys = np.random.SeedSequence(seed).generate_state(2 * ROUNDS, np.uint64).reshape(ROUNDS, 2)

    def roll(cells: np.ndarray) -> np.ndarray:
        row, column = np.divmod(cells, columns)  # (n,) each
        for column_key, row_key in keys:
            # The inner remainder is for the sum's sake: past 2**64 it would wrap, and two cells could become one.
            row = (row + hash64(column + column_key) % rows) % rows
            column = (column + hash64(row + row_key) % columns) % columns
        return row * columns + column

    cells = roll(indices.astype(np.uint64))
    # Cycle walking: an index that lands in a left-over cell is rolled again until it lands in one that counts. It will:
    # a cycle of the permutation leads back to the cell that it began in, and that one counts.
    while (left_over := cells >= size).any():
        cells[left_over] = roll(cells[left_over])
    return cells.astype(np.int64)


def hash64(x: np.ndarray) -> np.ndarray:
    """64 bits -> 64 pseudo-random bits (uint64): the last step of SplitMix64 (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9  # products and sums wrap at 2**64, on every machine alike
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


class EpochShuffle:
    """Position in the training -> index of an item; each epoch has its own order, which seed and epoch decide."""

    def __init__(self, num_items: int, seed: Sequence[int]):
        self.num_items = num_items
        self.seed = list(seed)

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """Positions (n,), counted through all epochs -> indices (n,)."""
        epochs, within_epoch = np.divmod(positions, self.num_items)  # (n,) each
        indices = np.empty_like(positions)
        for epoch in np.unique(epochs):  # most often one: a step crosses the end of an epoch now and then
            in_epoch = epochs == epoch
            indices[in_epoch] = self.shuffled(within_epoch[in_epoch], int(epoch))
        return indices

    def shuffled(self, within_epoch: np.ndarray, epoch: int) -> np.ndarray:
        """Positions within an epoch (n,) -> indices (n,)."""
        return keyed_permutation(within_epoch, self.num_items, [*self.seed, epoch])


class ArgsortShuffle(EpochShuffle):
    """The order of runs begun by older versions, which shuffled each epoch as a whole: such a run keeps it."""

    latest = (-1, np.empty(0, dtype=np.int64))  # number and permutation of the epoch that was asked for last

    def shuffled(self, within_epoch: np.ndarray, epoch: int) -> np.ndarray:
        latest_epoch, permutation = self.latest
        if latest_epoch != epoch:
            permutation = seeded_permutation(self.num_items, [*self.seed, epoch])
            self.latest = (epoch, permutation)
        return permutation[within_epoch]


SHUFFLES = {"keyed": EpochShuffle, "argsort": ArgsortShuffle}  # by `BatchConfig.order`


def seeded_permutation(size: int, seed: Sequence[int]) -> np.ndarray:
    """0, ..., size - 1 in an order that the seed decides, (size,) int64; for sizes of a few thousand.

    It sorts raw 64-bit draws. `Generator.permutation` would do in one line, but numpy guarantees the streams of its bit
    generators and of `SeedSequence` only, and may improve what is built on them
    (NEP 19, https://numpy.org/neps/nep-0019-rng-policy.html): a run resumed on another numpy would lose its order.
    """
    draws = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size)  # (size,) uint64
    return np.argsort(draws, kind="stable")  # stable, so that even equal draws have one order


def split_into_micro_batches(sequences: int, max_size: int) -> tuple[int, int]:
    """The fewest micro-batches of at most `max_size` that hold so many sequences, and the least size that they need.

    Example: (8, 8) -> (1, 8), (9, 8) -> (2, 5): two of five, in which one sequence is padding.
    """
    num_micro_batches = -(-sequences // max_size)  # rounded up
    return num_micro_batches, -(-sequences // num_micro_batches)


class TrainingBatches(ABC):
    """What one process trains on, step by step; a subclass says which sequences those of a step are.

    It depends on `config.seed` and the step alone, so before the first step `config.micro_batch_size` may be replaced:
    it changes how a step is cut, not what is in it. Besides what is here, each has `micro_batch_shape`,
    `sequences_per_epoch`, `sample_ids(step)`, `state_dict`, `load_state_dict` and `close`.
    """

    config: BatchConfig
    end_of_text: int | None  # the id before each document; needed for a document mask only
    micro_batch_shape: tuple[int, int]
    problem: str | None = None  # why something must be read again now; None while all is well

    @abstractmethod
    def read_step(self, step: int) -> list[np.ndarray]:
        """The ids of each of the step's micro-batches: (at most B, T + 1) int64, none left for some processes."""

    def micro_batches(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the step's micro-batches on the CPU, see `as_batch`: of one shape for every step and process."""
        return self.as_micro_batches(self.read_step(step))

    def as_micro_batches(self, step_ids: list[np.ndarray]) -> Iterator[dict[str, torch.Tensor]]:
        """The same out of what `read_step` returned."""
        end_of_text = self.end_of_text if self.config.document_mask else None
        _, size = self.micro_batch_shape
        for ids in step_ids:
            yield as_batch(ids, end_of_text, pad_to=size)


class ShuffledBatches(TrainingBatches):
    """The training batches of one process; any step can be asked for at any time.

    Nothing has to divide evenly. All processes of a step do the same number of micro-batches of the same size, because
    they meet in the collectives of each forward and backward, and a compiled model is compiled for one shape. Where a
    process has fewer sequences than that, the rest is padding without targets.
    """

    def __init__(self, sequences: TokenSequences, config: BatchConfig, end_of_text: int | None = None):
        self.sequences = sequences
        self.config = config
        self.end_of_text = end_of_text
        self.shuffle = SHUFFLES[config.order](len(sequences), [config.seed])

    @property
    def micro_batch_shape(self) -> tuple[int, int]:
        """Micro-batches of a step on each process, and sequences of each."""
        sequences_per_process = -(-self.config.sequences_per_step // self.config.num_processes)  # R / P, rounded up
        return split_into_micro_batches(sequences_per_process, self.config.micro_batch_size)

    @property
    def sequences_per_epoch(self) -> int | None:
        """Sequences that come before one comes again; None where there is no such number."""
        return self.shuffle.num_items

    def sample_indices(self, step: int) -> np.ndarray:
        """The samples that this process takes in a step, R / P of them up to rounding."""
        first = 0 if self.config.overfit_one_batch else step * self.config.sequences_per_step
        # Every P-th, not a block for each process: for any R and P the counts differ by one at most, and the sequences
        # of all processes, one of each in turn, are those of a single process in its order.
        return np.arange(
            first + self.config.process_index, first + self.config.sequences_per_step, self.config.num_processes
        )

    def read(self, sample_indices: np.ndarray) -> np.ndarray:
        """Sample indices (n,) -> ids (n, T + 1) int64."""
        return self.sequences.read(self.shuffle.indices(sample_indices))

    def read_step(self, step: int) -> list[np.ndarray]:
        """The ids of each of the step's micro-batches."""
        sample_indices = self.sample_indices(step)
        num_micro_batches, size = self.micro_batch_shape
        return [self.read(sample_indices[first : first + size]) for first in range(0, num_micro_batches * size, size)]

    def sample_ids(self, step: int) -> list:
        """What this process takes in a step, so that it can be found again: sequence indices."""
        return self.shuffle.indices(self.sample_indices(step)).tolist()

    def state_dict(self) -> dict:
        """Nothing: the order follows from seed and step."""
        return {}

    def load_state_dict(self, state: dict):
        """Nothing to restore."""

    def close(self):
        """Nothing is read ahead."""
