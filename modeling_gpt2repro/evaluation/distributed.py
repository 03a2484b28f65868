"""Scores over several processes: each takes its part, sums and counts are added up, so any number gives the same."""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedTokenizerBase

from modeling_gpt2repro.evaluation.hellaswag.examples import Example
from modeling_gpt2repro.evaluation.hellaswag.metrics import count_correct, summary_of
from modeling_gpt2repro.evaluation.hellaswag.score import ExampleScores, score_task
from modeling_gpt2repro.evaluation.hellaswag.tokenize import HellaSwagTask, prepare_hellaswag

from .validation import summed_loss


def validation_loss(
    accelerator: Accelerator, model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]
) -> tuple[float, int]:
    """Mean loss in nats per token over the batches of all processes, and the number of those tokens.

    Args:
        model: Unwrapped, because processes may have different numbers of batches.
        batches: This process's part.
    """
    total, tokens = summed_loss(model, batches, accelerator.device)
    sums = accelerator.reduce(torch.stack([total, torch.full_like(total, tokens)]), reduction="sum")
    total, tokens = sums.tolist()
    return total / tokens, int(tokens)


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Compute in the weights' own precision: with bf16 logits about 1 % of HellaSwag's answers change.

    Accelerate sets its autocast on the instance, in front of the class's forward. Flash-attention, which takes 16 bits
    only, gives way to sdpa.
    """
    forward, config = model.__dict__.pop("forward", None), getattr(model, "config", None)
    attention = getattr(config, "_attn_implementation", None) or ""
    too_wide = "flash" in attention and next(model.parameters()).dtype == torch.float32
    try:
        if too_wide:
            config._attn_implementation = "sdpa"
        yield
    finally:
        if too_wide:
            config._attn_implementation = attention
        if forward is not None:
            model.forward = forward


def evaluate_hellaswag(
    accelerator: Accelerator, model: nn.Module, task: HellaSwagTask
) -> tuple[dict[str, float], list[ExampleScores]]:
    """acc and acc_norm over all rows with the bounds of their 95 % intervals, and what the model said to each row.

    Args:
        model: Unwrapped: each process scores its share at its own pace, and they meet when all are done.
        task: This process's share, prepared once.

    Returns:
        For metrics.jsonl `hellaswag_completion_acc`, `hellaswag_completion_acc_low` and `_high`, ...,
        `hellaswag_seconds`; and the rows of all processes.
    """
    started = time.perf_counter()
    with without_autocast(model):
        results = score_task(model, task)
    numbers = {}
    for protocol, count in count_correct(results, task.protocols).items():
        added = accelerator.reduce(torch.tensor(list(count.values()), device=accelerator.device), reduction="sum")
        summary = summary_of(dict(zip(count, added.tolist(), strict=True)))
        for name in ("acc", "acc_norm"):
            full_name = f"hellaswag_{protocol.replace('-', '_')}_{name}"
            numbers[full_name] = summary[name]
            numbers[f"{full_name}_low"], numbers[f"{full_name}_high"] = summary[f"{name}_interval"]
    return numbers | {"hellaswag_seconds": time.perf_counter() - started}, gather_results(results)


def gather_results(results: Sequence[ExampleScores]) -> list[ExampleScores]:
    """The results of all processes, in the order of the rows."""
    return sorted(gather_object(list(results)), key=lambda result: result.row)


def hellaswag_accuracies(
    accelerator: Accelerator, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example]
) -> dict[str, float]:
    """`evaluate_hellaswag` for once: a caller that scores again keeps the task."""
    place = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    with without_autocast(model):
        task = prepare_hellaswag(model, tokenizer, rows, **place)
    return evaluate_hellaswag(accelerator, model, task)[0]
