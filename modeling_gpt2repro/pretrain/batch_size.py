"""The largest batch that fits into a device's memory, found by trying."""

import gc
from collections.abc import Callable

import psutil
import torch
from accelerate import Accelerator
from torch import nn

from modeling_gpt2repro.runtime.hardware import is_out_of_memory, peak_memory_gb


def find_batch_size(accelerator: Accelerator, model: nn.Module, block_size: int, vocab_size: int, most: int) -> int:
    """Double the rows of one forward and backward until they do not fit on some process, then narrow it down.

    What training holds besides is held meanwhile: gradients, and two moments a parameter. Weights and random states
    stay as they are.

    Args:
        model: Unwrapped from DDP, compiled as it will be trained.
        most: Rows that a process has in a step: more are of no use.

    Raises:
        ValueError: If not even one row fits.
    """
    # Written to: what is only reserved takes no memory of a CPU.
    moments = [torch.ones_like(parameter) for parameter in model.parameters() for _ in range(2)]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def fits(rows: int) -> bool:
        fitted = torch.tensor(float(one_pass_fits(model, rows, block_size, vocab_size, accelerator.device)))
        return bool(accelerator.reduce(fitted.to(accelerator.device), reduction="sum") == accelerator.num_processes)

    found = largest(fits, most)
    del moments
    model.zero_grad()
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    if hasattr(model, "_orig_mod"):  # compiled: graphs of the sizes that were tried, some of them for any size
        torch.compiler.reset()
    if not found:
        raise ValueError(f"not even one row of block_size {block_size} fits into memory: take a smaller model or rows.")
    return found


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest n up to `most` that fits, where all up to some n do: doubled, then narrowed to within an eighth.

    >>> largest(lambda n: n <= 100, 512)
    96
    """
    good, bad = 0, most + 1
    while good < most:
        tried = min(most, 2 * good or 1)
        if tried >= bad:
            tried = (good + bad) // 2
        if bad <= most and bad - good <= max(1, good // 8):
            break
        if fits(tried):
            good = tried
        else:
            bad = tried
    return good


def one_pass_fits(model: nn.Module, rows: int, block_size: int, vocab_size: int, device: torch.device) -> bool:
    """Whether a forward and backward pass of so many rows fits; its gradients are added to those that are there.

    On a CPU it must take less than half of what is free, so that trying twice as many cannot end the process.
    """
    ids = torch.randint(vocab_size, (rows, block_size), generator=torch.Generator().manual_seed(0)).to(device)
    free, used = psutil.virtual_memory().available, psutil.Process().memory_info().rss
    try:
        model(input_ids=ids, shift_labels=ids, use_cache=False, return_logits=False).loss.backward()
        if device.type == "cpu":
            return 1e9 * peak_memory_gb(device) - used < 0.5 * free
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
