"""What the benchmarks share: whose turn it is, the clock, how a result was measured, and the results file."""

import json
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from modeling_gpt2repro.runtime.hardware import device_name

Result = TypeVar("Result")
BySide = dict[str, list[float]]

# Arguments that do not change what is measured: of results that differ in nothing else, the latest is kept.
NOT_SETTINGS = ("rounds", "steps", "seconds", "output", "data", "runs_dir", "picture", "page")


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


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of a module in a new interpreter, where nothing has been allocated or cached yet."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def quartiles(seconds: BySide) -> dict[str, float]:
    """Quartiles, over the rounds, of the other side's time divided by ours: above 1.0 ours is faster.

    Ratios within a round, because a machine that is now fast and now slow is so for both sides.
    """
    [other] = seconds.keys() - {"ours"}
    low, median, high = np.quantile(np.divide(seconds[other], seconds["ours"]), (0.25, 0.5, 0.75))
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
        "settings": {name: value for name, value in asdict(args).items() if name not in NOT_SETTINGS},
        "machine": machine(device) | {"load_average_before": load},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


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
    return machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"


def add_to_file(file: Path, result: dict[str, Any]):
    """Put a result into the file's list, in place of an earlier one with the same settings."""
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    results = [old for old in results if old["settings"] != result["settings"]] + [result]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
