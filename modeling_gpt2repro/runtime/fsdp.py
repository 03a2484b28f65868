"""Full tensors of parameters that FSDP2 shards over processes (DTensors). All processes must call these together."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether the model's parameters are sharded over processes."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor; any other tensor is returned as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Copy a full tensor to the device of `like`: this process's shard of it, if `like` is sharded."""
    if isinstance(like, DTensor):
        shard = distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
        return shard.clone()  # a shard may be a view, which would keep the full tensor alive
    return tensor.to(like.device, copy=True)


def gather_tensors(
    tensors: Mapping[str, torch.Tensor], keep: bool, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Gather tensors one after the other onto `device`; a process that need not `keep` them gets none."""
    gathered = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if keep:
            gathered[name] = full.to(device)
    return gathered


def load_full_state_dict(plain: nn.Module, sharded: nn.Module, keep: bool, device: torch.device | str):
    """Load the parameters of a sharded model into a plain one, which its process can then use at its own pace.

    The plain one may be on the meta device. Tied parameters must be tied again afterwards.
    """
    weights = gather_tensors(sharded.state_dict(), keep=keep, device=device)
    if keep:
        plain.load_state_dict(weights, assign=True)
