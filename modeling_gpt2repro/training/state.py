"""How far a run is, when something is due, and how long it waits for data."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class TrainState:
    """How far a run is."""

    step: int = 0  # optimizer steps done, skipped ones included
    tokens: int = 0  # training tokens seen, over all processes
    train_seconds: float = 0.0  # time spent in training steps, without evaluations and saves, over all restarts
    last_skipped: int = 0  # the last step whose update was skipped; 0 for none
    skipped_in_a_row: int = 0  # how many consecutive steps up to that one were skipped

    def advance(self, tokens: int):
        """Count one more step."""
        self.step += 1
        self.tokens += tokens

    def record_skip(self, step: int) -> int:
        """Note that a step was skipped; returns how many in a row that makes."""
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if step == self.last_skipped + 1 else 1
        self.last_skipped = step
        return self.skipped_in_a_row

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return asdict(self)

    def load_state_dict(self, state: dict):
        """Continue from what a checkpoint kept."""
        for name, value in state.items():
            setattr(self, name, value)


def is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`. Step 0 always is, and with `every` = 0 nothing else."""
    return step == 0 or (every > 0 and step % every == 0)


class TimedIterator(Generic[Item]):
    """The items of an iterable; `seconds` adds up how long the caller waited for them."""

    def __init__(self, items: Iterable[Item]):
        self.items = iter(items)
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        started = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - started
