"""Rows of prepared shards and the order they come in, a pure function of (seed, step).

B rows a micro-batch, T tokens a row. Row i of a split is `ids[i * T : i * T + T + 1]`: T inputs and their T next
tokens, so every token is predicted once. An epoch is a seeded permutation of all rows; step s takes rows
[s * R, (s + 1) * R) of the epochs laid end to end, R = tokens_per_step / T. Process p of P takes every P-th of them,
from the p-th on. So the order depends neither on the number of processes nor on the micro-batch, and resuming needs
nothing but the step.

Nothing has to divide evenly: every process has the same number of micro-batches of one size, and where rows are missing
it fills them with rows that have no targets. So compiled shapes stay, and processes that must meet in each forward do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch


class TokenSequences:
    """Rows of T + 1 ids over several shards read as one; a row may begin in one shard and end in another.

    Raises:
        ValueError: If there is not even one row.
    """

    def __init__(self, shards: list[np.ndarray], block_size: int, name: str = "training"):
        # Plain views: slicing a memory map makes another memory map, which takes longer than the copy.
        self.shards, self.block_size = [np.asarray(shard) for shard in shards], block_size
        self.starts = np.cumsum([0, *map(len, shards)])
        tokens = int(self.starts[-1])
        if tokens < block_size + 1:
            raise ValueError(
                f"the {name} split holds {tokens} tokens, but one row takes {block_size + 1}: give more text, or a "
                "smaller --block_size."
            )

    def __len__(self) -> int:
        return (int(self.starts[-1]) - 1) // self.block_size

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Row numbers (n,) -> ids (n, T + 1) int64."""
        ids = np.empty((len(rows), self.block_size + 1), dtype=np.int64)
        for out, row in zip(ids, rows, strict=True):
            place, filled = int(row) * self.block_size, 0
            shard = int(np.searchsorted(self.starts, place, side="right")) - 1
            while filled < len(out):
                part = self.shards[shard][place - self.starts[shard] :][: len(out) - filled]
                out[filled : filled + len(part)] = part
                filled, place, shard = filled + len(part), place + len(part), shard + 1
        return ids


@dataclass(frozen=True)
class BatchConfig:
    """How rows become batches.

    Args:
        block_size: T, tokens a row.
        sequences_per_step: R, rows of an optimizer step over all processes and micro-batches.
        micro_batch_size: B, the most rows of one forward on one process.
        seed: Decides the order.
        process_index, num_processes: p and P.
        document_mask: Whether batches say where documents begin, so that attention stays inside them.
    """

    block_size: int
    sequences_per_step: int
    micro_batch_size: int
    seed: int
    process_index: int = 0
    num_processes: int = 1
    document_mask: bool = False


def split_into_micro_batches(rows: int, most: int) -> tuple[int, int]:
    """How many micro-batches `rows` take at `most` rows each, and their size: (9, 8) -> (2, 5), one row filled in."""
    count = -(-rows // most)
    return count, -(-rows // count)


class EpochShuffle:
    """Which row stands at a place, where epochs are laid end to end and each is a permutation of its own.

    Args:
        rows: Rows of an epoch.
        seed: Whole numbers that decide the order.
    """

    def __init__(self, rows: int, seed: Sequence[int]):
        self.rows, self.seed = rows, list(seed)
        self._permutation: tuple[int, np.ndarray] = (-1, np.empty(0))

    def row_numbers(self, places: np.ndarray) -> np.ndarray:
        """Places (n,) -> row numbers (n,)."""
        epochs, within = np.divmod(places, self.rows)
        numbers = np.empty_like(places)
        for epoch in np.unique(epochs):
            numbers[epochs == epoch] = self._epoch(int(epoch))[within[epochs == epoch]]
        return numbers

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._permutation[0] != epoch:
            # Sorting raw 64-bit draws, because numpy promises to keep these streams and not those of `permutation`.
            draws = np.random.PCG64(np.random.SeedSequence([*self.seed, epoch])).random_raw(self.rows)
            self._permutation = (epoch, np.argsort(draws, kind="stable"))
        return self._permutation[1]


class ShuffledBatches:
    """The training batches of one process, any step at any time.

    Args:
        end_of_text: The id before each document; needed for a document mask only.
    """

    def __init__(self, rows: TokenSequences, shape: BatchConfig, end_of_text: int | None = None):
        self.rows, self.shape, self.end_of_text = rows, shape, end_of_text
        self.order = EpochShuffle(len(rows), [shape.seed])

    @property
    def micro_batch_shape(self) -> tuple[int, int]:
        """Micro-batches of a step on each process, and rows of each."""
        rows = -(-self.shape.sequences_per_step // self.shape.num_processes)
        return split_into_micro_batches(rows, self.shape.micro_batch_size)

    @property
    def rows_per_epoch(self) -> int:
        """Rows that come before one comes again."""
        return self.order.rows

    def read(self, places: np.ndarray) -> np.ndarray:
        """Places in the order of training (n,) -> ids (n, T + 1)."""
        return self.rows.read(self.order.row_numbers(places))

    def places(self, step: int) -> np.ndarray:
        """The places, R / P up to rounding, that this process takes in a step."""
        first = step * self.shape.sequences_per_step
        return np.arange(
            first + self.shape.process_index, first + self.shape.sequences_per_step, self.shape.num_processes
        )

    def micro_batches(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the step's micro-batches, see `as_batch`."""
        places, (count, size) = self.places(step), self.micro_batch_shape
        for number in range(count):
            ids = self.read(places[number * size : (number + 1) * size])
            yield as_batch(ids, self.end_of_text if self.shape.document_mask else None, fill_to=size)

    def sample_ids(self, step: int) -> list:
        """Which rows this process takes in a step: their numbers."""
        return self.order.row_numbers(self.places(step)).tolist()

    def state_dict(self) -> dict:
        """Nothing: the step says it all."""
        return {}

    def load_state_dict(self, state: dict):
        """Nothing to restore."""

    def close(self):
        """Nothing is read ahead."""


def as_batch(ids: np.ndarray, end_of_text: int | None = None, fill_to: int = 0) -> dict[str, torch.Tensor]:
    """ids (B, T + 1) -> `input_ids` and the tokens after them, `shift_labels`: (B, T) int64 on the CPU.

    With the id before each document, also `position_ids` (B, T), which start again at it: the model keeps such parts of
    a row apart.

    Args:
        fill_to: Rows without targets (-100, which no loss counts) are added up to so many.
    """
    rows, missing = len(ids), max(0, fill_to - len(ids))
    ids = torch.from_numpy(np.pad(ids, ((0, missing), (0, 0))))
    # Cloned: of a single row either would be a view of the same memory.
    batch = {"input_ids": ids[:, :-1].clone(), "shift_labels": ids[:, 1:].clone()}
    batch["shift_labels"][rows:] = -100
    if end_of_text is not None:
        batch["position_ids"] = document_positions(batch["input_ids"], end_of_text)
    return batch


def document_positions(ids: torch.Tensor, end_of_text: int) -> torch.Tensor:
    """Places within documents, (B, T): [[5, 6, 0, 7, 8, 0]] with 0 before each document -> [[0, 1, 0, 1, 2, 0]]."""
    places = torch.arange(ids.shape[1]).expand_as(ids)
    return places - torch.where(ids == end_of_text, places, 0).cummax(dim=1).values


def validation_batches(
    rows: TokenSequences,
    tokens: int,
    micro_batch_size: int,
    shape: BatchConfig | None = None,
    end_of_text: int | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """The first `tokens` // T rows of the validation split (all of them if it has fewer), each on one process."""
    count = min(len(rows), max(1, tokens // rows.block_size))
    numbers = np.arange(shape.process_index, count, shape.num_processes) if shape else np.arange(count)
    for first in range(0, len(numbers), micro_batch_size):
        ids = rows.read(numbers[first : first + micro_batch_size])
        yield as_batch(ids, end_of_text if shape and shape.document_mask else None)
