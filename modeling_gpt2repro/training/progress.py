"""What a run remembers of itself, when something is due, and how long it waits for data."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")


@dataclass
class TrainProgress:
    """How far a run is.

    Args:
        step: Optimizer steps done.
        tokens: Training tokens seen, over all processes.
        train_seconds: Time spent in training steps, evaluations and saves left out, over all restarts.
        step_tokens, step_seconds: Of the last step.
    """

    step: int = 0
    tokens: int = 0
    train_seconds: float = 0.0
    step_tokens: int = 0
    step_seconds: float = 0.0

    def advance(self, tokens: int, seconds: float):
        """Count one more step."""
        self.step += 1
        self.step_tokens, self.step_seconds = tokens, seconds
        self.tokens += tokens
        self.train_seconds += seconds

    def state_dict(self) -> dict:
        """What a checkpoint keeps."""
        return {"step": self.step, "tokens": self.tokens, "train_seconds": self.train_seconds}

    def load_state_dict(self, state: dict):
        """Go on from what a checkpoint kept."""
        self.step, self.tokens, self.train_seconds = state["step"], state["tokens"], state["train_seconds"]


def is_due(step: int, every: int) -> bool:
    """Whether `step` is a multiple of `every`; step 0 always is, and nothing else where `every` is 0."""
    return step == 0 or (every > 0 and step % every == 0)


class TimedIterator(Generic[Item]):
    """The items of an iterable; `seconds` is how long whoever took them has waited for them."""

    def __init__(self, items: Iterable[Item]):
        self.items, self.seconds = iter(items), 0.0

    def __iter__(self) -> Iterator[Item]:
        return self

    def __next__(self) -> Item:
        started = time.perf_counter()
        try:
            return next(self.items)
        finally:
            self.seconds += time.perf_counter() - started
