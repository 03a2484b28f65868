"""The state of the optimizer and of the random number generators as named tensors, in safetensors files.

Safetensors run no code when they are loaded. `wte.weight.exp_avg` is named after the parameter and holds the full
tensor, whether it was trained on one process, under DDP or sharded; so a checkpoint of one resumes as another. Random
states are per process: `0.cpu`, `0.cuda`.
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

OPTIMIZER_FILE = "optimizer.safetensors"
RANDOM_FILE = "random.safetensors"


def optimizer_tensors(model: nn.Module, optimizer: Optimizer, keep: bool) -> dict[str, torch.Tensor]:
    """All tensors of the optimizer's state, on the CPU of those that `keep` them. All processes must call this."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {
        f"{names[parameter]}.{kind}": tensor
        for parameter, state in optimizer.state.items()
        for kind, tensor in state.items()
    }
    return gather_tensors(tensors, keep=keep)


def load_optimizer(folder: Path, model: nn.Module, optimizer: Optimizer):
    """Load the state of each parameter, one by one onto its device, so that nothing is held twice.

    Learning rate and weight decay remain those of the arguments.
    """
    with safe_open(folder / OPTIMIZER_FILE, framework="pt") as file:
        kinds: dict[str, list[str]] = {}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            parameter_name, _, kind = name.rpartition(".")
            kinds.setdefault(parameter_name, []).append(kind)
        for name, parameter in model.named_parameters():
            state = {}
            for kind in kinds[name]:
                tensor = file.get_tensor(f"{name}.{kind}")
                is_scalar = kind == "step"  # never sharded
                state[kind] = tensor.to(parameter.device, copy=True) if is_scalar else shard_like(tensor, parameter)
            optimizer.state[parameter] = state


def random_tensors(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The states of torch's generators on all processes, all of which must call this."""
    states = {f"{accelerator.process_index}.cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states[f"{accelerator.process_index}.cuda"] = torch.cuda.get_rng_state(accelerator.device)
    return {name: state for of_process in gather_object([states]) for name, state in of_process.items()}


def load_random(folder: Path, accelerator: Accelerator):
    """Set this process's generators; a process that did not exist when the checkpoint was written keeps its own."""
    with safe_open(folder / RANDOM_FILE, framework="pt") as file:
        names = set(file.keys())
        if f"{accelerator.process_index}.cpu" in names:
            torch.set_rng_state(file.get_tensor(f"{accelerator.process_index}.cpu"))
        if accelerator.device.type == "cuda" and f"{accelerator.process_index}.cuda" in names:
            torch.cuda.set_rng_state(file.get_tensor(f"{accelerator.process_index}.cuda"), accelerator.device)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path):
    """Write tensors into one safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
