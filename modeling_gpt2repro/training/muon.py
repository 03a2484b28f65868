"""Muon for the matrices in the blocks, AdamW for everything else, as one optimizer.

AdamW scales each number of a gradient by itself. Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) takes a
matrix as a whole: it keeps the directions of the momentum, U V^T of its singular value decomposition U S V^T, and sets
all their strengths S to about 1, so that directions that the gradient rarely shows are learned as fast as the others.
"""

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from modeling_gpt2repro.runtime.fsdp import full_tensor, shard_like
from modeling_gpt2repro.runtime.hardware import gpu_lacks_bf16

MOMENTUM = 0.95  # this and the next three: Jordan 2024, as in torch.optim.Muon
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
EPSILON = 1e-7  # a gradient of zeros stays one
# Share of the rate that an entry moves by, root mean square: what AdamW's entries do, so that its learning rate and
# weight decay hold for both (Liu et al. 2025, arXiv:2502.16982, section 2.2; `match_rms_adamw` of torch.optim.Muon).
UPDATE_RMS = 0.2


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix U S V^T, (N, rows, columns): singular values between 0.68 and 1.21.

    Those below a five-hundredth of the matrix's norm stay smaller. Five Newton-Schulz steps are 15 products of
    matrices, which a GPU does in less time than one decomposition. Each step maps every singular value s to
    a s + b s^3 + c s^5 and leaves the directions alone; the coefficients make small s grow fast.
    """
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if is_tall else matrices  # the smaller of the two Gram matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPSILON)  # no singular value is above 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b gram + c gram gram
        x = torch.baddbmm(x, polynomial, x, beta=a)  # a x + polynomial x
    return x.mT if is_tall else x


class Muon(torch.optim.AdamW):
    """AdamW whose groups with an entry `split` are updated by Muon instead.

    `split` is the number of matrices that lie below each other in a parameter, 3 in GPT-2's `c_attn`: q, k and v. Their
    gradients differ in size, and orthogonalized as one, the smallest would hardly move.

    One optimizer and not two, so that whatever handles an optimizer (accelerate, FSDP, a learning rate schedule) sees
    all parameters. Under FSDP2 each matrix is gathered, since U V^T of a shard is not the shard of U V^T. Under DDP
    every process computes the same: 1.6 TFLOP for GPT-2 124M, 0.4 % of a step on one GPU and 3 % on eight.
    """

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Update the parameters that have a gradient; none, as in AdamW, if the tensor `found_inf` is set and not 0."""
        loss = super().step(closure)
        for group in self.param_groups:
            if "split" in group and any(p.grad is not None for p in group["params"]):
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict):
        parameters = [p for p in group["params"] if p.grad is not None]  # of one shape, (rows, columns)
        # Two tensors that a loss scale or `step_unless` in train_accelerate.py may set, as for fused AdamW.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        skip = None if found_inf is None else found_inf.bool()  # on the device: reading it would wait for the step
        # In 16 bits, since only directions count; what emulates bf16 computes faster in 32, and fp16 may lose all.
        dtype = torch.bfloat16 if parameters[0].is_cuda and not gpu_lacks_bf16() else torch.float32
        directions = []
        for p in parameters:
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p)
            momentum = state["momentum_buffer"]
            gradient = p.grad if grad_scale is None else p.grad / grad_scale
            if skip is not None:  # the mean of a momentum and itself is that momentum: it stays as it is
                gradient = torch.where(skip, momentum, gradient)
            momentum.lerp_(gradient, 1 - MOMENTUM)
            direction = gradient.lerp(momentum, MOMENTUM)  # Nesterov: one step further along
            directions.append(full_tensor(direction.to(dtype)))
        stacked = torch.stack(directions).unflatten(1, (group["split"], -1))  # (P, split, rows / split, columns)
        orthogonal = orthogonalize(stacked.flatten(0, 1)).reshape(len(parameters), *directions[0].shape)
        rate = group["lr"] * UPDATE_RMS * math.sqrt(max(stacked.shape[-2:]))
        for p, update in zip(parameters, orthogonal, strict=True):
            new = (p * (1 - group["lr"] * group["weight_decay"])).add(shard_like(update.to(p.dtype), p), alpha=-rate)
            p.copy_(new if skip is None else torch.where(skip, p, new))

    def _init_group(self, group: dict, *lists: list) -> bool:
        # Adam's step calls this to collect what it updates.
        return False if "split" in group else super()._init_group(group, *lists)

    def __setstate__(self, state: dict):
        torch.optim.Optimizer.__setstate__(self, state)  # Adam's expects its own moments of all parameters


def is_muon_matrix(name: str, dimensions: int) -> bool:
    """Whether Muon updates the parameter: `transformer.h.0.mlp.c_fc.weight`, but no embedding, bias or norm."""
    return dimensions == 2 and re.search(r"(^|\.)h\.[0-9]+\.", name) is not None


def muon_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """The groups of `Muon` for the matrices in the blocks, one for each shape, which are updated together.

    Raises:
        ValueError: If there are none, or they are not those of `nn.Linear`.
    """
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and is_muon_matrix(name, parameter.ndim):
            if not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear):
                raise ValueError(f"Muon needs matrices of (out, in), as nn.Linear has them, and {name} is of another.")
            split = 3 if name.endswith("c_attn.weight") else 1
            groups.setdefault((split, parameter.shape), []).append(parameter)
    if not groups:
        raise ValueError("Muon is for the matrices in GPT-2's blocks, and the model has none to train.")
    return [{"params": params, "weight_decay": weight_decay, "split": split} for (split, _), params in groups.items()]
