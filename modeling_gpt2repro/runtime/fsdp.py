"""Tensors that are spread over processes (FSDP2), where something needs all of them."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor; all processes must ask together if it is spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole tensor, where `like` is spread; on its device in any case."""
    if isinstance(like, DTensor):
        part = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        return part.clone()  # a part may be a view that holds the whole
    return tensor.to(like.device, copy=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are spread over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def gather_tensors(
    tensors: Mapping[str, torch.Tensor], keep: bool, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Whole tensors on the device, one after the other; only where `keep`, but all processes must call."""
    result = {}
    for name, tensor in tensors.items():
        whole = full_tensor(tensor.detach())
        if keep:
            result[name] = whole.to(device)
    return result


def load_full_state_dict(plain: nn.Module, sharded: nn.Module, keep: bool, device: torch.device | str):
    """Give a plain model the parameters of a spread one, on the device; only where `keep`, but all processes must call.

    Each process can then use it at its own pace, where the spread one's forward passes need all of them.

    Args:
        plain: Its own parameters may be on the meta device; those that were tied no longer are.
    """
    weights = gather_tensors(sharded.state_dict(), keep, device)
    if keep:
        plain.load_state_dict(weights, assign=True)
