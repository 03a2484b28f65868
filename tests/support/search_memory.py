"""The memory that the search for a batch size takes, measured in a process of its own; prints JSON.

In the tests' process the C library may take even a large tensor from memory that earlier tests have freed, and then
neither its allocation nor its release is seen from outside.
"""

import json
import sys
from types import SimpleNamespace

import psutil
import torch
from accelerate import Accelerator

from modeling_gpt2repro.pretrain import batch_size
from modeling_gpt2repro.runtime.hardware import peak_memory_gb
from modeling_gpt2repro.training.muon import Muon


class OneLargeParameter(torch.nn.Module):
    """40 MB, which a system takes back as soon as they are free; `on_forward(batch)` is called in each training."""

    def __init__(self, on_forward):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(100, 10**5))
        self.on_forward = on_forward

    def forward(self, input_ids, **inputs):
        if torch.is_grad_enabled():
            self.on_forward(len(input_ids))
        return SimpleNamespace(loss=self.weight[0, 0], logits=torch.zeros(*input_ids.shape, 97))


def find(model: OneLargeParameter, largest_useful: int, optimizer: type[torch.optim.Optimizer]) -> int:
    optimizer = optimizer([{"params": [model.weight], **({"split": 1} if optimizer is Muon else {})}], fused=True)
    limits = {"block_size": 64, "vocab_size": 97, "largest_useful": largest_useful}
    return batch_size.find_batch_size(Accelerator(cpu=True), model, model, optimizer, **limits)


def memory_held(optimizer: type[torch.optim.Optimizer]) -> list[float]:
    """Memory beyond that at the start, in sizes of the weight: in two trials, afterwards, and as the run's peak."""
    memory = psutil.Process().memory_info
    seen = []
    model = OneLargeParameter(lambda batch: seen.append(memory().rss - before))
    before = memory().rss
    assert find(model, 2, optimizer) == 2
    seen.append(memory().rss - before)
    # The peak that a run reports is not that of the search; elsewhere a process's peak does not begin anew.
    seen.append(1e9 * peak_memory_gb(torch.device("cpu")) - before if sys.platform == "linux" else 0)
    return [number / 40e6 for number in seen]


def size_that_leaves_half() -> int:
    """The batch that is found where a sequence takes 10 MB and 130 MB are free."""
    psutil.virtual_memory = lambda: SimpleNamespace(available=130e6)
    model = OneLargeParameter(lambda batch: torch.ones(batch * 25 * 10**5))
    return find(model, 64, torch.optim.AdamW)


if __name__ == "__main__":
    held = {"adamw": memory_held(torch.optim.AdamW), "muon": memory_held(Muon)}
    sizes = [size_that_leaves_half()]
    batch_size.reset_peak_memory = lambda device: None  # as where a process's peak does not begin anew
    sizes.append(size_that_leaves_half())
    print(json.dumps({"held": held, "sizes": sizes}))
