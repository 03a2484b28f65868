"""The largest batch that fits into memory."""

import gc
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from toy_runs import CPU_FP32, ROOT

from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.pretrain import batch_size
from modeling_gpt2repro.pretrain.batch_size import (
    apply_batch_size_finder,
    find_batch_size,
    fits_in_memory,
    largest,
)
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.optimization import OPTIMIZERS, build_optimizer


@pytest.fixture(autouse=True)
def no_garbage():
    """The search looks for garbage at each try, and need not look through all that the tests have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


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


@pytest.fixture
def find():
    """find(model, largest_useful, optimizer) -> the largest batch of sequences of 64 tokens."""

    def size(model, largest_useful: int, optimizer=None) -> int:
        optimizer = optimizer or build_optimizer(model, 1e-3)
        limits = {"block_size": 64, "vocab_size": 97, "largest_useful": largest_useful}
        found = find_batch_size(Accelerator(cpu=True), model, model, optimizer, **limits)
        assert not optimizer.state
        return found

    return size


def limit_batch(model, training: int, evaluation: int):
    """Let a batch of more sequences find no memory."""

    def check(module, inputs):
        if len(inputs[0]) > (training if torch.is_grad_enabled() else evaluation):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    return model.get_input_embeddings().register_forward_pre_hook(check)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_batch_that_memory_allows_is_found_and_weights_do_not_change(tiny_model, find, kind, one_sentence):
    before = [parameter.detach().clone() for parameter in tiny_model.parameters()]
    optimizer = build_optimizer(tiny_model.train(), 1e-3, optimizer=kind)
    model = ModelWithLoss(tiny_model)
    random_state = torch.get_rng_state()
    for training, evaluation in ((5, 64), (64, 5)):
        hook = limit_batch(tiny_model, training, evaluation)
        assert find(model, 64, optimizer) == 5
        hook.remove()
    assert torch.equal(torch.get_rng_state(), random_state)
    assert tiny_model.training
    for parameter, old in zip(tiny_model.parameters(), before, strict=True):
        assert torch.equal(parameter, old)
        assert parameter.grad is None
    assert find(model, 4, optimizer) == 4
    limit_batch(tiny_model, 0, 4)
    with pytest.raises(ValueError, match="not even one sequence of block_size 64 fits") as error:
        find(model, 4, optimizer)
    one_sentence(error)


@pytest.fixture(scope="module")
def measured(warm_python) -> dict:
    """What tests/support/search_memory.py prints."""
    return json.loads(warm_python.run(ROOT / "tests" / "support" / "search_memory.py", **CPU_FP32).stdout)


@pytest.mark.parametrize(("kind", "held"), [("adamw", 3), ("muon", 2)])
def test_gradient_and_moments_of_the_optimizer_are_held_while_batches_are_tried(measured, kind, held):
    """In sizes of the weight; Muon has one moment of a matrix, AdamW two. Afterwards nothing is held."""
    assert measured["held"][kind] == pytest.approx([held, held, 0, 0], abs=0.4)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process does not begin anew elsewhere")
def test_on_a_cpu_less_than_half_of_the_free_memory_is_taken(measured):
    """A batch of 8 is too large. What is tried afterwards must not be taken for as large as the peak of 8."""
    with_new_peaks, with_one_peak = measured["sizes"]
    assert with_new_peaks == 6
    assert 6 <= with_one_peak < 8


@pytest.mark.parametrize(("held_then", "fits"), [(22.7e9, True), (22.9e9, False)])
def test_on_a_gpu_a_twentieth_is_left_free_at_the_peak(held_then, fits, monkeypatch):
    """Of 24 GB; meanwhile the allocator has given 5 GB back, and the context or another program holds 0.1 GB."""
    held_now = held_then - 5e9
    resets = []
    cuda = {
        "mem_get_info": lambda device: (24e9 - 0.1e9 - held_now, 24e9),
        "max_memory_reserved": lambda device: held_then,
        "memory_reserved": lambda device: held_now,
        "reset_peak_memory_stats": resets.append,
        "empty_cache": lambda: None,
    }
    for name, function in cuda.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    device = torch.device("cuda")
    assert fits_in_memory(lambda: resets.append("attempt"), device) == fits
    assert resets == [device, "attempt"]


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
        apply_batch_size_finder(args, Accelerator(cpu=True), compiled, None, batches)
        assert compiled._orig_mod is wrapped
        assert compiled.no_sync == wrapped.no_sync
    finally:
        dist.destroy_process_group()
    assert args.per_device_train_batch_size == batches.config.micro_batch_size == 2
