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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .sequences import TokenSequences, as_batch


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


def seeded_permutation(size: int, seed: Sequence[int]) -> np.ndarray:
    """0, ..., size - 1 in an order that the seed decides, the same on every machine: (size,) int64.

    It sorts raw 64-bit draws. `Generator.permutation` would do in one line, but numpy guarantees the streams of its bit
    generators and of `SeedSequence` only, and may improve what is built on them
    (NEP 19, https://numpy.org/neps/nep-0019-rng-policy.html): a run resumed on another numpy would lose its order.
    """
    draws = np.random.PCG64(np.random.SeedSequence(seed)).random_raw(size)  # (size,) uint64
    return np.argsort(draws, kind="stable")  # stable, so that even equal draws have one order


class EpochShuffle:
    """Sample index -> sequence index; each epoch is a shuffle of its own, decided by the seed and its number."""

    def __init__(self, num_sequences: int, seed: Sequence[int]):
        self.num_sequences = num_sequences
        self.seed = list(seed)
        # Only the last epoch asked for is kept: FineWeb-Edu's 10 B tokens are 9.7 M sequences, 78 MB of indices.
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def sequence_indices(self, sample_indices: np.ndarray) -> np.ndarray:
        """Sample indices (n,) -> sequence indices (n,)."""
        epochs, within_epoch = np.divmod(sample_indices, self.num_sequences)  # (n,) each
        sequence_indices = np.empty_like(sample_indices)
        for epoch in np.unique(epochs):  # most often one: a step crosses the end of an epoch now and then
            in_epoch = epochs == epoch
            sequence_indices[in_epoch] = self._permutation_of(int(epoch))[within_epoch[in_epoch]]
        return sequence_indices

    def _permutation_of(self, epoch: int) -> np.ndarray:
        if self._epoch != epoch:
            self._permutation = seeded_permutation(self.num_sequences, [*self.seed, epoch])
            self._epoch = epoch
        return self._permutation


def split_into_micro_batches(sequences: int, max_size: int) -> tuple[int, int]:
    """The fewest micro-batches of at most `max_size` that hold so many sequences, and the least size that they need.

    Example: (8, 8) -> (1, 8), (9, 8) -> (2, 5): two of five, in which one sequence is padding.
    """
    num_micro_batches = -(-sequences // max_size)  # rounded up
    return num_micro_batches, -(-sequences // num_micro_batches)


class ShuffledBatches:
    """The training batches of one process; any step can be asked for at any time.

    Nothing has to divide evenly. All processes of a step do the same number of micro-batches of the same size, because
    they meet in the collectives of each forward and backward, and a compiled model is compiled for one shape. Where a
    process has fewer sequences than that, the rest is padding without targets.
    """

    def __init__(self, sequences: TokenSequences, config: BatchConfig, end_of_text: int | None = None):
        self.sequences = sequences
        self.config = config
        self.end_of_text = end_of_text  # the id before each document; needed for a document mask only
        self.shuffle = EpochShuffle(len(sequences), [config.seed])

    @property
    def micro_batch_shape(self) -> tuple[int, int]:
        """Micro-batches of a step on each process, and sequences of each."""
        sequences_per_process = -(-self.config.sequences_per_step // self.config.num_processes)  # R / P, rounded up
        return split_into_micro_batches(sequences_per_process, self.config.micro_batch_size)

    @property
    def sequences_per_epoch(self) -> int | None:
        """Sequences that come before one comes again; None where there is no such number."""
        return self.shuffle.num_sequences

    def sample_indices(self, step: int) -> np.ndarray:
        """The samples that this process takes in a step, R / P of them up to rounding."""
        first = step * self.config.sequences_per_step
        # Every P-th, not a block for each process: for any R and P the counts differ by one at most, and the sequences
        # of all processes, one of each in turn, are those of a single process in its order.
        return np.arange(
            first + self.config.process_index, first + self.config.sequences_per_step, self.config.num_processes
        )

    def read(self, sample_indices: np.ndarray) -> np.ndarray:
        """Sample indices (n,) -> ids (n, T + 1) int64."""
        return self.sequences.read(self.shuffle.sequence_indices(sample_indices))

    def micro_batches(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the step's micro-batches on the CPU, see `as_batch`: of one shape for every step and process."""
        end_of_text = self.end_of_text if self.config.document_mask else None
        sample_indices = self.sample_indices(step)
        num_micro_batches, size = self.micro_batch_shape
        for first in range(0, num_micro_batches * size, size):
            ids = self.read(sample_indices[first : first + size])  # (at most B, T + 1), none left for some processes
            yield as_batch(ids, end_of_text, pad_to=size)

    def sample_ids(self, step: int) -> list:
        """What this process takes in a step, so that it can be found again: sequence indices."""
        return self.shuffle.sequence_indices(self.sample_indices(step)).tolist()

    def state_dict(self) -> dict:
        """Nothing: the order follows from seed and step."""
        return {}

    def load_state_dict(self, state: dict):
        """Nothing to restore."""

    def close(self):
        """Nothing is read ahead."""
