"""What the benchmarks share: whose turn it is, the clock, how a result was measured, and the results file."""

import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from modeling_gpt2repro.runtime.hardware import device_name
from modeling_gpt2repro.storage.atomic import atomic_write

Result = TypeVar("Result")
BySide = dict[str, list[float]]

# Arguments that do not change what is measured: of results that differ in nothing else, the latest is kept.
NOT_SETTINGS = ("rounds", "steps", "stop_after", "output", "data", "runs_dir", "picture", "page", "table")


def sides_in_turn(sides: tuple[str, ...], round_number: int) -> tuple[str, ...]:
    """The sides in the order in which they run in this round: which goes first alternates."""
    return sides if round_number % 2 == 0 else sides[::-1]


@contextmanager
def timed(seconds: list[float], cpu_seconds: list[float]) -> Iterator[None]:
    """Append the seconds that the block takes, and the processor time that this process spends in it."""
    started = time.perf_counter()
    cpu_started = time.process_time()
    yield
    seconds.append(time.perf_counter() - started)
    cpu_seconds.append(time.process_time() - cpu_started)


def process_context() -> multiprocessing.context.BaseContext:
    """For processes in which nothing has been allocated or cached yet. On Linux they start with the imports done."""
    if sys.platform != "linux":  # macOS can fork, but not safely with its own libraries loaded
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train_accelerate"])
    return context


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of a module in a new process."""
    with ProcessPoolExecutor(1, process_context()) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def kept_process(build: Callable[..., Callable[..., Result]], *arguments: Any) -> Iterator[Callable[..., Result]]:
    """Let a new process build something that can be called; yields a function that calls it there and waits.

    Sides that take turns have a process each, because they share neither global state nor the peak of their memory.

    Raises:
        SystemExit: From the call, if the process has died; its error is on stderr.
    """
    context = process_context()
    ours, theirs = context.Pipe()
    process = context.Process(target=answer_calls, args=(theirs, build, arguments), daemon=True)
    process.start()
    theirs.close()  # else there would be no end of file when the process dies

    def call(*request: Any) -> Result:
        try:
            ours.send(request)
            return ours.recv()
        except (EOFError, ConnectionError):
            words = " ".join(map(str, (build.__name__, *arguments[:1])))
            raise SystemExit(f"a process of the benchmark ({words}) died: see its error above.") from None

    try:
        yield call
    finally:
        ours.close()
        process.join()


def answer_calls(connection: Connection, build: Callable[..., Callable], arguments: tuple):
    """In the new process: build, then answer calls until there is nobody left to make them."""
    function = build(*arguments)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(function(*request))


def run_program(module: str, words: list[str]) -> int:
    """What `python -m MODULE WORDS...` does, in a new process; returns its exit code."""
    process = process_context().Process(target=call_main, args=(module, words))
    process.start()
    process.join()
    return process.exitcode


def call_main(module: str, words: list[str]):
    """In the new process."""
    sys.argv = [f"{module.split('.')[-1]}.py", *words]
    import_module(module).main(words)


def quartiles(seconds: BySide, other: str | None = None, ours: str = "ours") -> dict[str, float]:
    """Quartiles, over the rounds, of the other side's time divided by ours: above 1.0 ours is faster.

    Ratios within a round, because a machine that is now fast and now slow is so for both sides.
    """
    if other is None:
        [other] = seconds.keys() - {ours}
    low, median, high = np.quantile(np.divide(seconds[other], seconds[ours]), (0.25, 0.5, 0.75))
    return {"median": float(median), "lower_quartile": float(low), "upper_quartile": float(high)}


def result_header(
    benchmark: str, argv: list[str] | None, args: Any, packages: tuple[str, ...], device: str = "cpu"
) -> dict[str, Any]:
    """How a result is measured. To be called before measuring, which raises the load average.

    Args:
        benchmark: Its module's name.
        argv: As `main` got it: the words after the module's name, or None for those of this process.
        args: The benchmark's dataclass of arguments.
        packages: Whose versions matter.
    """
    words = sys.argv[1:] if argv is None else argv
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None  # not on Windows
    return {
        "command": shlex.join(["python", "-m", f"benchmarks.{benchmark}", *words]),
        "settings": settings_of(args),
        "machine": machine(device) | {"load_average_before": load},
        "versions": versions(packages),
    }


def settings_of(args: Any) -> dict[str, Any]:
    """The arguments that change what is measured, as JSON gives them back."""
    return json.loads(json.dumps({name: v for name, v in asdict(args).items() if name not in NOT_SETTINGS}))


def was_measured(results: list[dict[str, Any]], benchmark: str, args: Any, device: str) -> bool:
    """Whether there is a result with these arguments, from this machine and the installed versions."""
    settings = settings_of(args)
    not_compared = {"load_average_before"} | ({"threads"} & settings.keys())
    now = machine(device)
    return any(
        (benchmark_of(result), result["settings"]) == (benchmark, settings)
        and all(now.get(name) == was for name, was in result["machine"].items() if name not in not_compared)
        and versions([name for name in result["versions"] if name != "python"]) == result["versions"]
        for result in results
    )


def versions(packages: Iterable[str]) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def machine(device: str) -> dict[str, str | int]:
    """What runs it: the processor, by its own name where Linux knows it, its threads, and the GPU if one is used."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor() or platform.machine()
    found = {"cpu": cpu, "threads": torch.get_num_threads(), "system": platform.system()}
    return found | ({"gpu": device_name(torch.device(device))} if device == "cuda" else {})


def machine_name(machine: dict[str, str | int]) -> str:
    """The GPU, or else the processor and its threads."""
    plural = "" if machine["threads"] == 1 else "s"
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} thread{plural}"


def choose_device(args: Any) -> list[str]:
    """Replace `args.device` "auto" by cuda, if there is a GPU, or else cpu; returns what is wrong with it."""
    has_gpu = torch.cuda.is_available()
    if args.device == "auto":
        args.device = "cuda" if has_gpu else "cpu"
    if args.device == "cuda" and not has_gpu:
        return ["--device cuda cannot be used here: torch sees no GPU; give cpu."]
    return []


def benchmark_of(result: dict[str, Any]) -> str:
    """The name of the benchmark that a result is of, from its command."""
    return shlex.split(result["command"])[2].removeprefix("benchmarks.")


def read_results(file: Path) -> list[dict[str, Any]]:
    """What a results file holds; nothing if there is no such file.

    Raises:
        ValueError: If it is damaged.
    """
    if not file.exists():
        return []
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        _ = [
            (benchmark_of(result), *map(result.__getitem__, ("settings", "machine", "versions"))) for result in results
        ]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{file} is not a list of results ({error}): delete it, or give another --output.") from None
    return results


def add_to_file(file: Path, result: dict[str, Any]):
    """Put a result into the file's list, in place of an earlier one of this benchmark with the same settings."""
    of_what = (benchmark_of(result), result["settings"])
    results = [old for old in read_results(file) if (benchmark_of(old), old["settings"]) != of_what]
    with atomic_write(file) as output:
        output.write((json.dumps([*results, result], indent=1) + "\n").encode())
