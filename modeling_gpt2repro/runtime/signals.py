"""Being told to stop: the step is finished, a checkpoint written, and the command shown that goes on.

SIGTERM is what schedulers, containers and launchers send before they kill; SIGUSR1 is the warning that Slurm can be
asked for; SIGHUP says that the terminal is gone; Ctrl-C is a person.
"""

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from .launcher import exit_with_launcher, resume_command

EXIT_CODE = 143  # 128 + SIGTERM: what a scheduler takes for "ended as it was told"
# Ctrl-C reaches every process of a terminal, and a launcher may pass it on to the same ones: still one Ctrl-C.
SECONDS_OF_ONE_CTRL_C = 2.0


class StopRequest:
    """Notes the signals between `with` and its end, and lets all processes hear of them in the same step."""

    def __init__(self):
        self.signal_name: str | None = None
        self.resume_command = resume_command()  # now, while the launcher lives
        self._asked_at = 0.0
        self._before: dict[int, object] = {}
        self._group = self._word = self._flag = None

    def __enter__(self) -> "StopRequest":
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")  # between CPUs: a GPU is not waited for
        for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"):
            number = getattr(signal, name, None)  # Windows has not all of them
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._note)
        exit_with_launcher()
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._word is not None and exception[0] is None:
            self._word.wait()

    def should_stop(self) -> bool:
        """Whether to stop now; all processes must ask equally often.

        What one process was told is under way to the others while they train, so all hear of it one call later.
        """
        if self._group is None:
            return self.signal_name is not None
        heard = False
        if self._word is not None:
            self._word.wait()
            heard = bool(self._flag)
        self._flag = torch.tensor(float(self.signal_name is not None or heard))
        self._word = torch.distributed.all_reduce(
            self._flag, torch.distributed.ReduceOp.MAX, self._group, async_op=True
        )
        return heard

    def _note(self, number: int, frame: FrameType | None):
        if number == signal.SIGINT and self.signal_name and time.monotonic() - self._asked_at > SECONDS_OF_ONE_CTRL_C:
            raise KeyboardInterrupt
        if self.signal_name is None:
            self.signal_name, self._asked_at = signal.Signals(number).name, time.monotonic()
