"""Reads the data of the next steps while a step is trained, so that data that cannot be read end a run in good order.

All processes of a step meet in its collectives: if one of them met an error in the middle, the others would wait for it
forever. So a step begins only if the data of this step and the next are in memory. A process that cannot read the next
one says so, and while all train this step, they agree to stop after it (`StopSignal.should_stop`).
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
import torch

from .sequences import hash_sequences
from .shuffled import TrainingBatches

STEPS_AHEAD = 2  # one that must be there when a step begins, and one that is read meanwhile
SECONDS_BETWEEN_LOOKS = 0.1  # at whether the run is to stop, while it waits for data
SILENT_SECONDS = 5.0  # of a wait, which a person need not hear of


class ReadAhead:
    """The micro-batches of `batches`, step after step. Its state is that after the last step handed out.

    Args:
        total_steps: Nothing is read beyond them.
        is_stopping: Whether the run is to stop, and need not wait for data any more.
    """

    def __init__(self, batches: TrainingBatches, total_steps: int, is_stopping: Callable[[], bool] = lambda: False):
        self.batches = batches
        self.total_steps = total_steps
        self.is_stopping = is_stopping
        self.waited_seconds = 0.0  # by the last `wait_for`
        self.batch_hash = 0  # of this process's sequences in the last step handed out, see `hash_sequences`
        self._state = batches.state_dict()
        self._steps: dict[int, Future] = {}  # step -> ids of its micro-batches, their hash, and the state after it
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")  # one, so that steps are read in order

    def wait_for(self, step: int, on_wait: Callable[[str], None] = lambda problem: None) -> str | None:
        """Wait until `step` and the one after it are in memory; returns why they cannot be read, else None.

        Args:
            on_wait: Called several times a second with why something is read again, if that takes long.
        """
        started = time.perf_counter()
        for ahead in range(step, min(step + STEPS_AHEAD + 1, self.total_steps)):
            if ahead not in self._steps:
                self._steps[ahead] = self._thread.submit(self._read, ahead)
        needed = [self._steps[ahead] for ahead in range(step, min(step + STEPS_AHEAD, self.total_steps))]
        try:
            while wait(needed, SECONDS_BETWEEN_LOOKS).not_done:
                if self.is_stopping():
                    return None
                if self.batches.problem and time.perf_counter() - started > SILENT_SECONDS:
                    on_wait(self.batches.problem)
            for future in needed:
                future.result()
        except (OSError, ValueError) as error:
            return str(error)
        finally:
            self.waited_seconds = time.perf_counter() - started
        return None

    def micro_batches(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the step's micro-batches, see `as_batch`; `wait_for` must have been called."""
        ids, self.batch_hash, self._state = self._steps.pop(step).result()
        return self.batches.as_micro_batches(ids)

    def state_dict(self) -> dict:
        """The position of `batches` after the last step that was handed out, not after the last that was read."""
        return self._state

    def load_state_dict(self, state: dict):
        """Continue from what a checkpoint kept."""
        self.batches.load_state_dict(state)
        self._state = self.batches.state_dict()

    def close(self):
        """Read no further."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self.batches.close()

    def _read(self, step: int) -> tuple[list[np.ndarray], int, dict]:
        ids = self.batches.read_step(step)
        return ids, hash_sequences(ids), self.batches.state_dict()
