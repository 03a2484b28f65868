"""Tensors that are spread over processes (FSDP2), where something needs all of them."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor; all processes must ask together if it is spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, where `like` is spread; on its device in any case."""
    if isinstance(like, DTensor):
        part = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        return part.clone()  # a part may be a view that holds the whole
    return tensor.to(like.device, copy=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gathered(tensors: Mapping[str, torch.Tensor], keep: bool) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU, one after the other; only where `keep`, but all processes must call."""
    result = {}
    for name, tensor in tensors.items():
        whole = full(tensor.detach())
        if keep:
            result[name] = whole.cpu()
    return result


@torch.no_grad()
def copy_whole(sharded: nn.Module, plain: nn.Module) -> nn.Module:
    """Fill a plain model with the parameters of a spread one; all processes must call.

    Each can then use it at its own pace, where the spread one's forward passes need all of them.
    """
    targets = plain.state_dict()
    for name, tensor in sharded.state_dict().items():
        targets[name].copy_(full(tensor))
    return plain
