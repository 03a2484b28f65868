"""The lecture's ladder of speed, climbed on your machine: each rung adds one thing to those below it.

    python -m benchmarks.speed_ladder                  # on a CPU a small model, minutes; on a GPU GPT-2 124M, B=16
    python -m benchmarks.speed_ladder --picture a.png

Karpathy's "Let's reproduce GPT-2 (124M)" makes a step of 16 x 1,024 tokens on an A100 eleven times as fast. Here the
same model (peers/lecture_gpt.py) in the same loop goes the same way, and the last rung is what `train_accelerate.py`
runs: the loss without the logits, no waiting for the device within a step, and the vocabulary as it is in the file.

All rungs begin with the same weights and see the same sequences. They take turns, and in every other round in reverse
order; times are medians of the rounds, gains medians of the rounds' ratios. A rung whose losses are not the first one's
ends the program: it would be fast at something else.

A rung that a device does not have keeps its place and says so. bf16 on a processor that emulates it is shown, and not
built upon: ten times slower, it would hide what the other rungs gain, and what it teaches is the lecture's own lesson,
to measure a change before keeping it.
"""

import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from benchmarks.harness import (
    BySide,
    add_to_file,
    choose_device,
    machine_name,
    quartiles,
    result_header,
    sides_in_turn,
    timed,
)
from benchmarks.peers.lecture_gpt import LectureGPT, lecture_loss
from benchmarks.reports.ladder import MARKERS, draw, table
from benchmarks.reports.page import split_page, write_into_page
from benchmarks.training_step import (
    BATCH_ROWS,
    FLOPS_CONVENTION,
    LOSS_TOLERANCE,
    SHAPES,
    WARMUP_STEPS,
    Step,
    build_our_step,
    build_plain_step,
    draw_step,
    initial_weights,
    shape_flops,
)
from modeling_gpt2repro.runs.plots import save_figure
from modeling_gpt2repro.runtime.command_line import arg, check_limits, exit_on_input_error, parse_command_line
from modeling_gpt2repro.runtime.hardware import cpu_lacks_bf16

ALIGNMENT = 64  # 50257 -> 50304, the lecture's
LECTURE = "https://youtu.be/l8pRSuU81PU"
# Milliseconds of a step of 16 x 1,024 tokens of GPT-2 124M on an A100, from the titles of the lecture's chapters
# (1:22:18 to 2:26:21), by the name of the rung.
LECTURE_MS = {
    "fp32": 1000,
    "TF32": 333,
    "bf16": 300,
    "compile": 130,
    "flash attention": 96,
    "aligned vocabulary": 93,
    "fused AdamW": 90,
}
LECTURE_TOKENS = 16 * 1024


@dataclass
class BenchmarkArguments:
    shape: Literal["auto", "toy", "tiny", "small", "124m"] = arg(
        default="auto", help="auto: small on a CPU, 124m on a GPU."
    )
    batch_rows: int | None = arg(
        default=None, minimum=1, help="Sequences of a step; by shape and device, if not given."
    )
    rounds: int = arg(default=5, minimum=1, help="How often the rungs take turns.")
    steps: int = arg(default=2, minimum=1, help="Optimizer steps a turn.")
    compile: bool = arg(default=True, help="Climb the rung of torch.compile, which takes most of the minutes.")
    clock: Literal["wall", "processor"] = arg(
        default="wall",
        help="processor: time of this process, for a CPU that other programs keep busy; take one thread.",
    )
    device: Literal["auto", "cpu", "cuda"] = arg(default="auto", help="auto: CUDA if there is a GPU.")
    picture: str | None = arg(default=None, help="Draw the ladder, .png or .svg.")
    page: str | None = arg(default=None, help="Write the table into this page, between its markers.")
    output: str | None = arg(default=None, help="Add the result to this JSON file (a list of results).")

    def __post_init__(self):
        problems = [*check_limits(self), *choose_device(self)]
        if self.picture and Path(self.picture).suffix not in (".png", ".svg"):
            problems.append(f"picture ({self.picture}) must end in .png or .svg.")
        if self.device == "cuda" and self.clock == "processor":
            problems.append("--clock processor cannot be used on a GPU, whose time it does not count; give wall.")
        if problems:
            raise ValueError("\n".join(problems))
        if self.shape == "auto":
            self.shape = "124m" if self.device == "cuda" else "small"
        self.batch_rows = self.batch_rows or BATCH_ROWS[self.device][self.shape]

    @property
    def tokens_per_step(self) -> int:
        return self.batch_rows * SHAPES[self.shape]["n_positions"]


@dataclass(frozen=True)
class Rung:
    """What the step of a rung consists of; `note`: why it is not measured, or not built upon."""

    name: str
    matmul_precision: Literal["highest", "high"] = "highest"
    dtype: Literal["fp32", "bf16"] = "fp32"
    compiled: bool = False
    fused_attention: bool = False
    aligned: bool = False
    fused_optimizer: bool = False
    ours: bool = False
    exists: bool = True
    note: str = ""


@dataclass(frozen=True)
class Machine:
    """What this one has: bf16 is what it computes, not what it emulates."""

    tf32: bool
    bf16: bool
    compiler: bool

    @classmethod
    def of(cls, device: str) -> "Machine":
        if device == "cuda":
            ampere = torch.cuda.get_device_capability() >= (8, 0)
            return cls(ampere, torch.cuda.is_bf16_supported(including_emulation=False), True)
        compilers = (os.environ.get("CXX") or "g++", "clang++", "cl")
        return cls(False, not cpu_lacks_bf16(), any(map(shutil.which, compilers)))


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    with exit_on_input_error():
        if args.page:
            split_page(Path(args.page), MARKERS)  # an error comes now, not after minutes
    header = result_header("speed_ladder", argv, args, ("torch", "transformers", "accelerate"), device=args.device)
    rungs = list(plan(Machine.of(args.device), args.compile))
    try:
        seconds, losses = climb(args, [rung for rung in rungs if rung.exists])
    except torch.OutOfMemoryError:
        raise SystemExit(
            f"{args.batch_rows} sequences a step do not fit into the GPU's memory: give a smaller --batch_rows."
        ) from None
    check_losses(args, rungs, losses)
    result = header | {
        "tokens_per_step": args.tokens_per_step,
        "flops": {"per_step": args.tokens_per_step * shape_flops(args.shape), "convention": FLOPS_CONVENTION},
        "rungs": list(records(args, rungs, seconds, losses)),
        "total_gain": quartiles(seconds, "fp32", "ours"),
        "lecture": {"ms": LECTURE_MS, "tokens_per_step": LECTURE_TOKENS, "source": LECTURE},
    }
    report(args, result)
    if args.output:
        add_to_file(Path(args.output), result)
    if args.picture:
        save_figure(draw(result), Path(args.picture))
    if args.page:
        write_into_page(Path(args.page), MARKERS, table(result))


def plan(machine: Machine, compiled: bool = True) -> Iterator[Rung]:
    """The rungs from the lowest to the highest."""
    rung = Rung("fp32")
    yield rung
    if machine.tf32:
        rung = replace(rung, name="TF32", matmul_precision="high")
        yield rung
    else:
        yield replace(rung, name="TF32", exists=False, note="same as fp32 here")
    if machine.bf16:
        rung = replace(rung, name="bf16", dtype="bf16")
        yield rung
    else:
        yield replace(rung, name="bf16", dtype="bf16", note="emulated here, so the next rungs are in fp32")
    if machine.compiler and compiled:
        rung = replace(rung, name="compile", compiled=True)
        yield rung
    else:
        reason = "left out" if machine.compiler else "no C++ compiler here"
        yield replace(rung, name="compile", exists=False, note=f"{reason}: the next rungs are eager")
    for name, change in (
        ("flash attention", {"fused_attention": True}),
        ("aligned vocabulary", {"aligned": True}),
        ("fused AdamW", {"fused_optimizer": True}),
        ("ours", {"ours": True}),
    ):
        rung = replace(rung, name=name, **change)
        yield rung


def build_rung(rung: Rung, args: BenchmarkArguments, weights: dict[str, torch.Tensor]) -> Step:
    """The step of a rung, its model on the device."""
    shape = SHAPES[args.shape]
    setting = {"device": args.device, "dtype": rung.dtype, "compiled": rung.compiled}
    if rung.ours:
        return build_our_step(shape, micro_batches=1, **setting)
    vocab_size = ALIGNMENT * math.ceil(shape["vocab_size"] / ALIGNMENT) if rung.aligned else shape["vocab_size"]
    model = LectureGPT(**(shape | {"vocab_size": vocab_size}), fused_attention=rung.fused_attention)
    model.load_weights(weights)
    return build_plain_step(model.to(args.device), lecture_loss, fused=rung.fused_optimizer, **setting)


def climb(args: BenchmarkArguments, rungs: list[Rung]) -> tuple[BySide, BySide]:
    """Seconds of each turn, and the loss of each step, by the rung's name."""
    weights = initial_weights(SHAPES[args.shape])
    draw = partial(draw_step, SHAPES[args.shape], 1, args.batch_rows)
    by_name = {rung.name: rung for rung in rungs}
    steps = {}
    seconds = {name: [] for name in by_name}
    losses = {name: [] for name in by_name}

    def take_turn(name: str, first_step: int, count: int):
        torch.set_float32_matmul_precision(by_name[name].matmul_precision)
        batches = [draw(number) for number in range(first_step, first_step + count)]
        cpu_seconds = []
        wall_seconds = []
        with timed(wall_seconds, cpu_seconds):
            found = [steps[name](micro_batches) for micro_batches in batches]
            if args.device == "cuda":
                torch.cuda.synchronize()  # the last update
        seconds[name] += cpu_seconds if args.clock == "processor" else wall_seconds
        losses[name] += [float(loss) for loss in found]

    for rung in rungs:
        print(f"{rung.name} ...", flush=True)
        steps[rung.name] = build_rung(rung, args, weights)
        take_turn(rung.name, 0, WARMUP_STEPS)
        seconds[rung.name].clear()
    for number in range(args.rounds):
        for name in sides_in_turn(tuple(by_name), number):
            take_turn(name, WARMUP_STEPS + number * args.steps, args.steps)
    return seconds, losses


def check_losses(args: BenchmarkArguments, rungs: list[Rung], losses: BySide):
    """End the program if a rung computes something else than the first.

    The rows that alignment adds to the vocabulary belong to no token. They take probability from all others, until the
    model has learned that they never come: at first ln((V + added) / V) nats.
    """
    vocab_size = SHAPES[args.shape]["vocab_size"]
    for rung in rungs:
        if not rung.exists:
            continue
        allowed = LOSS_TOLERANCE["bf16" if "bf16" in (rung.dtype, rungs[0].dtype) else "fp32"]
        if rung.matmul_precision == "high":
            allowed = LOSS_TOLERANCE["bf16"]  # TF32 has 10 bits of mantissa, bf16 has 7
        if rung.aligned and not rung.ours:
            allowed += 1.2 * math.log1p((-vocab_size % ALIGNMENT) / vocab_size)
        difference = float(np.abs(np.subtract(losses[rung.name], losses["fp32"])).max())
        if not difference <= allowed:  # NaN, too
            raise SystemExit(
                f"the rung {rung.name} computes something else: its losses are up to {difference:.1e} nats from those "
                f"in fp32, more than {allowed:.1e}; nothing was written."
            )


def records(args: BenchmarkArguments, rungs: list[Rung], seconds: BySide, losses: BySide) -> Iterator[dict]:
    """What is known of each rung; its gain is over the last one that was built upon."""
    below = None
    for rung in rungs:
        record = {"name": rung.name, "note": rung.note}
        if rung.exists:
            step_seconds = float(np.median(seconds[rung.name])) / args.steps
            record |= {
                "ms": 1000 * step_seconds,
                "tokens_per_second": args.tokens_per_step / step_seconds,
                "gain": quartiles(seconds, below, rung.name) if below else None,
                "losses": losses[rung.name],
                "largest_loss_difference": float(np.abs(np.subtract(losses[rung.name], losses["fp32"])).max()),
            }
        yield record
        if rung.exists and not rung.note:
            below = rung.name


def report(args: BenchmarkArguments, result: dict):
    """Print the ladder beside the lecture's."""
    rounds = f"{args.rounds} rounds of {args.steps} steps by the {args.clock} clock"
    print(f"\n{args.shape}, {args.tokens_per_step:,} tokens a step, {rounds}; {machine_name(result['machine'])}\n")
    print(f"{'':19} {'ms a step':>10} {'tokens/s':>9} {'gain':>6}   {'A100, ms':>8} {'gain':>6}")
    below = None
    for rung in result["rungs"]:
        cells = f"{'':>10} {'':>9} {'':>6}"
        if "ms" in rung:
            gain = f"{rung['gain']['median']:.2f}" if rung["gain"] else ""
            cells = f"{rung['ms']:10.1f} {rung['tokens_per_second']:9,.0f} {gain:>6}"
        lecture = LECTURE_MS.get(rung["name"])
        theirs = f"{lecture or '':>8} {f'{below / lecture:.2f}' if below and lecture else '':>6}"
        print(f"{rung['name']:19} {cells}   {theirs}  {rung['note']}".rstrip())
        below = lecture
    total = result["total_gain"]
    print(
        f"\nfrom the first rung to the last {total['median']:.2f} times as fast (quartiles "
        f"{total['lower_quartile']:.2f} to {total['upper_quartile']:.2f}); the lecture's, on an A100 with B=16 and "
        f"T=1024, {LECTURE_MS['fp32'] / LECTURE_MS['fused AdamW']:.1f} times ({LECTURE})"
    )


if __name__ == "__main__":
    main()
