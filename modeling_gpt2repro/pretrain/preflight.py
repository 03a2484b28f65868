"""What a run will take, measured on its first steps: time, memory, disk, money."""

import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, is_compiled_module
from torch import nn
from torch.optim import Optimizer

from modeling_gpt2repro.data.batches.build import TrainingData
from modeling_gpt2repro.data.batches.read_ahead import ReadAhead
from modeling_gpt2repro.evaluation.hellaswag.metrics import evaluate_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.tokenize import HellaSwagTask
from modeling_gpt2repro.evaluation.stories import score_stories
from modeling_gpt2repro.evaluation.validation import validation_loss
from modeling_gpt2repro.runs.logger import RunLogger
from modeling_gpt2repro.runs.metrics import StepMetrics
from modeling_gpt2repro.runtime.accelerator import nondeterministic
from modeling_gpt2repro.runtime.command_line import exit_with_errors
from modeling_gpt2repro.runtime.hardware import peak_memory_gb, readable_bytes, readable_duration
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.runtime.signals import EXIT_CODE, StopSignal
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.checkpoints import PREFLIGHT_NAME, RetentionPolicy
from modeling_gpt2repro.training.optimization import scheduled_learning_rate, set_learning_rate

from .checkpointing import Checkpointer, unsharded_model
from .messages import cannot_save_message, table
from .setup import log_run_summary, prepare_hellaswag_task

WARMUP_STEPS = 3
TIMED_STEPS = 10
EVALUATED_PART = 100  # HellaSwag examples, and validation batches, from which a whole evaluation is extrapolated


class StoppedBySignal(Exception):
    """Carries the name of the signal that one of the processes has received."""


@dataclass(frozen=True)
class StepTimings:
    """What a preflight has measured, in seconds unless stated otherwise."""

    first_step: float  # with compilation
    step: float  # median
    data: float  # median of a step's wait for data
    evaluation: float  # a whole one, extrapolated from a part of it
    save: float  # of one checkpoint
    checkpoint_bytes: int
    memory_gb: float  # the peak of one process, in 10**9 bytes
    step_not_deterministic: float | None = None  # a step without --deterministic; None if the run is without it anyway


def preflight(
    args: TrainArguments,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    data: TrainingData,
    hellaswag: HellaSwagTask | None,
    checkpointer: Checkpointer,
    logger: RunLogger,
    stop: StopSignal,
    train_step: Callable[..., StepMetrics],
) -> int:
    """Take some steps, a part of an evaluation and a save, keep none of it, and report what the whole run will take.

    Returns:
        The exit code: 0 if nothing prevents the run, else 1; EXIT_CODE if a signal to any process ended the preflight.

    Raises:
        SystemExit: With code 2, if the data cannot be read.
    """
    log_run_summary(args, accelerator, model, optimizer, data, checkpointer.state.step, logger)
    skipped = []
    last_step = checkpointer.state.step + 2 * (WARMUP_STEPS + TIMED_STEPS)  # perhaps beyond the run's last
    reader = ReadAhead(data.batches, last_step, is_stopping=stop.is_requested)  # as the run reads them

    def take_step() -> float:
        """One step, waited for; returns how long it waited for data."""
        step = checkpointer.state.step
        set_learning_rate(optimizer, scheduled_learning_rate(args.schedule, step))
        raise_if_stopped(stop, reader.wait_for(step))
        metrics = train_step(
            accelerator,
            model,
            optimizer,
            reader.micro_batches(step),
            tokens_per_step=args.tokens_per_step,
            max_grad_norm=args.max_grad_norm,
            detector=checkpointer.stateful["guard"],
        )
        checkpointer.state.advance(args.tokens_per_step)
        skipped.append(bool(metrics.skipped) and not metrics.overflowed)  # waits for the device
        return reader.waited_seconds

    nondeterministic_median = None
    try:
        with closing(reader):
            first, median, waited = time_steps(take_step)
            if torch.are_deterministic_algorithms_enabled():
                with nondeterministic(compiled=is_compiled_module(model)):
                    _, nondeterministic_median, _ = time_steps(take_step)
        raise_if_stopped(stop)
        evaluation_seconds = time_evaluation(args, accelerator, model, data, hellaswag)
        raise_if_stopped(stop)
    except StoppedBySignal as signal_name:
        logger.print(f"The preflight was stopped by {signal_name}, and nothing of it is kept.")
        return EXIT_CODE
    memory_gb = peak_memory_gb(accelerator.device)
    folder = Path(args.output_dir) / PREFLIGHT_NAME
    started = time.perf_counter()
    save_problem = checkpointer.write(folder, RetentionPolicy())
    save_seconds = time.perf_counter() - started
    if not accelerator.is_main_process:
        return 0
    measured = StepTimings(
        first_step=first,
        step=median,
        data=waited,
        evaluation=evaluation_seconds,
        save=save_seconds,
        checkpoint_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        memory_gb=memory_gb,
        step_not_deterministic=nondeterministic_median,
    )
    shutil.rmtree(folder, ignore_errors=True)
    report, problems = preflight_report(args, measured, logger.flops_per_token, logger.peak_flops)
    if save_problem:
        problems.append(cannot_save_message(args, save_problem))
    if any(skipped):
        problems.append(
            f"the loss or the gradient norm of {sum(skipped)} of {len(skipped)} steps was not usable: try a lower "
            f"--learning_rate than {args.learning_rate}, or look at the data."
        )
    logger.print("\n".join([report, *problems]))
    return 1 if problems else 0


def raise_if_stopped(stop: StopSignal, problem: str | None = None):
    """Return unless a process has received a signal, or cannot read its data. All must call this equally often.

    Raises:
        StoppedBySignal: In the first case.
        SystemExit: With code 2, in the second.
    """
    if stop.should_stop(problem):
        problems, signal_names = zip(*gather_object([(stop.problem, stop.signal_name)]), strict=True)
        if any(signal_names):
            raise StoppedBySignal(next(filter(None, signal_names)))
        exit_with_errors([next(filter(None, problems))])


def time_steps(take_step: Callable[[], float]) -> tuple[float, float, float]:
    """Seconds of the first step, the median of ten later ones, and the median of their waits for data.

    Args:
        take_step: Takes a step, waits for the device, and returns how long it waited for data.
    """
    seconds = []
    waits = []
    for _ in range(WARMUP_STEPS + TIMED_STEPS):
        started = time.perf_counter()
        waits.append(take_step())
        seconds.append(time.perf_counter() - started)
    return seconds[0], statistics.median(seconds[WARMUP_STEPS:]), statistics.median(waits[WARMUP_STEPS:])


def time_evaluation(
    args: TrainArguments,
    accelerator: Accelerator,
    model: nn.Module,
    data: TrainingData,
    hellaswag: HellaSwagTask | None,
) -> float:
    """Seconds of a whole evaluation, extrapolated from a part of it."""
    module = unsharded_model(accelerator, model)
    batch_size = args.per_device_eval_batch_size or args.per_device_train_batch_size
    part = min(args.eval_tokens, EVALUATED_PART * batch_size * args.block_size * accelerator.num_processes)
    started = time.perf_counter()
    with accelerator.autocast():
        validation_loss(ModelWithLoss(module), data.validation_batches(part, batch_size), accelerator.device)
        seconds = (time.perf_counter() - started) * args.eval_tokens / part
        started = time.perf_counter()
        score_stories(module, data.tokenizer, data.stories, accelerator.device)
    seconds += time.perf_counter() - started
    if hellaswag is not None:
        examples = hellaswag.examples[:EVALUATED_PART]
        started = time.perf_counter()
        evaluate_hellaswag(module, prepare_hellaswag_task(accelerator, module, data.tokenizer, examples))
        seconds += (time.perf_counter() - started) * len(hellaswag.examples) / len(examples)
    return seconds


def whole_run_seconds(args: TrainArguments, measured: StepTimings) -> dict[str, float]:
    """Part of the run -> seconds. Evaluations: at step 0, every `eval_steps`, and at the end."""
    evaluations = 2 + ((args.total_steps - 1) // args.eval_steps if args.eval_steps else 0)
    return {
        "training": measured.first_step + measured.step * (args.total_steps - 1),
        "evaluation": measured.evaluation * evaluations,
        "saving": measured.save * number_of_saves(args),
    }


def number_of_saves(args: TrainArguments) -> int:
    """Checkpoints of a run: every `save_steps`, and at the end."""
    return 1 + ((args.total_steps - 1) // args.save_steps if args.save_steps else 0)


def disk_bytes(args: TrainArguments, checkpoint_bytes: int) -> int:
    """The most that the run's folder will hold: what is kept, the one that is being written, and the final model."""
    saves = number_of_saves(args)
    kept = min(saves, args.save_total_limit) if args.save_total_limit else saves
    milestones = args.total_steps // args.keep_every if args.keep_every else 0
    return (kept + milestones + 2) * checkpoint_bytes


def preflight_report(
    args: TrainArguments, measured: StepTimings, flops_per_token: int, peak_flops: float | None
) -> tuple[str, list[str]]:
    """The table to print, and what prevents the run, a sentence each."""
    parts = whole_run_seconds(args, measured)
    total_seconds = sum(parts.values())
    tokens_per_second = args.tokens_per_step / measured.step
    needed = disk_bytes(args, measured.checkpoint_bytes)
    free = shutil.disk_usage(Path(args.output_dir)).free
    mfu = "unknown: the peak of a CPU is not in the table"
    if peak_flops:
        mfu = f"{tokens_per_second * flops_per_token / peak_flops:.1%} of {peak_flops / 1e12:,.0f} TFLOP/s"
    lines = {
        "a step": f"{1000 * measured.step:,.0f} ms for {args.tokens_per_step:,} tokens; the first, with compilation, "
        f"{measured.first_step:.1f} s",
        "speed": f"{tokens_per_second:,.0f} tokens/s; {1000 * measured.data:,.1f} ms of a step are waiting for data",
        "MFU": mfu,
        "memory": f"{readable_bytes(1e9 * measured.memory_gb)} at most on one process",
        "evaluation": f"{readable_duration(measured.evaluation)} each",
        "a checkpoint": f"{readable_bytes(measured.checkpoint_bytes)} in {measured.save:.1f} s",
        "disk": f"{readable_bytes(needed)} at most, {readable_bytes(free)} free",
        "whole run": f"{readable_duration(total_seconds)}: "
        + ", ".join(f"{name} {readable_duration(seconds)}" for name, seconds in parts.items()),
    }
    if measured.step_not_deterministic:
        lines["bits"] = (
            f"the same each time; without --deterministic a step takes {1000 * measured.step_not_deterministic:,.0f} ms"
        )
    if args.price_per_hour:
        cost = total_seconds / 3600 * args.price_per_hour
        lines["cost"] = f"{cost:,.2f} at {args.price_per_hour:g} an hour"
    problems = []
    if needed > free:
        problems.append(
            f"output_dir ({args.output_dir}) has {readable_bytes(free)} free, and the run needs "
            f"{readable_bytes(needed)}: free some space, or keep fewer checkpoints than --save_total_limit "
            f"{args.save_total_limit}."
        )
    return table(lines), problems
