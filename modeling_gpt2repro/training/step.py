"""One optimizer step: the only place that knows about micro-batches."""

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer


def train_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: Optimizer,
    micro_batches: Iterable[dict[str, torch.Tensor]],
    max_grad_norm: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accumulate the gradients of all micro-batches, clip their norm, and step.

    The accelerator must have been made with as many accumulation steps as there are micro-batches: it divides each loss
    by that number, and lets the processes talk only in the last backward pass.

    Args:
        model: Prepared; its output has `.loss`, the mean over the tokens of a micro-batch.
        micro_batches: Keyword arguments of the model, all of the same size.
        max_grad_norm: The norm (over all parameters) that gradients are scaled down to.

    Returns:
        The loss, averaged over micro-batches and processes, and the gradient's norm before clipping: scalars on the
        device, so that nothing waits for it here.
    """
    losses = []
    for micro_batch in micro_batches:
        micro_batch = {name: ids.to(accelerator.device, non_blocking=True) for name, ids in micro_batch.items()}
        with accelerator.accumulate(model):
            loss = model(**micro_batch, use_cache=False, return_logits=False).loss
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    return accelerator.reduce(torch.stack(losses).mean(), reduction="mean"), grad_norm
