"""The command that started this run: `accelerate launch` or `torchrun`, where one of them is the parent."""

import ctypes
import shlex
import signal
import sys
from pathlib import Path

import psutil

LAUNCHERS = ("accelerate", "accelerate-launch", "torchrun", "accelerate.commands.launch", "torch.distributed.run")


def launcher() -> list[str] | None:
    """The words of the launcher that is this process's parent; None where there is none."""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # not ours to look at, or gone
        return None
    return words if any(Path(word).name in LAUNCHERS for word in words[:4]) else None


def resume_command() -> str:
    """The command that this run was started by, with `--resume_from_checkpoint latest`."""
    words = list(launcher() or sys.orig_argv)
    if words[1:2] and Path(words[1]).name in LAUNCHERS:
        del words[0]  # the interpreter of an installed launcher
    words[0] = Path(words[0]).name
    if "--resume_from_checkpoint" in words:
        place = words.index("--resume_from_checkpoint")
        del words[place : place + 2]
    return shlex.join([*words, "--resume_from_checkpoint", "latest"])


def exit_with_launcher():
    """Let the kernel send SIGTERM when the launcher dies: `accelerate launch` of one process does not pass it on."""
    if sys.platform == "linux" and launcher():
        death_signal = 1  # PR_SET_PDEATHSIG, linux/prctl.h
        ctypes.CDLL(None).prctl(death_signal, signal.SIGTERM)


def requested_num_processes() -> int | None:
    """What the launcher was told by `--num_processes N`; None where it was not, or there is none."""
    words = [word for given in launcher() or [] for word in given.split("=", 1)]
    flags = [place for place, word in enumerate(words[:-1]) if word in ("--num_processes", "--num-processes")]
    number = words[flags[0] + 1] if flags else ""
    return int(number) if number.isdigit() else None
