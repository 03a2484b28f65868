"""The optimizer and the random number generators as named tensors: in a file that runs no code and knows no processes.

`wte.weight.exp_avg` is named after the parameter, whole, whether it was trained on one process, under DDP or sharded;
so a checkpoint of either goes on as the other. Random states are by process: `0.cpu`, `0.cuda`.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from modeling_gpt2repro.runtime.fsdp import gather_tensors, shard_like

OPTIMIZER_FILE, RANDOM_FILE = "optimizer.safetensors", "random.safetensors"


def optimizer_tensors(model: nn.Module, optimizer: Optimizer, keep: bool) -> dict[str, torch.Tensor]:
    """All tensors of the optimizer's state on the CPU; only where `keep`, but all processes must call.

    Args:
        model: Unwrapped, with the parameters that the optimizer has.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}.{kind}": tensor
        for parameter, state in optimizer.state.items()
        for kind, tensor in state.items()
    }
    return gather_tensors(tensors, keep)


def load_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer):
    """Give each parameter its state, read one by one onto the device, so that nothing is held twice.

    Rates and decay stay those of the arguments.
    """
    with safe_open(folder / OPTIMIZER_FILE, framework="pt") as file:
        kinds: dict[str, list[str]] = {}
        for name in file.keys():  # noqa: SIM118 - no mapping
            parameter, _, kind = name.rpartition(".")
            kinds.setdefault(parameter, []).append(kind)
        for name, parameter in model.named_parameters():
            optimizer.state[parameter] = {
                kind: shard_like(file.get_tensor(f"{name}.{kind}"), parameter)
                if kind != "step"
                else file.get_tensor(f"{name}.{kind}").to(parameter.device, copy=True)
                for kind in kinds[name]
            }


def random_tensors(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The states of torch's generators on all processes; all must call."""
    mine = {f"{accelerator.process_index}.cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        mine[f"{accelerator.process_index}.cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return {name: state for states in gather_object([mine]) for name, state in states.items()}


def load_random(folder: Path, accelerator: Accelerator):
    """Set this process's generators; on a process that was not there before they stay as they are."""
    with safe_open(folder / RANDOM_FILE, framework="pt") as file:
        known = set(file.keys())
        if f"{accelerator.process_index}.cpu" in known:
            torch.set_rng_state(file.get_tensor(f"{accelerator.process_index}.cpu"))
        if accelerator.device.type == "cuda" and f"{accelerator.process_index}.cuda" in known:
            torch.cuda.set_rng_state(file.get_tensor(f"{accelerator.process_index}.cuda"), accelerator.device)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path):
    """Write tensors into one safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
