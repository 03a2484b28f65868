"""The precision of a training, and the loss scale that fp16 needs."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, parse_flag_from_env
from torch.amp import GradScaler

from .hardware import cpu_lacks_bf16, gpu_lacks_bf16


def choose_precision(on_cpu: bool) -> tuple[str, str]:
    """The mixed precision to train in: the launcher's, or another where the device would only emulate that.

    Returns:
        `no`, `bf16`, `fp16` or what else accelerate knows; and a sentence to print, or "".

    Raises:
        ValueError: If it is fp16 on a CPU or with FSDP.
    """
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()  # "" without accelerate's launcher
    on_cuda = torch.cuda.is_available() and not on_cpu
    precision, message = asked or "no", ""
    if asked == "bf16" and on_cpu and cpu_lacks_bf16():
        precision, message = "no", "bf16 is much slower than fp32 on this processor, so fp32 is taken."
    elif asked == "bf16" and on_cuda and gpu_lacks_bf16():
        precision, message = "fp16", "This GPU only emulates bf16, so fp16 with a loss scale is taken."
    elif not asked and on_cuda:
        faster, products = ("fp16", "") if gpu_lacks_bf16() else ("bf16", ", its matrix products in TF32")
        message = (
            f"Training in fp32{products}: for {faster}, which is faster, set ACCELERATE_MIXED_PRECISION={faster} or "
            f"start with accelerate launch --mixed_precision {faster} train_accelerate.py."
        )
    if precision == "fp16" and on_cpu:
        raise ValueError("mixed precision fp16 is for GPUs: on a CPU launch with --mixed_precision bf16 or no.")
    if precision == "fp16" and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "mixed precision fp16, which GPUs without bf16 take, has one loss scale, and processes with FSDP's shards "
            "would not agree on it: launch with --mixed_precision no, or without FSDP."
        )
    return precision, message


def check_same_precision(accelerator: Accelerator):
    """All processes must call this.

    Raises:
        ValueError: If their precisions differ: some would add scaled gradients to others' unscaled ones.
    """
    precisions = sorted(set(gather_object([accelerator.mixed_precision])))
    if len(precisions) > 1:
        raise ValueError(
            f"the processes would train in different precisions ({', '.join(precisions)}), because their devices "
            "differ: launch with --mixed_precision no, or fp16 if all are GPUs."
        )


def update_loss_scale(scaler: GradScaler, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Halve the scale if gradients of this step overflowed; double it after 2,000 steps in which none did.

    fp16 has no numbers between 0 and 6e-8, where many gradients lie. So the loss is multiplied by a scale before the
    backward pass, and all gradients with it; clipping divides them by it again. A scale that is too large makes some of
    them infinite, in the first steps and every few thousand: then the step is skipped, and the next has a smaller one.

    Args:
        scaler: After clipping, which looks for infinite gradients.
        loss: Of the step, unscaled, a scalar on the device.

    Returns:
        The scale of this step, and whether it was too large; on the device, since `scaler.get_scale()` would wait.
    """
    one = torch.ones_like(loss)
    scale = scaler.scale(one)
    scaler.update()
    is_halved = scaler.scale(one) < scale
    # Not to blame: if the loss itself, which is not scaled, is NaN or infinite; or if there is nothing left to halve.
    return scale, is_halved & loss.isfinite() & (scale > 1)
