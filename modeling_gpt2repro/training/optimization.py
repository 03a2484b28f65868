"""AdamW with GPT-3's decay groups, and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn
from torch.optim import Optimizer

# The arguments that decide the learning rate of a step; kept in checkpoints, to say where a resumed run departs.
SCHEDULE = ("train_tokens", "tokens_per_step", "warmup_tokens", "learning_rate", "final_learning_rate_ratio")


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.1,  # GPT-3, appendix B, as are betas and epsilon
    betas: tuple[float, float] = (0.9, 0.95),
    epsilon: float = 1e-8,
) -> torch.optim.AdamW:
    """Build AdamW over two groups: tensors of two or more dimensions are decayed, biases and norms are not.

    Fused into one kernel per step, where torch has one for the device.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Decay pulls weights toward zero, so that a matrix spreads its work over many of them. A bias or the gain of a
    # norm has nothing to spread. The tied embedding is one matrix, so it is in the first group, once.
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Unfused AdamW launches several kernels per tensor; fused, the update of all 148 tensors is a few kernels.
    fused = all(parameter.device.type in ("cpu", "cuda", "mps") for parameter in parameters)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)


def learning_rate_at(step: int, total_steps: int, warmup_steps: int, peak: float, final_ratio: float) -> float:
    """Linear warm-up, then half a cosine from `peak` down to `peak * final_ratio` (GPT-3, appendix B).

    A function of the step alone: a resumed run needs no state to have the rate of one that never stopped.

    >>> [round(learning_rate_at(step, 10, 2, 1.0, 0.1), 3) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.55, 0.1]

    Args:
        step: Optimizer steps done before this one.
        peak: Reached at the end of warm-up.
        final_ratio: Share of the peak that is left at `total_steps` and after.
    """
    # Adam's second moments are averages over few gradients at first, so large steps would follow noise.
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps  # + 1: a rate of 0 would waste the first step
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))  # 0 after warm-up, 1 at the end
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 down to 0
    return peak * (final_ratio + (1 - final_ratio) * cosine)


def set_learning_rate(optimizer: Optimizer, learning_rate: float):
    """Write the rate into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
