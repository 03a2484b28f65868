"""Stop when a signal asks for it, or data cannot be read: write a checkpoint, show the command that resumes the run.

SIGTERM is what schedulers, containers and launchers send before they kill; SIGUSR1 is the warning that Slurm can be
asked for; SIGHUP means that the terminal is gone; Ctrl-C sends SIGINT.
"""

import ctypes
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from .command_line import CONSOLE_SCRIPTS, is_notebook
from .network import MAX_SAVE_TIME
from .progress import PRIVATE_PATH, last_part

EXIT_CODE = 143  # 128 + SIGTERM: schedulers read it as "terminated on request"
# Ctrl-C reaches every process of a terminal, and a launcher may forward it to the same ones: still one Ctrl-C.
SAME_CTRL_C_SECONDS = 2.0
LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "torch.distributed.run")
TRAINING_PROGRAMS = ("train_accelerate", "gpt2repro-train")
HOST_FLAGS = ("__main_process_ip", "__master_addr", "__rdzv_endpoint", "__local_addr")  # of launchers, - as _


class StopSignal:
    """Context manager that records SIGTERM, SIGUSR1, SIGHUP and SIGINT, and lets all processes stop at the same step.

    Attributes:
        signal_name: The signal that this process received, such as "SIGTERM"; None while there is none.
        problem: Why this process cannot continue, a sentence; None while it can.
        resume_command: The shell command that resumes the run.
    """

    def __init__(self, on_stop: Callable[[], None] = lambda: None):
        """`on_stop` is called once this process knows that the run has to stop, possibly from a signal handler."""
        self._on_stop = on_stop
        self.signal_name: str | None = None
        self.problem: str | None = None
        self.resume_command = resume_command()  # read now, while the launcher is alive
        self._received_at = 0.0
        self._previous_handlers: dict[int, object] = {}
        self._group: dist.ProcessGroup | None = None
        self._all_reduce: dist.Work | None = None
        self._flag: torch.Tensor | None = None

    def __enter__(self) -> "StopSignal":
        if dist.is_initialized() and dist.get_world_size() > 1:
            # On the CPU, so that no GPU is waited for. A process that saves comes to its next call that much later.
            self._group = dist.new_group(backend="gloo", timeout=MAX_SAVE_TIME)
        for name in ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT"):
            number = getattr(signal, name, None)  # Windows lacks some of them
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._previous_handlers[number] = signal.signal(number, self._record)
        exit_with_launcher()
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        if self._all_reduce is not None and exception[0] is None:
            self._all_reduce.wait()

    def is_requested(self) -> bool:
        """Whether this process has a reason to stop."""
        return self.signal_name is not None or self.problem is not None

    def should_stop(self, problem: str | None = None) -> bool:
        """Whether to stop now. With several processes this is a collective: all must call it equally often.

        The all-reduce of the flags runs while the processes train, and its result is read one call later: so nothing
        waits for it, and all processes see it at the same step. Only the first call waits for its own.

        Args:
            problem: Why this process cannot continue, if so, after the step that follows the call (the first call:
                before it).
        """
        self.problem = self.problem or problem
        stop = self.is_requested()
        if self._group is not None:
            if self._all_reduce is None:
                self._start_all_reduce(stop)
            self._all_reduce.wait()
            stop = bool(self._flag)
            self._start_all_reduce(stop or self.is_requested())
        if stop:
            self._on_stop()
        return stop

    def _start_all_reduce(self, flag: bool):
        self._flag = torch.tensor(float(flag))
        self._all_reduce = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _record(self, number: int, frame: FrameType | None):
        is_repeated = self.signal_name is not None and time.monotonic() - self._received_at > SAME_CTRL_C_SECONDS
        if number == signal.SIGINT and is_repeated:
            raise KeyboardInterrupt  # a second Ctrl-C: leave at once
        if self.signal_name is None:
            self.signal_name = signal.Signals(number).name
            self._received_at = time.monotonic()
            self._on_stop()


def launcher_command() -> list[str] | None:
    """The words of the `accelerate launch` or `torchrun` that is this process's parent; None if there is none."""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # not permitted to look, or already gone
        return None
    return words if any(Path(word).name in LAUNCHERS for word in words[:4]) else None


def resume_command() -> str:
    """The command that started this run, or the call in a notebook, with `--resume_from_checkpoint latest`."""
    if launcher_command() is None and is_notebook():
        return 'train_accelerate.main([..., "--resume_from_checkpoint", "latest"])'
    return shlex.join([*start_command(), "--resume_from_checkpoint", "latest"])


def start_command() -> list[str]:
    """The words of the command that started this run, without `--resume_from_checkpoint`."""
    words = list(launcher_command() or sys.orig_argv)
    if words[1:2] and Path(words[1]).name in {*LAUNCHERS, *CONSOLE_SCRIPTS}:
        del words[0]  # the interpreter that runs an installed launcher, or our own command
    words[0] = Path(words[0]).name
    if "--resume_from_checkpoint" in words:
        index = words.index("--resume_from_checkpoint")
        del words[index : index + 2]
    return words


def public_command(device: torch.device) -> str | None:
    """The same for a model card, without what is only of this machine; None if no command started the run.

    "accelerate launch train_accelerate.py --output_dir /home/me/runs/a" ->
    "OMP_NUM_THREADS=2 accelerate launch train_accelerate.py --output_dir a", since on CPUs a sum in another number of
    threads may be another one in its last bit.
    """
    if Path(sys.argv[0]).stem not in TRAINING_PROGRAMS:  # a notebook or a program that called `main`
        return None
    threads = [f"OMP_NUM_THREADS={torch.get_num_threads()}"] if device.type == "cpu" else []
    hidden = [hide_private(word, before) for before, word in pairwise(["", *start_command()])]
    return shlex.join([*threads, *hidden])


def hide_private(word: str, before: str) -> str:
    """A word of a command without folders of this machine, addresses of its cluster, and tokens of the Hub.

    "/home/me/data/edu" -> "edu"; "--mix=/data/a:0.7,b:0.3" -> "--mix=a:0.7,b:0.3"; "10.0.0.1" -> "HOST" where it
    follows "--main_process_ip"; "hf_" and a token's letters -> "hf_..."; "https://me:secret@host" -> "https://host".
    """
    flag, _, value = word.partition("=")
    if before.replace("-", "_") in HOST_FLAGS:
        return "HOST"
    if value and flag.replace("-", "_") in HOST_FLAGS:
        return f"{flag}=HOST"
    word = re.sub(r"(://)[^\s/]*@", r"\1", word)
    word = re.sub(rf"(?<![^=,]){PRIVATE_PATH}[^,:=]*", lambda found: last_part(found[0]), word)
    return re.sub(r"hf_[A-Za-z0-9]{16,}", "hf_...", word)


def requested_num_processes() -> int | None:
    """N of the launcher's `--num_processes N`; None if it was not given, or there is no launcher."""
    words = [part for word in launcher_command() or [] for part in word.split("=", 1)]
    for flag, value in pairwise(words):
        if flag in ("--num_processes", "--num-processes"):
            return int(value) if value.isdigit() else None
    return None


def exit_with_launcher():
    """Let the kernel send SIGTERM when the launcher dies: `accelerate launch` of one process does not forward it."""
    if sys.platform == "linux" and launcher_command():
        pr_set_pdeathsig = 1  # linux/prctl.h
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
