"""AdamW with GPT-3's decay groups, or Muon, and the learning rate as a pure function of the step."""

import math
from collections.abc import Mapping

import torch
from accelerate.utils import is_torch_version
from torch import nn
from torch.optim import Optimizer

from .muon import Muon, muon_groups

OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "wsd", "constant")
# The arguments that decide the learning rate of a step; kept in checkpoints, to say where a resumed run departs.
SCHEDULE = (
    "lr_scheduler_type",
    "train_tokens",
    "tokens_per_step",
    "warmup_tokens",
    "cooldown_tokens",
    "learning_rate",
    "final_learning_rate_ratio",
)


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.1,  # GPT-3, appendix B, as are betas and epsilon
    betas: tuple[float, float] = (0.9, 0.95),
    epsilon: float = 1e-8,
    optimizer: str = "adamw",
    device: torch.device | None = None,
) -> torch.optim.AdamW:
    """Build AdamW over two groups: tensors of two or more dimensions are decayed, biases and norms are not.

    Fused into one kernel per step, where torch has one for the device that can skip the step (`is_fused_on`).

    Args:
        optimizer: `adamw`; or `muon`, where the matrices in the blocks have groups of their own, see `Muon`. All groups
            share the learning rate.
        device: Where the parameters will be at the first step; by default, where they are.

    Raises:
        ValueError: If it is neither, or Muon finds no such matrices.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer ({optimizer}) must be one of {', '.join(OPTIMIZERS)}.")
    by_muon = muon_groups(model, weight_decay) if optimizer == "muon" else []
    matrices = {parameter for group in by_muon for parameter in group["params"]}
    parameters = [p for p in model.parameters() if p.requires_grad and p not in matrices]
    # Decay pulls weights toward zero, so that a matrix spreads its work over many of them. A bias or the gain of a
    # norm has nothing to spread. The tied embedding is one matrix, so it is in the first group, once.
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        *by_muon,
    ]
    # Unfused AdamW launches several kernels per tensor; fused, the update of all 148 tensors is a few kernels.
    fused = is_fused_on(parameters[0].device if device is None else device)
    algorithm = Muon if by_muon else torch.optim.AdamW
    return algorithm(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=fused)


def is_fused_on(device: torch.device) -> bool:
    """Whether fused AdamW leaves everything as it is on this device when the tensor `found_inf` says so.

    A step whose loss is not a number is skipped that way (`step_unless` in train_accelerate.py). On MPS the kernel
    ignored the tensor until torch 2.13 (pytorch#186360). Others are not known to read it: there the host decides.
    """
    return device.type in ("cpu", "cuda") or (device.type == "mps" and is_torch_version(">=", "2.13"))


def describe_optimizer(optimizer: Optimizer) -> str:
    """'AdamW on 671,744 parameters (10 tensors) with decay 0.1 and on 3,584 parameters (18 tensors) with decay 0'."""
    by_decay: dict[str, dict[float, list[torch.Tensor]]] = {}
    for group in optimizer.param_groups:
        algorithm = "Muon" if "split" in group else "AdamW"
        by_decay.setdefault(algorithm, {}).setdefault(group["weight_decay"], []).extend(group["params"])
    return "; ".join(
        f"{algorithm} "
        + " and ".join(
            f"on {sum(t.numel() for t in tensors):,} parameters ({len(tensors)} tensors) with decay {weight_decay:g}"
            for weight_decay, tensors in groups.items()
        )
        for algorithm, groups in by_decay.items()
    )


def learning_rate_at(
    step: int,
    total_steps: int,
    warmup_steps: int,
    peak: float,
    final_ratio: float,
    schedule: str = "cosine",
    cooldown_steps: int = 0,
) -> float:
    """Linear warm-up to `peak`, then down to `peak * final_ratio`: the lecture takes half a cosine (GPT-3, appendix B).

    A function of the step alone: a resumed run needs no state to have the rate of one that never stopped.

    >>> [round(learning_rate_at(step, 10, 2, 1.0, 0.1), 3) for step in (0, 1, 2, 6, 10)]
    [0.5, 1.0, 1.0, 0.55, 0.1]
    >>> [round(learning_rate_at(step, 10, 2, 1.0, 0.0, "wsd", 4), 3) for step in (0, 2, 6, 7, 8, 9)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]

    Args:
        step: Optimizer steps done before this one.
        peak: Reached at the end of warm-up.
        final_ratio: Share of the peak that is left at `total_steps` and after.
        schedule: `cosine`, or `linear`; `constant` stays at the peak, and so does `wsd` (warmup-stable-decay, Hu et al.
            2024, arXiv:2404.06395) until `cooldown_steps` before the end, when it falls linearly.
    """
    # Adam's second moments are averages over few gradients at first, so large steps would follow noise.
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps  # + 1: a rate of 0 would waste the first step
    if schedule == "constant":
        return peak
    decay_steps = cooldown_steps if schedule == "wsd" else total_steps - warmup_steps
    # 0 until the decay begins, 1 at the end.
    progress = min(1.0, max(0.0, step - (total_steps - decay_steps)) / max(1, decay_steps))
    left = 0.5 * (1 + math.cos(math.pi * progress)) if schedule == "cosine" else 1 - progress  # from 1 down to 0
    return peak * (final_ratio + (1 - final_ratio) * left)


def scheduled_learning_rate(arguments: Mapping, step: int) -> float:
    """The learning rate of the step after `step`, by the arguments in SCHEDULE, whose lengths are in tokens."""
    total_steps, warmup_steps, cooldown_steps = (
        (arguments.get(name) or 0) // arguments["tokens_per_step"]
        for name in ("train_tokens", "warmup_tokens", "cooldown_tokens")
    )
    return learning_rate_at(
        step,
        total_steps,
        warmup_steps,
        arguments["learning_rate"],
        arguments["final_learning_rate_ratio"],
        schedule=arguments.get("lr_scheduler_type", "cosine"),  # older checkpoints know no other
        cooldown_steps=cooldown_steps,
    )


def set_learning_rate(optimizer: Optimizer, learning_rate: float):
    """Write the rate into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
