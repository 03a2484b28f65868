"""Validation loss over a fixed number of tokens, and what guessing by frequency would give."""

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn


@torch.no_grad()
def summed_loss(
    model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], device: torch.device
) -> tuple[torch.Tensor, int]:
    """Sum of the next-token losses of `batches`, in nats, and how many tokens they are.

    Sums rather than means, so that processes with different numbers of rows can be added up exactly.

    Args:
        model: Any module whose output has `.logits` (B, T, V).
        batches: `input_ids` and `shift_labels`, (B, T) each, and what else the model takes.

    Returns:
        The sum in fp64, a scalar on `device` (fp32 on MPS, which has no fp64), and the count.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
    tokens = 0
    for batch in batches:
        inputs = {name: values.to(device, non_blocking=True) for name, values in batch.items()}
        labels = inputs.pop("shift_labels")
        logits = model(**inputs, use_cache=False).logits
        total += nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        tokens += labels.numel()
    model.train(was_training)
    return total, tokens


def validation_numbers(loss: float, bytes_per_token: float | None) -> dict[str, float]:
    """Name the loss: nats per token, perplexity, and bits per byte, which compares across tokenizers."""
    numbers = {"validation_loss": loss, "validation_perplexity": math.exp(min(loss, 700.0))}
    if bytes_per_token:
        numbers["validation_bits_per_byte"] = loss / math.log(2) / bytes_per_token
    return numbers


def unigram_entropy(batches: Iterable[dict[str, torch.Tensor]], vocab_size: int) -> float:
    """Nats per token that guessing the targets by their own frequencies costs: what any model of context must beat."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in batches:
        counts += np.bincount(batch["shift_labels"].numpy().ravel(), minlength=vocab_size)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
