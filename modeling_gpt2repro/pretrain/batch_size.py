"""The largest batch that fits into a device's memory, found by trying."""

import gc
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import is_compiled_module
from torch import nn
from torch.optim import Optimizer

from modeling_gpt2repro.data.batches.shuffled import TrainingBatches
from modeling_gpt2repro.evaluation.validation import summed_loss
from modeling_gpt2repro.runtime.fsdp import is_sharded
from modeling_gpt2repro.runtime.hardware import is_out_of_memory, peak_memory_gb, reset_peak_memory
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.optimization import set_learning_rate

# Share of a GPU that is left free: for NCCL's buffers, and because the allocator's memory falls to pieces when batches
# of other shapes follow (the last of a text, HellaSwag's, samples), so that less of it is of use than in the search.
GPU_MARGIN = 0.05
# On a CPU more than half of the free memory is not tried, because twice as much must not end the process.
CPU_MARGIN = 0.5


def apply_batch_size_finder(
    args: TrainArguments, accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, batches: TrainingBatches
):
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
        ModelWithLoss(module.model),
        optimizer,
        block_size=args.block_size,
        vocab_size=module.model.config.vocab_size,
        largest_useful=-(-args.sequences_per_step // accelerator.num_processes),
    )
    args.per_device_train_batch_size = size
    batches.config = replace(batches.config, micro_batch_size=size)
    accelerator.print(f"The largest batch that fits: --per_device_train_batch_size {size}.")


def find_batch_size(
    accelerator: Accelerator,
    model: nn.Module,
    evaluated: nn.Module,
    optimizer: Optimizer,
    *,
    block_size: int,
    vocab_size: int,
    largest_useful: int,
) -> int:
    """Double the batch of one forward and backward until it does not fit on some process, then narrow it down.

    An evaluation takes the same batch unless another is given, so it has to fit, too. It needs less memory, as it keeps
    nothing for a backward pass, unless the model has hardly any layers: it is not compiled.

    Whatever else training holds is held meanwhile: gradients, and the optimizer's state. Weights and random states stay
    as they are, and the peak of memory begins anew.

    Args:
        model: Unwrapped from DDP, compiled as it will be trained.
        evaluated: The same as it will be evaluated.
        optimizer: Without a state yet. Its learning rate is left at 0.
        largest_useful: The sequences that a process has in a step.

    Raises:
        ValueError: If not even one sequence fits.
    """
    device = accelerator.device

    def fits_everywhere(attempt: Callable[[], None], with_margin: bool = True) -> bool:
        fits_here = fits_in_memory(attempt, device, with_margin)
        count = accelerator.reduce(torch.tensor(float(fits_here), device=device), reduction="sum")
        return bool(count == accelerator.num_processes)

    def train_and_evaluate(size: int):
        ids = torch.randint(vocab_size, (size, block_size), generator=torch.Generator().manual_seed(0)).to(device)
        model(input_ids=ids, shift_labels=ids, use_cache=False).loss.backward()  # adds to the gradients that are there
        with torch.no_grad(), accelerator.autocast():
            summed_loss(evaluated, {"input_ids": ids}, ids)

    size = 0
    if fits_everywhere(lambda: take_empty_step(model, optimizer), with_margin=False):
        size = largest(lambda n: fits_everywhere(lambda: train_and_evaluate(n)), largest_useful)
    model.zero_grad()
    optimizer.state.clear()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak_memory(device)
    if hasattr(model, "_orig_mod"):  # compiled: drop the graphs of the sizes that were tried
        torch.compiler.reset()
    if not size:
        raise ValueError(
            f"not even one sequence of block_size {block_size} fits into memory: use a smaller model or block_size."
        )
    return size


def take_empty_step(model: nn.Module, optimizer: Optimizer):
    """Fill gradients and the optimizer's state by a step that changes no weight: at a learning rate of 0."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)  # memory that is only reserved takes no room on a CPU
    set_learning_rate(optimizer, 0.0)
    getattr(optimizer, "optimizer", optimizer).step()  # accelerate's wrapper would wait for fp16's loss scale


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


def fits_in_memory(attempt: Callable[[], None], device: torch.device, with_margin: bool = True) -> bool:
    """Whether `attempt` finds the memory that it needs, and leaves the margin: GPU_MARGIN or CPU_MARGIN."""
    reset_peak_memory(device)
    free_bytes = psutil.virtual_memory().available
    used_bytes = psutil.Process().memory_info().rss
    old_peak_gb = peak_memory_gb(device)  # of larger batches, where it cannot begin anew
    try:
        attempt()
        if device.type == "cpu":
            peak_gb = peak_memory_gb(device)
            leaves_margin = peak_gb <= old_peak_gb or 1e9 * peak_gb - used_bytes < CPU_MARGIN * free_bytes
        else:
            torch.accelerator.synchronize()
            leaves_margin = device.type != "cuda" or leaves_gpu_margin(device)
        return leaves_margin or not with_margin
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def leaves_gpu_margin(device: torch.device) -> bool:
    """Whether enough was free of all processes when this one held most since `reset_peak_memory`."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    returned_bytes = torch.cuda.max_memory_reserved(device) - torch.cuda.memory_reserved(device)  # since then
    return free_bytes - returned_bytes >= GPU_MARGIN * total_bytes
