"""Time `generate`, which keeps keys and values of past tokens, against the lecture's loop, which computes them anew.

    python -m benchmarks.generation                     # GPT-2 124M, five samples, one thread: minutes
    python -m benchmarks.generation --shape tiny

The lecture's loop (peers/lecture_gpt.py) passes the whole text through the model for each token. Both take the most
probable token, so they must write the same. The model is ours; its weights are random, and large enough that a token
depends on those before it. The two take turns, and which goes first alternates; the figures are medians over rounds.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

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
from benchmarks.peers.lecture_gpt import generate_without_cache
from benchmarks.training_step import SEED, SHAPES, build_our_model
from modeling_gpt2repro.runtime.command_line import arg, check_limits, parse_command_line

SIDES = ("ours", "lecture")


@dataclass
class BenchmarkArguments:
    shape: Literal["toy", "tiny", "small", "124m"] = arg(default="124m", help="124m: GPT-2; the others are smaller.")
    samples: int = arg(default=5, minimum=1, help="Texts that are written at once; 5 in the lecture.")
    prompt_tokens: int = arg(default=8, minimum=1, help="Tokens that are given; 8 in the lecture.")
    new_tokens: int = arg(default=56, minimum=1, help="Tokens that each sample is continued by.")
    rounds: int = arg(default=3, minimum=1, help="How often each side writes.")
    threads: int = arg(default=1, minimum=1, help="Threads on a CPU.")
    device: Literal["auto", "cpu", "cuda"] = arg(default="auto", help="auto: CUDA if there is a GPU.")
    output: str | None = arg(default=None, help="Add the result to this JSON file (a list of results).")

    def __post_init__(self):
        problems = [*check_limits(self), *choose_device(self)]
        if (length := self.prompt_tokens + self.new_tokens) > SHAPES[self.shape]["n_positions"]:
            problems.append(
                f"prompt_tokens and new_tokens ({length} together) must be at most the {self.shape} model's context, "
                f"{SHAPES[self.shape]['n_positions']}."
            )
        if problems:
            raise ValueError("\n".join(problems))


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    torch.set_num_threads(args.threads)
    header = result_header("generation", argv, args, ("torch", "transformers"), device=args.device)
    seconds, cpu_seconds, written = take_turns(args)
    if not torch.equal(written["ours"], written["lecture"]):
        different = int((written["ours"] != written["lecture"]).any(dim=1).sum())
        raise SystemExit(f"with and without a cache {different} of {args.samples} samples differ; nothing was written.")
    tokens = args.samples * args.new_tokens
    result = (
        header
        | {
            "tokens": tokens,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "tokens_per_second": {side: tokens / float(np.median(seconds[side])) for side in SIDES},
            "lecture_over_ours": {"seconds": quartiles(seconds), "cpu_seconds": quartiles(cpu_seconds)},
            "positions": positions_computed(args),
            "same_samples": True,  # or nothing is written
            "different_tokens": len(written["ours"][:, args.prompt_tokens :].unique()),
        }
    )
    report(args, result)
    if args.output:
        add_to_file(Path(args.output), result)


def positions_computed(args: BenchmarkArguments) -> dict[str, int]:
    """Positions that pass through the model; the last token is written and not read."""
    first, last = args.prompt_tokens, args.prompt_tokens + args.new_tokens - 1
    return {"ours": args.samples * last, "lecture": args.samples * (first + last) * args.new_tokens // 2}


def generate_with_cache(model: PreTrainedModel, input_ids: Tensor, new_tokens: int) -> Tensor:
    """(B, T) -> (B, T + new_tokens)."""
    mask = torch.ones_like(input_ids)
    return model.generate(
        input_ids, attention_mask=mask, do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens
    )


def take_turns(args: BenchmarkArguments) -> tuple[BySide, BySide, dict[str, Tensor]]:
    """Seconds and processor seconds of each turn, and the ids that were written; by side."""
    torch.set_float32_matmul_precision("highest")  # in TF32 the two would round differently, and may write differently
    model = build_our_model(SHAPES[args.shape], initializer_range=0.1).to(args.device).eval()
    generator = torch.Generator().manual_seed(SEED)
    prompts = torch.randint(SHAPES[args.shape]["vocab_size"], (args.samples, args.prompt_tokens), generator=generator)
    prompts = prompts.to(args.device)
    writers = {"ours": generate_with_cache, "lecture": generate_without_cache}
    seconds = {side: [] for side in SIDES}
    cpu_seconds = {side: [] for side in SIDES}
    written = {}
    for writer in writers.values():
        writer(model, prompts, 1)  # first allocations
    for number in range(args.rounds):
        for side in sides_in_turn(SIDES, number):
            with timed(seconds[side], cpu_seconds[side]):
                written[side] = writers[side](model, prompts, args.new_tokens).cpu()
    return seconds, cpu_seconds, written


def report(args: BenchmarkArguments, result: dict):
    """Print a table, and the result in one sentence."""
    what = f"{args.samples} samples of {args.prompt_tokens} + {args.new_tokens} tokens, fp32"
    print(f"{args.shape}, {what}, {args.rounds} rounds; {machine_name(result['machine'])}\n")
    print(f"{'':8} {'tokens/s':>9} {'seconds':>8} {'cpu-seconds':>12} {'positions':>10}")
    for side in SIDES:
        print(
            f"{side:8} {result['tokens_per_second'][side]:9,.1f} {np.median(result['seconds'][side]):8.1f} "
            f"{np.median(result['cpu_seconds'][side]):12.1f} {result['positions'][side]:10,}"
        )
    ratio = result["lecture_over_ours"]["seconds"]
    cpu_ratio = result["lecture_over_ours"]["cpu_seconds"]
    print(
        f"\nours is {ratio['median']:.1f} times as fast (quartiles {ratio['lower_quartile']:.1f} to "
        f"{ratio['upper_quartile']:.1f}; by processor time {cpu_ratio['median']:.1f}), and writes the same"
    )


if __name__ == "__main__":
    main()
