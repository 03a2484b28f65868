"""A program that holds the lock of a folder, and what a second one sees of it."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS

from modeling_gpt2repro.storage.lock import LOCK_FILE, FolderLock

ROOT = Path(__file__).parents[2]

# Holds the lock until its standard input ends; a line of input is run as Python.
HOLDER = """
import errno, fcntl, os, signal, socket, subprocess, sys, time
from pathlib import Path
from modeling_gpt2repro.storage import lock
lock.BEAT_SECONDS = 0.05
attempts = [0]
beat = lock.FolderLock._beat

def counted(held):
    attempts[0] += 1
    beat(held)

lock.FolderLock._beat = counted
{before}
with lock.FolderLock(Path(sys.argv[1])) as held:
    held.acquire()
    print("held", flush=True)
    for line in sys.stdin:
        exec(line)
        print("done", flush=True)
"""


@contextmanager
def holder(folder: Path, before: str = ""):
    """A process that holds the lock of `folder`."""
    command = [sys.executable, "-c", HOLDER.replace("{before}", before), str(folder)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": path, "GPT2REPRO_LAZY": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        try:
            assert process.stdout.readline() == "held\n", process.stderr.read()
            yield process
        finally:
            process.kill()


def run_in(process, line: str):
    process.stdin.write(line + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == "done\n", process.stderr.read()


def refused(folder: Path, patience_seconds: float = PATIENCE_SECONDS) -> str:
    """The message to a second program."""
    with FolderLock(folder, patience_seconds) as second, pytest.raises(ValueError, match="in use") as error:
        second.acquire()
    message = str(error.value)
    assert "\n" not in message
    return message


def acquired(folder: Path, patience_seconds: float = PATIENCE_SECONDS):
    """Take the lock, see that the record is this program's, and release it."""
    with FolderLock(folder, patience_seconds) as held:
        held.acquire()
        assert json.loads((folder / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert list(folder.iterdir()) == []


def wait_for_beats(process):
    run_in(process, "beats = attempts[0]")
    run_in(process, "while attempts[0] < beats + 4: time.sleep(0.01)")


def record_of(folder: Path) -> dict:
    return json.loads((folder / LOCK_FILE).read_text())


def end_quietly(process):
    """Let the holder end as programs do: without a message, and with exit code 0."""
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
