"""The largest batch that fits into a device's memory, found by trying."""

import gc
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import is_compiled_module
from torch import nn

from modeling_gpt2repro.data.batches.shuffled import TrainingBatches
from modeling_gpt2repro.runtime.fsdp import is_sharded
from modeling_gpt2repro.runtime.hardware import is_out_of_memory, peak_memory_gb
from modeling_gpt2repro.training.arguments import TrainArguments


def apply_batch_size_finder(args: TrainArguments, accelerator: Accelerator, model: nn.Module, batches: TrainingBatches):
    """Set the largest batch that fits in the arguments and the data; the sequences of a step stay the same.

    Raises:
        ValueError: If the model is sharded, or not even one sequence fits.
    """
    module = accelerator.unwrap_model(model, keep_torch_compile=False)
    if is_sharded(module):  # one process that runs out of memory would leave the others waiting for its shards
        raise ValueError("find_batch_size needs whole models: with FSDP give --per_device_train_batch_size.")
    # Compiled again: accelerate, asked to keep the compiled module, removes DDP from it for good.
    compiled = torch.compile(module) if is_compiled_module(model) else module
    size = find_batch_size(
        accelerator,
        compiled,
        block_size=args.block_size,
        vocab_size=module.model.config.vocab_size,
        largest_useful=-(-args.sequences_per_step // accelerator.num_processes),
    )
    args.per_device_train_batch_size = size
    batches.config = replace(batches.config, micro_batch_size=size)
    accelerator.print(f"The largest batch that fits: --per_device_train_batch_size {size}.")


def find_batch_size(
    accelerator: Accelerator, model: nn.Module, *, block_size: int, vocab_size: int, largest_useful: int
) -> int:
    """Double the batch of one forward and backward until it does not fit on some process, then narrow it down.

    Whatever else training holds is held meanwhile: gradients, and Adam's two moments per parameter. Weights and random
    states stay as they are.

    Args:
        model: Unwrapped from DDP, compiled as it will be trained.
        largest_useful: The sequences that a process has in a step.

    Raises:
        ValueError: If not even one sequence fits.
    """
    # Filled with ones: memory that is only reserved takes no room on a CPU.
    moments = [torch.ones_like(parameter) for parameter in model.parameters() for _ in range(2)]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def fits(size: int) -> bool:
        fits_here = one_pass_fits(model, size, block_size, vocab_size, accelerator.device)
        count = accelerator.reduce(torch.tensor(float(fits_here), device=accelerator.device), reduction="sum")
        return bool(count == accelerator.num_processes)

    size = largest(fits, largest_useful)
    del moments
    model.zero_grad()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    if hasattr(model, "_orig_mod"):  # compiled: drop the graphs of the sizes that were tried
        torch.compiler.reset()
    if not size:
        raise ValueError(
            f"not even one sequence of block_size {block_size} fits into memory: use a smaller model or block_size."
        )
    return size


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n up to `limit` that fits, where all up to some n do: doubled, then narrowed to within an eighth.

    >>> largest(lambda n: n <= 100, 512)
    96
    """
    good = 0
    bad = limit + 1
    while good < limit:
        candidate = min(limit, 2 * good or 1)
        if candidate >= bad:
            candidate = (good + bad) // 2
        if bad <= limit and bad - good <= max(1, good // 8):
            break
        if fits(candidate):
            good = candidate
        else:
            bad = candidate
    return good


def one_pass_fits(model: nn.Module, batch_size: int, block_size: int, vocab_size: int, device: torch.device) -> bool:
    """Whether a forward and backward pass fits; its gradients are added to those that are there.

    On a CPU it must take less than half of what is free, so that trying twice as much cannot end the process.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (batch_size, block_size), generator=generator).to(device)
    free_bytes = psutil.virtual_memory().available
    used_bytes = psutil.Process().memory_info().rss
    try:
        model(input_ids=ids, shift_labels=ids, use_cache=False).loss.backward()
        if device.type == "cpu":
            return 1e9 * peak_memory_gb(device) - used_bytes < 0.5 * free_bytes
        torch.accelerator.synchronize()
        return True
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
