"""Python processes that start with their imports done, for what has to run in a process of its own.

A fresh interpreter takes four seconds to import what the scripts need, and the tests start some thirty. The fork server
of multiprocessing imports it once and forks them; elsewhere than on Linux each one imports for itself.
"""

import gc
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest.mock import patch

from patience import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = [
    "pytest",  # multiprocessing imports the main program of its parent
    "datasets",
    "torch.distributed.fsdp",
    "eval_hellaswag",
    "prepare_data",
    "train_accelerate",
]


@dataclass(frozen=True)
class WarmPython:
    """Runs Python's command lines: -c PROGRAM, -m MODULE or a script, and its arguments.

    Each has `environment`, and what a test adds; but variables that are read while importing, such as HF_*, are fixed.
    A test about imports needs a fresh interpreter instead.
    """

    environment: dict[str, str]

    def run(
        self, *words, cwd: Path = ROOT, check: bool = True, stdin: str = "", **more: str
    ) -> subprocess.CompletedProcess:
        """One process; `more` is added to its environment. `check`: its exit code must be 0."""
        return self.run_together(1, *words, cwd=cwd, check=check, stdin=stdin, **more)[0]

    @contextmanager
    def start(self, *words, cwd: Path = ROOT, **more: str) -> Iterator[tuple[multiprocessing.Process, Path]]:
        """One process that runs beside the block, and the file with its stderr; killed at the end."""
        with TemporaryDirectory() as folder:
            with patch.dict(os.environ, self.environment, clear=True):
                process = _start(list(map(str, words)), str(cwd), more, str(Path(folder, "0")))
            try:
                yield process, Path(folder, "0.err")
            finally:
                process.kill()
                process.join()

    def run_together(
        self, processes: int, *words, cwd: Path = ROOT, check: bool = True, stdin: str = "", **more: str
    ) -> list[subprocess.CompletedProcess]:
        """The same in several processes, which find each other as those of torchrun do; by rank."""
        words = list(map(str, words))
        with TemporaryDirectory() as folder:
            # `spawn` passes on the environment of this moment, the fork server keeps the one of its start.
            with patch.dict(os.environ, self.environment, clear=True):
                started = [
                    _start(words, str(cwd), more | ranked, str(Path(folder, f"{rank}")), stdin)
                    for rank, ranked in enumerate(_ranks(processes))
                ]
            for process in started:
                process.join(PATIENCE_SECONDS)
            late = [process for process in started if process.is_alive()]
            for process in late:
                process.kill()
                process.join()
            ended = [
                subprocess.CompletedProcess(words, process.exitcode, *_outputs(Path(folder, f"{rank}")))
                for rank, process in enumerate(started)
            ]
        assert not late, f"still there after {PATIENCE_SECONDS} seconds: {ended}"
        assert not check or not any(process.returncode for process in ended), "\n".join(p.stderr for p in ended)
        return ended


def _ranks(processes: int) -> list[dict[str, str]]:
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    return [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def _start(
    words: list[str], cwd: str, environment: dict[str, str], output: str, stdin: str = ""
) -> multiprocessing.Process:
    forks = sys.platform == "linux"  # macOS can, but not safely with its own libraries loaded
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    if forks:
        context.set_forkserver_preload(IMPORTED)
    process = context.Process(target=_run, args=(words, cwd, environment, output, stdin))
    process.start()
    return process


def _outputs(path: Path) -> list[str]:
    """What a process has written to stdout and stderr."""
    return [path.with_suffix(kind).read_text(encoding="utf-8") for kind in (".out", ".err")]


def _run(words: list[str], cwd: str, environment: dict[str, str], output: str, stdin: str):
    """In the new process: what `python WORDS...` does."""
    Path(output + ".in").write_bytes(stdin.encode())
    os.dup2(os.open(output + ".in", os.O_RDONLY), 0)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)
    for descriptor, kind in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(output + kind, os.O_WRONLY | os.O_CREAT), descriptor)
    gc.freeze()  # the imports are not garbage
    os.environ.update(environment)
    os.chdir(cwd)
    kind, *arguments = words
    if kind not in ("-c", "-m"):
        sys.argv[:] = words
        sys.path.insert(0, os.path.dirname(kind))
        runpy.run_path(kind, run_name="__main__")
        return
    sys.argv[:] = [kind, *arguments[1:]]
    sys.path.insert(0, cwd)
    if kind == "-m":
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
