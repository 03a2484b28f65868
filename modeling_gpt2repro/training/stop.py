"""Being told to stop: the step is finished, a checkpoint written, and the command shown that goes on.

SIGTERM is what schedulers, containers and launchers send before they kill; SIGUSR1 is the warning that Slurm can be
asked for; Ctrl-C is a person.
"""

import ctypes
import shlex
import signal
import sys
import time
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

EXIT_CODE = 143  # 128 + SIGTERM: what a scheduler takes for "ended as it was told"
# Ctrl-C reaches every process of a terminal, and a launcher may pass it on to the same ones: still one Ctrl-C.
SECONDS_OF_ONE_CTRL_C = 2.0


class StopRequest:
    """Notes the signals between `with` and its end, and lets all processes hear of them in the same step."""

    def __init__(self):
        self.asked_by: str | None = None
        self.command_that_goes_on = command_that_goes_on()  # now, while the launcher lives
        self._asked_at = 0.0
        self._before: dict[int, object] = {}
        self._group = self._word = self._flag = None

    def __enter__(self) -> "StopRequest":
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._group = dist.new_group(backend="gloo")  # between CPUs: a GPU is not waited for
        for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
            if hasattr(signal, name):  # Windows has no SIGUSR1
                number = getattr(signal, name)
                self._before[number] = signal.signal(number, self._note)
        end_with_launcher()
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._word is not None and exception[0] is None:
            self._word.wait()

    def agreed(self) -> bool:
        """Whether to stop now; all processes must ask equally often.

        What one process was told is under way to the others while they train, so all hear of it one call later.
        """
        if self._group is None:
            return self.asked_by is not None
        heard = False
        if self._word is not None:
            self._word.wait()
            heard = bool(self._flag)
        self._flag = torch.tensor(float(self.asked_by is not None or heard))
        self._word = torch.distributed.all_reduce(
            self._flag, torch.distributed.ReduceOp.MAX, self._group, async_op=True
        )
        return heard

    def _note(self, number: int, frame: FrameType | None):
        if number == signal.SIGINT and self.asked_by and time.monotonic() - self._asked_at > SECONDS_OF_ONE_CTRL_C:
            raise KeyboardInterrupt
        if self.asked_by is None:
            self.asked_by, self._asked_at = signal.Signals(number).name, time.monotonic()


LAUNCHERS = ("accelerate", "torchrun", "accelerate.commands.launch", "torch.distributed.run")


def launcher() -> list[str] | None:
    """The words of the launcher that is this process's parent; None where there is none."""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # not ours to look at, or gone
        return None
    return words if any(Path(word).name in LAUNCHERS for word in words[:4]) else None


def command_that_goes_on() -> str:
    """The command that this run was started by, with `--resume_from_checkpoint latest`."""
    words = launcher() or list(sys.orig_argv)
    words = [Path(word).name if place < 2 else word for place, word in enumerate(words)]
    if words[1:2] and words[1] in LAUNCHERS[:2]:
        del words[0]  # the interpreter of an installed launcher
    if "--resume_from_checkpoint" in words:
        place = words.index("--resume_from_checkpoint")
        del words[place : place + 2]
    return shlex.join([*words, "--resume_from_checkpoint", "latest"])


def end_with_launcher():
    """Let the kernel send SIGTERM when the launcher dies: `accelerate launch` of one process does not pass it on."""
    if sys.platform == "linux" and launcher():
        death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(death_signal, signal.SIGTERM)
