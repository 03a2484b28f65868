"""What a run will take, from its first steps: time, memory, disk, money."""

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from modeling_gpt2repro.runtime.hardware import readable_bytes, readable_duration
from modeling_gpt2repro.training.arguments import TrainArguments

WARM_STEPS, TIMED_STEPS = 3, 10


@dataclass(frozen=True)
class StepTimings:
    """What a preflight has measured, in seconds unless it says so.

    Args:
        first_step: With compilation.
        step, data: Medians of a step, and of what it waited for data.
        evaluation: Of one whole evaluation, from a part of it.
        save: Of one checkpoint.
        checkpoint_bytes: Its size.
        memory_gb: The most that one process has used, in 10**9 bytes.
        step_not_deterministic: A step without --deterministic; None where the run goes without it.
    """

    first_step: float
    step: float
    data: float
    evaluation: float
    save: float
    checkpoint_bytes: int
    memory_gb: float
    step_not_deterministic: float | None = None


def time_steps(take_step: Callable[[], float]) -> tuple[float, float, float]:
    """Seconds of the first step, the median of ten later ones, and the median of what they waited for data.

    Args:
        take_step: Takes a step, waits for the device, and returns how long it waited for data.
    """
    seconds, waits = [], []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        started = time.perf_counter()
        waits.append(take_step())
        seconds.append(time.perf_counter() - started)
    return seconds[0], statistics.median(seconds[WARM_STEPS:]), statistics.median(waits[WARM_STEPS:])


def whole_run_seconds(args: TrainArguments, measured: StepTimings) -> dict[str, float]:
    """Part of the run -> seconds. Evaluations: at step 0, every `eval_steps`, and at the end."""
    evaluations = 2 + ((args.total_steps - 1) // args.eval_steps if args.eval_steps else 0)
    saves = 1 + ((args.total_steps - 1) // args.save_steps if args.save_steps else 0)
    return {
        "training": measured.first_step + measured.step * (args.total_steps - 1),
        "evaluation": measured.evaluation * evaluations,
        "saving": measured.save * saves,
    }


def disk_bytes(args: TrainArguments, checkpoint_bytes: int) -> int:
    """The most that the run's folder will hold: what stays, the one that is being written, and the result."""
    saves = 1 + ((args.total_steps - 1) // args.save_steps if args.save_steps else 0)
    kept = min(saves, args.save_total_limit) if args.save_total_limit else saves
    milestones = args.total_steps // args.keep_every if args.keep_every else 0
    return (kept + milestones + 2) * checkpoint_bytes


def preflight_report(
    args: TrainArguments, measured: StepTimings, flops_per_token: int, peak_flops: float | None, epochs: float | None
) -> tuple[str, list[str]]:
    """The table that a person reads, and what stands in the way of the run, a sentence each."""
    parts = whole_run_seconds(args, measured)
    total, rate = sum(parts.values()), args.tokens_per_step / measured.step
    needed = disk_bytes(args, measured.checkpoint_bytes)
    free = shutil.disk_usage(Path(args.output_dir)).free
    mfu = "unknown: the peak of a CPU is not in the table"
    if peak_flops:
        mfu = f"{rate * flops_per_token / peak_flops:.1%} of {peak_flops / 1e12:,.0f} TFLOP/s"
    lines = {
        "a step": f"{1000 * measured.step:,.0f} ms for {args.tokens_per_step:,} tokens; the first, with compilation, "
        f"{measured.first_step:.1f} s",
        "speed": f"{rate:,.0f} tokens/s; {1000 * measured.data:,.1f} ms of a step are waiting for data",
        "MFU": mfu,
        "memory": f"{readable_bytes(1e9 * measured.memory_gb)} at most on one process",
        "evaluation": f"{readable_duration(measured.evaluation)} each",
        "a checkpoint": f"{readable_bytes(measured.checkpoint_bytes)} in {measured.save:.1f} s",
        "disk": f"{readable_bytes(needed)} at most, {readable_bytes(free)} free",
        "epochs": "unknown: streamed" if epochs is None else f"{epochs:.2f} of the training data",
        "whole run": f"{readable_duration(total)}: "
        + ", ".join(f"{name} {readable_duration(seconds)}" for name, seconds in parts.items()),
    }
    if measured.step_not_deterministic:
        lines["bits"] = (
            f"the same each time; without --deterministic a step takes {1000 * measured.step_not_deterministic:,.0f} ms"
        )
    if args.price_per_hour:
        lines["cost"] = f"{total / 3600 * args.price_per_hour:,.2f} at {args.price_per_hour:g} an hour"
    problems = []
    if needed > free:
        problems.append(
            f"output_dir ({args.output_dir}) has {readable_bytes(free)} free, and the run needs "
            f"{readable_bytes(needed)}: make room, or keep fewer checkpoints than --save_total_limit "
            f"{args.save_total_limit}."
        )
    return "".join(f"{name:<12} {value}\n" for name, value in lines.items()), problems
