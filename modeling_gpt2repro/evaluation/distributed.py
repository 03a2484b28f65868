"""Scores over several processes: each takes its part, sums and counts are added up, so any number gives the same."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from .hellaswag import count_correct, score_hellaswag, summarize_counts
from .hellaswag_rows import HellaSwagRow
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

    Accelerate sets its autocast on the instance, in front of the class's forward.
    """
    forward = model.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if forward is not None:
            model.forward = forward


def hellaswag_accuracies(
    accelerator: Accelerator, model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[HellaSwagRow]
) -> dict[str, float]:
    """acc and acc_norm in both protocols over all rows, named as in metrics.jsonl: `hellaswag_completion_acc`."""
    place = {"process_index": accelerator.process_index, "num_processes": accelerator.num_processes}
    with without_autocast(model):
        counts = count_correct(score_hellaswag(model, tokenizer, rows, **place))
    for count in counts.values():
        for name in count:
            count[name] = int(accelerator.reduce(torch.tensor(count[name], device=accelerator.device), reduction="sum"))
    return {
        f"hellaswag_{protocol.replace('-', '_')}_{name}": summary[name]
        for protocol, summary in summarize_counts(counts).items()
        for name in ("acc", "acc_norm")
    }
