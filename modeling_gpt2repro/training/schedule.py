"""The learning rate as a pure function of the step: no state, so a resumed run has the rate of one never stopped."""

import math

from torch.optim import Optimizer


def learning_rate_at(step: int, total_steps: int, warmup_steps: int, peak: float, final_ratio: float) -> float:
    """Linear warm-up, then half a cosine from `peak` down to `peak * final_ratio` (GPT-3, appendix B).

    >>> [round(learning_rate_at(step, 10, 2, 1.0, 0.1), 3) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.55, 0.1]

    Args:
        step: Number of optimizer steps done before this one.
        peak: Reached at the end of warm-up.
        final_ratio: Share of the peak that is left at `total_steps` and after.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def set_learning_rate(optimizer: Optimizer, learning_rate: float):
    """Write the rate into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
