"""The largest batch that fits into memory."""

import contextlib
import ctypes
import math
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator

from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.pretrain import batch_size
from modeling_gpt2repro.pretrain.batch_size import apply_batch_size_finder, find_batch_size, largest
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.training.arguments import TrainArguments


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7, 8, 31, 96, 100, 512, 900])
def test_the_largest_that_fits_is_found_to_within_an_eighth(limit):
    tried = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest(fits, 512)
    assert found <= limit
    assert found >= min(512, limit) * 7 / 8 - 1
    assert max(tried) <= 2 * limit  # nothing far beyond is tried
    assert len(tried) == len(set(tried)) <= 16


def test_the_result_is_zero_where_nothing_fits():
    assert largest(lambda n: False, 512) == 0


def test_the_batch_that_memory_allows_is_found_and_weights_do_not_change(tiny_model, one_sentence):
    before = [parameter.detach().clone() for parameter in tiny_model.parameters()]
    tiny_model.train()

    def limit_batch(sequences: int):
        def check(module, inputs):
            if len(inputs[0]) > sequences:
                raise torch.OutOfMemoryError("CUDA out of memory.")

        return tiny_model.get_input_embeddings().register_forward_pre_hook(check)

    def find(largest_useful: int) -> int:
        accelerator = Accelerator(cpu=True)
        return find_batch_size(accelerator, tiny_model, block_size=64, vocab_size=97, largest_useful=largest_useful)

    random_state = torch.get_rng_state()
    hook = limit_batch(5)
    assert find(largest_useful=64) == 5
    hook.remove()
    assert torch.equal(torch.get_rng_state(), random_state)
    for parameter, old in zip(tiny_model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None
    assert find(largest_useful=4) == 4
    limit_batch(0)
    with pytest.raises(ValueError, match="not even one sequence of block_size 64 fits") as error:
        find(largest_useful=4)
    one_sentence(error)


class OneLargeParameter(torch.nn.Module):
    """40 MB, which a system takes back as soon as they are free; `on_forward()` is called in each forward pass."""

    def __init__(self, on_forward):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(10**7))
        self.on_forward = on_forward

    def forward(self, **inputs):
        self.on_forward()
        return SimpleNamespace(loss=self.weight[0])


def test_two_moments_and_a_gradient_a_parameter_are_held_while_batches_are_tried():
    memory = psutil.Process().memory_info
    held = []
    model = OneLargeParameter(lambda: held.append((memory().rss - before) / 40e6))
    with contextlib.suppress(AttributeError):  # not every C library has it, or holds on to what other tests have freed
        ctypes.CDLL(None).malloc_trim(0)
    before = memory().rss
    find_batch_size(Accelerator(cpu=True), model, block_size=64, vocab_size=97, largest_useful=2)
    assert held == pytest.approx([3, 3], abs=0.4)
    assert (memory().rss - before) / 40e6 == pytest.approx(0, abs=0.4)


def test_on_a_cpu_less_than_half_of_the_free_memory_is_taken(tiny_model, monkeypatch):
    monkeypatch.setattr(batch_size, "peak_memory_gb", lambda device: math.inf)
    assert not batch_size.one_pass_fits(tiny_model, 1, 64, 97, torch.device("cpu"))


@pytest.mark.slow
def test_a_compiled_model_keeps_ddp_when_its_batch_size_is_found(tiny_model, monkeypatch):
    """Without DDP's `no_sync` the gradients of every micro-batch would be sent to all processes."""
    import torch.distributed as dist

    monkeypatch.setattr(batch_size, "find_batch_size", lambda *arguments, **limits: 2)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(ModelWithLoss(tiny_model))
        compiled = torch.compile(wrapped)
        args = TrainArguments(block_size=64, tokens_per_step=512)
        batches = SimpleNamespace(config=BatchConfig(64, 8, 8, 1))
        apply_batch_size_finder(args, Accelerator(cpu=True), compiled, batches)
        assert compiled._orig_mod is wrapped
        assert compiled.no_sync == wrapped.no_sync
    finally:
        dist.destroy_process_group()
    assert args.per_device_train_batch_size == batches.config.micro_batch_size == 2
