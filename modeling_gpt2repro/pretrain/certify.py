"""Certify a run: take some of its steps again, and compare them with its log and its checkpoints.

    python train_accelerate.py --output_dir runs/quickstart --certify 5

A curve is a claim. This one can be checked in seconds by anyone who has the run's folder and its data: which sequences
a step trains on follows from seed and step alone (data/batches/shuffled.py), and all else that decides a step is in a
checkpoint or, before step 1, follows from the seed.

    step-000400  ->  step 401  ->  step 402  ->  step 403  ->  step 404
                     batch         batch         batch         batch       a hash of its sequences
                     loss          loss          loss          loss        of the weights that the step before has left
                     norm          norm          norm          norm        of the gradient

Each number must be that of metrics.jsonl. Those of step 404 show that step 403 has changed the weights as it did in the
run. Where there is a checkpoint of step 403, all its weights and moments are compared as well.
"""

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import chain, pairwise, takewhile, zip_longest
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from modeling_gpt2repro.data.batches.build import TrainingData
from modeling_gpt2repro.data.batches.mixture import parse_mix
from modeling_gpt2repro.data.shards.dataset import MANIFEST, open_shards
from modeling_gpt2repro.data.shards.verify import verify_shards
from modeling_gpt2repro.hub.certificate import Certificate
from modeling_gpt2repro.hub.conversion import load_checkpoint_config
from modeling_gpt2repro.runs.config import environment, environment_changes, software_record
from modeling_gpt2repro.runs.folder import DATA_FOLDER, METRICS_FILE, MODEL_FOLDER, checkpoint_name, step_of
from modeling_gpt2repro.runs.metrics import StepMetrics
from modeling_gpt2repro.runs.read import Run, read_metrics, read_run
from modeling_gpt2repro.runs.summary import without_paths
from modeling_gpt2repro.runtime.collectives import run_on_main_and_broadcast
from modeling_gpt2repro.runtime.command_line import exit_on_input_error
from modeling_gpt2repro.runtime.hardware import hardware_record
from modeling_gpt2repro.runtime.progress import escape_controls
from modeling_gpt2repro.runtime.signals import EXIT_CODE, StopSignal
from modeling_gpt2repro.storage.checksums import sha256_of
from modeling_gpt2repro.training import checkpoints
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.checkpoint_checks import WEIGHTS_FILE, checkpoint_problem

from .attention import attention_record
from .checkpointing import Checkpointer, unwrapped_model
from .preflight import StoppedBySignal
from .replay import Replay, has_initial_weights

REACH = 10  # steps after a checkpoint that may be drawn: on the way to a later one, hundreds would have to be repeated
# How far a loss may differ, relative to its size, where not all is as it was: the device, a version, the processes.
# Measured on a CPU with other processes, threads, micro-batches or attention: 2e-7 in fp32, 7e-4 in bf16.
TOLERANCE, TOLERANCE_16_BITS = 1e-4, 5e-3
# How much more others may: gradient norms (2e-7, 0.03), and tensors in checkpoints (6e-5, 0.45: attention's bias, whose
# part for the keys has no effect on the loss, so that nothing but rounding moves it).
MORE_TOLERANCE = {"loss": 1, "validation_loss": 1, "learning_rate": 1, "grad_norm": 20, "tensor": 200}
# The optimizer is built once: steps that had another value of these, before the run was resumed, are not drawn.
DECIDING = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "skip_outliers", "document_mask")
# These change only the order in which numbers are added up, or the kernels.
ROUNDING = ("per_device_train_batch_size", "torch_compile", "deterministic")


@dataclass(frozen=True)
class Window:
    """Steps after a checkpoint that are taken again together, and what the run has recorded about them."""

    start: int  # the step of the checkpoint; 0: the initial weights
    drawn: list[int]  # the steps to certify
    logged: dict[int, dict]  # each step to take -> its line of metrics.jsonl, {} if there is none
    arguments: dict[int, dict]  # each step to take -> the arguments that the run had then
    validation_loss: float | None  # as the run has logged it of the weights at the start; None: not to be compared
    changes: list[str]  # why bits may differ from the run's; [] if all that it has recorded is as it was then


def certify(
    args: TrainArguments,
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    data: TrainingData,
    checkpointer: Checkpointer,
    stop: StopSignal,
    train_step: Callable[..., StepMetrics],
) -> int:
    """Check data and checkpoints, take random steps again, and write what was found into the model's folder.

    Returns:
        The exit code: 0 if all is as the run has recorded it, else 1; EXIT_CODE if a signal ended it.

    Raises:
        SystemExit: With code 2, if something cannot be read or written.
    """
    attention = attention_record(args, accelerator, unwrapped_model(accelerator, model).config)
    here = environment({"hardware": hardware_record(accelerator), "attention": attention, **software_record()})
    with exit_on_input_error():
        run, certificate = run_on_main_and_broadcast(accelerator, lambda: check_files(args, data, here))
        windows = run_on_main_and_broadcast(accelerator, lambda: draw_windows(args, run, certificate))
        replay = Replay(args, accelerator, model, optimizer, data, checkpointer, stop, train_step)
        try:
            for window in windows:
                for line in certify_window(window, replay, certificate):
                    accelerator.print(escape_controls(line, kept="\n"))
        except StoppedBySignal as signal_name:
            accelerator.print(f"Stopped by {signal_name}: nothing is certified, and the run is as it was.")
            return EXIT_CODE
        file = run_on_main_and_broadcast(accelerator, lambda: certificate.write(run.folder))
    accelerator.print(f"\n{escape_controls(certificate.text())}\n\nwritten to   {file}")
    return 1 if certificate.problems else 0


def check_files(args: TrainArguments, data: TrainingData, here: dict) -> tuple[Run, Certificate]:
    """Compare shards, checkpoints and final model with the hashes that were written with them."""
    run = read_run(Path(args.output_dir))
    names = [str(run.folder / DATA_FOLDER)] if args.built_in_text else [args.shards] if args.shards else []
    folders = [open_shards(name).folder for name in (parse_mix(args.mix) if args.mix else names)]  # none of a stream
    hashed = [folder for folder in folders if (folder / MANIFEST).exists()]  # the lecture's own shards have no hashes
    problems = [sentence for folder in hashed for sentence in verify_shards(folder)]
    if run.config.get("data") != data.data_fingerprint:
        problems.append(f"The data are not those that {run.folder} was trained on, or come in another order.")
    kept = []
    for folder in checkpoints.step_folders(run.folder):
        if problem := checkpoint_problem(folder, load_checkpoint_config):
            problems.append(f"{folder.name} {problem}.")
        else:
            kept.append(step_of(folder))
    model_step = max((record["step"] for record in read_metrics(run.folder / MODEL_FOLDER)), default=None)
    if model_step in kept:
        model, checkpoint = (run.folder / name / WEIGHTS_FILE for name in (MODEL_FOLDER, checkpoint_name(model_step)))
        if sha256_of(model) != sha256_of(checkpoint):
            problems.append(f"{model} does not hold the weights of {checkpoint.parent.name}.")
    problems = [without_paths(sentence, run) for sentence in problems]  # the certificate is pushed with the model
    return run, Certificate(args.total_steps, kept, len(hashed) == len(folders) > 0, here, problems)


def draw_windows(args: TrainArguments, run: Run, certificate: Certificate) -> list[Window]:
    """Draw `args.certify` steps out of the first REACH after each checkpoint and the seed, one of each in turn.

    Raises:
        ValueError: If there is no step that can be taken again.
    """
    kept = certificate.checkpoints
    now = asdict(args)
    stretches = [(range(first, last + 1), now | of_stretch) for first, last, of_stretch in run.stretches]
    arguments = {step: of_stretch for steps, of_stretch in stretches for step in steps}
    usable = {step for step, of_step in arguments.items() if all(of_step[name] == now[name] for name in DECIDING)}
    # A run that began with another one's checkpoint has no first step.
    ends = [*([0] if 1 in usable and has_initial_weights(args) else []), *kept, math.inf]
    reachable = {
        start: list(takewhile(usable.__contains__, range(start + 1, min(start + REACH, end) + 1)))
        for start, end in pairwise(ends)
    }
    # What a step does to the weights shows in its own checkpoint, or in the loss of the next step.
    pools = [[step for step in steps if step in kept or step + 1 in usable] for steps in reachable.values()]
    shuffled = random.sample([random.sample(pool, len(pool)) for pool in pools], len(pools))
    drawn = [step for step in chain.from_iterable(zip_longest(*shuffled)) if step is not None][: args.certify]
    if not drawn:
        raise ValueError(
            f"{run.folder} has no step that can be taken again: its first weights are not at hand, and it keeps no "
            "checkpoint but the last; a run that is to be certified takes --keep_every."
        )
    logged = {record["step"]: record for record in run.records if "loss" in record}
    evaluated = {r["step"]: r["validation_loss"] for r in run.records if r.get("validation_loss") is not None}
    last_evaluated = max(evaluated.keys() & set(kept), default=None)
    environment_now = certificate.environment | {name: now[name] for name in ROUNDING}
    windows = []
    for start, steps in reachable.items():
        here = sorted(set(drawn).intersection(steps))
        if here or start == last_evaluated:
            steps = range(start + 1, here[-1] + 1 + (here[-1] not in kept)) if here else ()
            windows.append(
                Window(
                    start,
                    here,
                    logged={step: logged.get(step, {}) for step in steps},
                    arguments={step: arguments[step] for step in steps},
                    validation_loss=evaluated[start] if start == last_evaluated else None,
                    changes=environment_changes(run.config, arguments.get(start + bool(here), now), environment_now),
                )
            )
    return windows


def certify_window(window: Window, replay: Replay, certificate: Certificate) -> list[str]:
    """Take the steps of a window again, and note in the certificate what was found; returns the same for people."""
    tolerance = 0.0
    changes = window.changes
    if not torch.are_deterministic_algorithms_enabled():
        changes = [*changes, "the run is not --deterministic"]
    if changes:
        precisions = (replay.accelerator.mixed_precision, *changes)  # such as "precision bf16, now no"
        tolerance = TOLERANCE_16_BITS if any("bf16" in text or "fp16" in text for text in precisions) else TOLERANCE
    begin = "the model of --init_from" if replay.args.init_from else "the seed"
    origin = checkpoint_name(window.start) if window.start else begin
    problems: dict[int, str] = {}  # step -> what is not as it was

    def check(step: int, kind: str, difference: float, sentence: str):
        if difference <= tolerance * MORE_TOLERANCE.get(kind, 0):
            certificate.differences[kind] = max(difference, certificate.differences.get(kind, 0.0))
        else:  # or NaN
            problems.setdefault(step, f"step {step}: {sentence}")

    replay.restore(window.start)
    if (then := window.validation_loss) is not None:
        loss = replay.validation_loss()
        sentence = f"validation_loss is {then} in {METRICS_FILE}, and {loss} by the weights of {origin}"
        check(window.start, "validation_loss", relative_difference(then, loss), sentence)
        certificate.validation = {"step": window.start, "logged": then, "found": loss}
    for step, found in replay.take_steps(window.arguments):
        logged = window.logged[step]
        if not logged:
            check(step, "line", math.inf, f"{METRICS_FILE} has no line of it")
        for name, now in found.items():
            if name in logged or name != "batch_hash":  # older versions did not log it
                sentence = f"{name} is {logged.get(name)} in {METRICS_FILE}, and {now} in the replay from {origin}"
                check(step, name, relative_difference(logged.get(name), now), sentence)
        if step in certificate.checkpoints:
            for name, difference in replay.differences_from_checkpoint(step).items():
                sentence = f"{name} in {checkpoint_name(step)} is not that of the replay from {origin}"
                check(step, "tensor", difference, f"{sentence} (the difference has {difference:.1e} of its norm)")
    failed = min(problems, default=math.inf)
    lines = []
    for step in window.drawn:
        is_kept = step in certificate.checkpoints
        if step < failed and (is_kept or step + 1 < failed):
            update_in = f"checkpoint {checkpoint_name(step)}" if is_kept else f"loss of step {step + 1}"
            loss = window.logged[step]["loss"]
            certificate.steps.append({"step": step, "from": origin, "loss": loss, "update_in": update_in})
            lines.append(f"step {step:>6}  loss {loss} reproduced from {origin}, and its update by the {update_in}")
    if problems:
        is_line = not tolerance and len(problems) == 1 and window.start < failed < max(window.logged)
        hint = "; all is as logged after it, so that line has been changed" if is_line else ""
        lines.append(f"{problems[failed]}{hint}.")
        certificate.problems.append(lines[-1])
    certificate.replayed_steps += len(window.logged)
    certificate.changes += [change for change in changes if change not in certificate.changes]
    certificate.tolerance = max(certificate.tolerance, tolerance)
    return lines


def relative_difference(then: float | str | None, now: float | str) -> float:
    """0 for what is equal, 1 for 2.0 and 1.0; infinity where nothing can be measured."""
    if then == now or (then is None and isinstance(now, float) and not math.isfinite(now)):  # which are null in JSON
        return 0.0
    return abs(then / now - 1) if isinstance(then, float | int) and now else math.inf
