"""The state of the optimizer and of the random number generators as named tensors, in safetensors files.

Safetensors run no code when they are loaded. `wte.weight.exp_avg` is named after the parameter and holds the full
tensor, whether it was trained on one process, under DDP or sharded; so a checkpoint of one resumes as another. Random
states are per process: `0.cpu`, `0.cuda`, and so for xpu, hpu and mps.
"""

from pathlib import Path
from types import ModuleType

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
                if kind == "step":  # a scalar, never sharded; read by the kernel if AdamW is fused, else by the host
                    state[kind] = tensor.to(parameter.device if optimizer.defaults["fused"] else "cpu", copy=True)
                else:
                    state[kind] = shard_like(tensor, parameter)
            optimizer.state[parameter] = state


def random_tensors(accelerator: Accelerator) -> dict[str, torch.Tensor]:
    """The states of torch's generators on all processes, all of which must call this."""
    states = {
        f"{accelerator.process_index}.{kind}": generators.get_rng_state()
        for kind, generators in _generators(accelerator).items()
    }
    return {name: state for of_process in gather_object([states]) for name, state in of_process.items()}


def load_random(folder: Path, accelerator: Accelerator):
    """Set this process's generators; a process that did not exist when the checkpoint was written keeps its own."""
    with safe_open(folder / RANDOM_FILE, framework="pt") as file:
        names = set(file.keys())
        for kind, generators in _generators(accelerator).items():
            if (name := f"{accelerator.process_index}.{kind}") in names:
                generators.set_rng_state(file.get_tensor(name))


def _generators(accelerator: Accelerator) -> dict[str, ModuleType]:
    """Kind of device -> the module that has the random state of this process's device: torch itself for the CPU."""
    kind = accelerator.device.type
    return {"cpu": torch} | ({} if kind == "cpu" else {kind: torch.get_device_module(kind)})


def save_tensors(tensors: dict[str, torch.Tensor], path: Path):
    """Write tensors into one safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
