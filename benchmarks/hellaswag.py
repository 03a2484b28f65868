"""Time our HellaSwag scorer against the lecture's loop, which takes one example at a time, on the same model.

    python -m benchmarks.hellaswag                                     # GPT-2 124M, 200 examples from the Hub, fp32
    python -m benchmarks.hellaswag --data hellaswag_val.jsonl --rows 10042 --rounds 1 --device cuda --dtype bf16

Both score build-nanogpt's protocol ("completion") with the same tokenizer, from texts to predictions. The lecture's way
is `lecture_scores`: an example's four endings, each behind its own copy of the context, are a padded batch of four;
logits and losses are computed at all positions, and a mask keeps the endings'. Weights are random, which changes
nothing in what is computed. The examples are drawn evenly from the file. The two sides take turns, and which goes first
alternates; the figures are medians over rounds. In fp32 every prediction must be the same, and the scores within 1e-4
of each other.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

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
from benchmarks.training_step import NO_SPECIAL_TOKENS, SEED, SHAPES
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.tokenizer import load_tokenizer
from modeling_gpt2repro.evaluation.hellaswag.examples import Example, load_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.score import score_hellaswag
from modeling_gpt2repro.runtime.command_line import arg, check_limits, exit_on_input_error, parse_command_line

SIDES = ("ours", "lecture")
MAX_DIFFERENCE = 1e-4  # relative, in fp32

Scores = np.ndarray  # (examples, 4): log-likelihoods of the endings, in nats
Lengths = np.ndarray  # (examples, 4): their tokens
Scorer = Callable[[], tuple[Scores, Lengths]]


@dataclass
class BenchmarkArguments:
    data: str = arg(default="Rowan/hellaswag", help="A local jsonl in HellaSwag's schema, or a dataset on the Hub.")
    tokenizer: str = arg(default="gpt2", help="'gpt2', a folder or a Hub id.")
    shape: Literal["toy", "tiny", "124m"] = arg(default="124m", help="124m: GPT-2; the others are for a quick look.")
    kind: Literal["ours", "stock"] = arg(default="ours", help="Whose model both score: ours or transformers' GPT-2.")
    rows: int = arg(
        default=200, minimum=1, help="Examples to score. With few of them, long and short ones share a batch."
    )
    rounds: int = arg(default=3, minimum=1, help="How often each side scores the examples.")
    batch_tokens: int | None = arg(
        default=None, minimum=1, help="Of our batches; if not given, as many as in eval_hellaswag.py."
    )
    dtype: Literal["fp32", "bf16"] = arg(
        default="fp32", help="Precision of the weights; predictions may differ in bf16."
    )
    device: Literal["auto", "cpu", "cuda"] = arg(default="auto", help="auto: CUDA if there is a GPU.")
    output: str | None = arg(default=None, help="Add the result to this JSON file (a list of results).")

    def __post_init__(self):
        if problems := [*check_limits(self), *choose_device(self)]:
            raise ValueError("\n".join(problems))


def main(argv: list[str] | None = None):
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    with exit_on_input_error():
        examples = load_hellaswag(args.data)
        tokenizer = load_tokenizer(args.tokenizer)
    if args.rows < len(examples):
        examples = [examples[i * len(examples) // args.rows] for i in range(args.rows)]
    header = result_header(
        "hellaswag", argv, args, packages=("torch", "transformers", "tokenizers", "numpy"), device=args.device
    )
    model = build_model(args, vocab_size=len(tokenizer))
    scorers = {
        "ours": lambda: our_scores(model, tokenizer, examples, args.batch_tokens),
        "lecture": lambda: lecture_scores(model, tokenizer, examples),
    }
    positions, seconds, cpu_seconds, found = take_turns(model, scorers, args.rounds)
    result = header | {
        "rows": {
            "all": len(examples),
            "of_wikihow": sum("[header]" in example.ctx or "[step]" in example.ctx for example in examples),
        },
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "rows_per_second": {side: len(examples) / float(np.median(seconds[side])) for side in SIDES},
        "lecture_over_ours": {"seconds": quartiles(seconds), "cpu_seconds": quartiles(cpu_seconds)},
        "positions": positions,
        "answers": compare_answers(found, exact=args.dtype == "fp32"),
    }
    report(args, result)
    if args.output:
        add_to_file(Path(args.output), result)


def build_model(args: BenchmarkArguments, vocab_size: int) -> PreTrainedModel:
    """A GPT-2 with fresh weights, on the device, in evaluation mode."""
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as in the lecture
    torch.manual_seed(SEED)
    shape = SHAPES[args.shape] | NO_SPECIAL_TOKENS | {"vocab_size": vocab_size}
    if args.kind == "ours":
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape))
    else:
        model = GPT2LMHeadModel(GPT2Config(**shape))
    return model.to(args.device, torch.bfloat16 if args.dtype == "bf16" else torch.float32).eval()


def our_scores(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: list[Example], batch_tokens: int | None
) -> tuple[Scores, Lengths]:
    """As `eval_hellaswag.py` does it."""
    scores = score_hellaswag(model, tokenizer, examples, ("completion",), batch_tokens)
    log_likelihoods = np.array([example_scores.log_likelihoods for example_scores in scores])
    return log_likelihoods, np.array([example_scores.lengths for example_scores in scores])


@torch.no_grad()
def lecture_scores(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, examples: list[Example]
) -> tuple[Scores, Lengths]:
    """The lecture's way: an example at a time, everything for each of its endings."""
    scores = []
    lengths = []
    for example in examples:
        context = tokenizer.encode(example.ctx)
        endings = [tokenizer.encode(f" {ending}") for ending in example.endings]
        T = len(context) + max(map(len, endings))
        ids = torch.zeros(4, T, dtype=torch.long)
        mask = torch.zeros(4, T)
        for number, ending in enumerate(endings):
            ids[number, : len(context) + len(ending)] = torch.tensor(context + ending)
            mask[number, len(context) : len(context) + len(ending)] = 1
        ids = ids.to(model.device)
        mask = mask.to(model.device)
        logits = model(ids).logits[:, :-1].contiguous()  # (4, T - 1, V)
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        summed = (losses.view(4, -1) * mask[:, 1:]).sum(dim=1)  # (4,)
        scores.append([-loss for loss in summed.tolist()])
        lengths.append(mask.sum(dim=1).long().tolist())
    return np.array(scores), np.array(lengths)


def take_turns(
    model: PreTrainedModel, scorers: dict[str, Scorer], rounds: int
) -> tuple[dict, BySide, BySide, dict[str, tuple[Scores, Lengths]]]:
    """Positions computed, seconds and CPU seconds of each turn, and the scores; each by side."""
    seconds = {side: [] for side in SIDES}
    cpu_seconds = {side: [] for side in SIDES}
    positions = {}
    found = {}
    for number in range(rounds):
        for side in sides_in_turn(SIDES, number):
            with counted_positions(model) as positions[side], timed(seconds[side], cpu_seconds[side]):
                found[side] = scorers[side]()
    return positions, seconds, cpu_seconds, found


@contextmanager
def counted_positions(model: PreTrainedModel) -> Iterator[dict[str, int]]:
    """Count the positions that pass through the blocks and through the head inside the `with`, padding included."""
    count = {"blocks": 0, "head": 0}

    def count_ids(_, inputs):
        count["blocks"] += inputs[0].numel()

    def count_logits(_, inputs, logits):
        count["head"] += logits.shape[:-1].numel()

    hooks = [model.get_input_embeddings().register_forward_pre_hook(count_ids)]
    hooks.append(model.get_output_embeddings().register_forward_hook(count_logits))
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


def compare_answers(found: dict[str, tuple[Scores, Lengths]], exact: bool) -> dict[str, int | float]:
    """How many predictions are the same, by sum and by mean, and how much the scores differ.

    Raises:
        ValueError: If `exact` and they are not the same.
    """
    ours, our_lengths = found["ours"]
    theirs, their_lengths = found["lecture"]
    difference = float((np.abs(ours - theirs) / np.abs(theirs)).max())
    same = int((ours.argmax(1) == theirs.argmax(1)).sum())
    same_norm = int(((ours / our_lengths).argmax(1) == (theirs / their_lengths).argmax(1)).sum())
    if exact and (min(same, same_norm) < len(ours) or difference > MAX_DIFFERENCE):
        raise ValueError(
            f"the two agree on {same} (acc) and {same_norm} (acc_norm) of {len(ours)} predictions, with scores "
            f"{difference:.1e} apart: they must agree on all, within {MAX_DIFFERENCE:.0e}."
        )
    return {"same_acc": same, "same_acc_norm": same_norm, "largest_relative_difference": difference}


def report(args: BenchmarkArguments, result: dict):
    """Print a table, and the result in one sentence."""
    examples = result["rows"]
    answers = result["answers"]
    of_what = f"{examples['all']} examples, {examples['of_wikihow']} of WikiHow"
    print(f"{args.shape}, {args.dtype}, {of_what}, {args.rounds} rounds; {machine_name(result['machine'])}\n")
    print(f"{'':8} {'per s':>8} {'seconds':>8} {'cpu-seconds':>12} {'positions in blocks':>20} {'in the head':>12}")
    for side in SIDES:
        positions = result["positions"][side]
        print(
            f"{side:8} {result['rows_per_second'][side]:8.2f} {np.median(result['seconds'][side]):8.1f} "
            f"{np.median(result['cpu_seconds'][side]):12.1f} {positions['blocks']:20,} {positions['head']:12,}"
        )
    ratio = result["lecture_over_ours"]["seconds"]
    cpu_ratio = result["lecture_over_ours"]["cpu_seconds"]
    print(
        f"\nours is {ratio['median']:.3f} times as fast (quartiles {ratio['lower_quartile']:.3f} to "
        f"{ratio['upper_quartile']:.3f}; by CPU time, which other programs on the machine disturb less, "
        f"{cpu_ratio['median']:.3f}); of {examples['all']} predictions {answers['same_acc']} (acc) and "
        f"{answers['same_acc_norm']} (acc_norm) are the same, and the scores differ by at most "
        f"{answers['largest_relative_difference']:.1e}"
    )


if __name__ == "__main__":
    main()
