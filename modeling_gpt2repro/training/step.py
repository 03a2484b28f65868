"""One optimizer step: the only place that knows about micro-batches."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from modeling_gpt2repro.runtime.fsdp import full_tensor

from .outliers import OutlierDetector


class StepMetrics(NamedTuple):
    """What a step gave: scalars on the device, the same on all processes, so that nothing waits for them here.

    Args:
        loss: Nats per token, over all tokens of the step.
        grad_norm: Before clipping, over all parameters.
        skipped: Whether the update was left out.
    """

    loss: torch.Tensor
    grad_norm: torch.Tensor
    skipped: torch.Tensor


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: Iterable[dict[str, torch.Tensor]],
    tokens: int,
    max_grad_norm: float,
    guard: OutlierDetector,
) -> StepMetrics:
    """Accumulate the gradients of all micro-batches, clip their norm, and step, unless the guard says no.

    The accelerator must have been made with as many accumulation steps as there are micro-batches: it divides each loss
    by that number, and lets the processes talk only in the last backward pass.

    Args:
        model: Prepared; its output has `.loss`, the sum over a micro-batch's tokens divided by `num_items_in_batch`.
        micro_batches: Keyword arguments of the model.
        tokens: Of the whole step, over all processes and micro-batches: each weighs the same, wherever it is computed.
        max_grad_norm: The norm (over all parameters) that gradients are scaled down to.
    """
    # What one micro-batch holds on average: the losses are averaged over micro-batches and processes in the end.
    share = tokens / (accelerator.gradient_accumulation_steps * accelerator.num_processes)
    losses = []
    for micro_batch in micro_batches:
        micro_batch = {name: on_device(ids, accelerator.device) for name, ids in micro_batch.items()}
        with accelerator.accumulate(model):
            loss = model(**micro_batch, num_items_in_batch=share, use_cache=False, return_logits=False).loss
            accelerator.backward(loss)
            losses.append(loss.detach())
    assert accelerator.sync_gradients, "as many micro-batches as accumulation steps"
    grad_norm = full_tensor(accelerator.clip_grad_norm_(model.parameters(), max_grad_norm))
    loss = accelerator.reduce(torch.stack(losses).mean(), reduction="mean")
    skipped = guard.should_skip(loss, grad_norm)
    step_unless(skipped, optimizer)
    optimizer.zero_grad()
    return StepMetrics(loss, grad_norm, skipped)


def on_device(ids: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that a GPU is not waited for: from pinned memory only does it go on by itself."""
    return (ids.pin_memory() if device.type == "cuda" else ids).to(device, non_blocking=True)


def step_unless(skipped: torch.Tensor, optimizer: Optimizer):
    """Update the parameters, or leave them, the moments and their count of steps as they are.

    A fused optimizer reads the decision on the device (as after an overflow in fp16), others wait for it here.
    """
    bare = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if bare.defaults.get("fused"):
        bare.found_inf = skipped.float()
        optimizer.step()
    elif not skipped:
        optimizer.step()
