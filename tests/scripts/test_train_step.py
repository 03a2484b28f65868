"""The optimizer step of train_accelerate.py: accumulation, clipping, skipping, and no wait for the device."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from steps import accelerator_for, in_fp16, random_sequences, take_step
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_gpt2repro.data.batches.read_ahead import ReadAhead
from modeling_gpt2repro.data.batches.sequences import TokenSequences
from modeling_gpt2repro.data.batches.shuffled import BatchConfig, ShuffledBatches
from modeling_gpt2repro.runs.logger import RunLogger
from modeling_gpt2repro.runs.metrics import MetricsLog
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.training.optimization import (
    OPTIMIZERS,
    build_optimizer,
    learning_rate_at,
    set_learning_rate,
)
from modeling_gpt2repro.training.outliers import OutlierDetector
from train_accelerate import step_unless, train_step


@pytest.mark.parametrize("small", [2, 3, 5])
def test_micro_batches_of_two_three_or_five_sequences_equal_one_of_eight(tiny_config, small):
    from modeling_gpt2repro import GPT2ReproForCausalLM

    results = []
    for size in (8, small):
        torch.manual_seed(0)
        model = GPT2ReproForCausalLM(tiny_config)
        accelerator = accelerator_for(-(-8 // size))
        model, optimizer = accelerator.prepare(ModelWithLoss(model), build_optimizer(model, 1e-2))
        steps = [
            take_step(accelerator, model, optimizer, random_sequences(8, seed=seed), micro_batch_size=size)[:2]
            for seed in range(3)
        ]
        results.append((torch.tensor(steps), [parameter.detach().clone() for parameter in model.parameters()]))
    (expected, expected_weights), (accumulated, accumulated_weights) = results
    torch.testing.assert_close(expected, accumulated, atol=1e-5, rtol=0)
    for a, b in zip(expected_weights, accumulated_weights, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_the_gradient_is_clipped_and_the_norm_is_that_before_clipping(tiny_model):
    accelerator = accelerator_for(1)
    model, optimizer = accelerator.prepare(tiny_model, torch.optim.SGD(tiny_model.parameters(), lr=1.0))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    _, norm, *_ = take_step(accelerator, model, optimizer, random_sequences(4), micro_batch_size=4, max_grad_norm=0.01)
    moved = math.sqrt(sum(((a - b) ** 2).sum().item() for a, b in zip(before, model.parameters(), strict=True)))
    assert norm > 0.1
    assert moved == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_one_batch_can_be_memorized(tiny_model, kind):
    accelerator = accelerator_for(1)
    bare = build_optimizer(tiny_model, 3e-3, weight_decay=0.0, optimizer=kind)
    model, optimizer = accelerator.prepare(tiny_model.train(), bare)
    batch = random_sequences(4)
    losses = [take_step(accelerator, model, optimizer, batch, micro_batch_size=4).loss.item() for _ in range(200)]
    assert losses[0] == pytest.approx(math.log(97), abs=0.1)
    assert losses[-1] < 0.1


# Skipped steps


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_skipped_step_changes_neither_weights_nor_moments(tiny_model, fused, kind):
    accelerator = accelerator_for(1)
    bare = build_optimizer(tiny_model, 1e-2, optimizer=kind)
    if not fused:
        groups = [{**group, "fused": False} for group in bare.param_groups]
        bare = type(bare)(groups, lr=1e-2, fused=False)
    model, optimizer = accelerator.prepare(tiny_model, bare)
    batch = random_sequences(4)
    take_step(accelerator, model, optimizer, batch, micro_batch_size=4)
    before = [tensor.clone() for tensor in weights_and_moments(model, optimizer)]
    with torch.no_grad():
        saved = model.lm_head.weight[3, 3].clone()
        model.lm_head.weight[3, 3] = math.nan
    metrics = take_step(accelerator, model, optimizer, batch, micro_batch_size=4)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = saved
    assert metrics.skipped
    for old, new in zip(before, weights_and_moments(model, optimizer), strict=True):
        assert torch.equal(old, new)
    assert not take_step(accelerator, model, optimizer, batch, micro_batch_size=4).skipped
    assert not torch.equal(before[0], next(model.parameters()))


def weights_and_moments(model, optimizer) -> list[torch.Tensor]:
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return [parameter.detach() for parameter in model.parameters()] + moments


def test_a_step_that_is_not_skipped_is_that_of_plain_adamw():
    weights = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for can_skip in (True, False):
        parameter = torch.nn.Parameter(weights.clone())
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, fused=True)
        for _ in range(3):
            parameter.grad = parameter.detach() ** 2
            step_unless(torch.tensor(False), optimizer) if can_skip else optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


# Nothing waits for the device


class CopiesBetweenDevices(TorchDispatchMode):
    """Records the shape of each copy. `tests/runtime/test_devices.py` shows for which the host waits."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        result = operation(*arguments, **(options or {}))
        tensors = [value for value in (result, *arguments) if isinstance(value, torch.Tensor)]
        if "copy" in str(operation) and len({tensor.device for tensor in tensors}) > 1:
            self.seen.append(tuple(result.shape))
        return result


@pytest.fixture
def meta_run(tiny_config, tmp_path, monkeypatch):
    """meta_run(skip_outliers, kind of optimizer, is_fp16) on torch's meta device, which holds no numbers.

    Reading one raises.
    """
    from modeling_gpt2repro import GPT2ReproForCausalLM

    meta = torch.device("meta")
    tiny_config.n_layer = 1
    monkeypatch.setattr(Accelerator, "device", meta)
    # Kernels only infer shapes there, the fused optimizer's too, which torch does not offer.
    monkeypatch.setattr(sys.modules["torch.optim.optimizer"], "_get_fused_kernels_supported_devices", lambda: ["meta"])

    def run(skip_outliers: bool, kind: str, is_fp16: bool) -> SimpleNamespace:
        with meta:
            model = GPT2ReproForCausalLM(tiny_config).train()
        accelerator = accelerator_for(2)
        optimizer = build_optimizer(model, 1e-3, optimizer=kind)
        groups = [{**group, "fused": True} for group in optimizer.param_groups]
        optimizer = type(optimizer)(groups, fused=True)
        model, optimizer = accelerator.prepare(ModelWithLoss(model), optimizer, device_placement=[False, False])
        if is_fp16:
            in_fp16(accelerator)
        sequences = TokenSequences([np.arange(1000) % 97], 32)
        return SimpleNamespace(
            accelerator=accelerator,
            reader=ReadAhead(ShuffledBatches(sequences, BatchConfig(32, 4, 2, seed=1)), total_steps=100),
            model=model,
            optimizer=optimizer,
            detector=OutlierDetector(meta, skip_outliers),
            logger=RunLogger(
                accelerator,
                MetricsLog(tmp_path, None, enabled=True),
                total_steps=100,
                tokens_per_step=4 * 32,
                logging_steps=2,
            ),
        )

    yield run
    AcceleratorState._reset_state(reset_partial_state=True)  # later tests are not in fp16


@pytest.mark.parametrize("is_fp16", [False, True])
@pytest.mark.parametrize("skip_outliers", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_device_is_waited_for_at_logging_steps_only(meta_run, skip_outliers, kind, is_fp16, monkeypatch):
    run = meta_run(skip_outliers, kind, is_fp16)
    reads = []

    def read(numbers: torch.Tensor) -> list[list[float]]:
        reads.append(tuple(numbers.shape))
        return [[3.0, 1.0, 0.0, 65536.0, 0.0][:width]] * len(numbers)

    width = 5 if is_fp16 else 3  # loss, norm and whether it was skipped; loss scale, and whether it was too large
    monkeypatch.setattr(torch.Tensor, "tolist", read)
    with CopiesBetweenDevices() as copies:
        for step in range(1, 6):
            take_step_as_main_does(run, step)
            # Of the first step alone, then after every second step.
            assert reads == [(1, width), (1, width), (2, width)][: 1 + step // 2]
    assert copies.seen == [(2, 32)] * (5 * 2 * 2)  # steps, micro-batches of each, tensors of those


def take_step_as_main_does(run: SimpleNamespace, step: int):
    """The body of the loop in train_accelerate.py."""
    learning_rate = learning_rate_at(step - 1, 100, 10, 1e-3, 0.1)
    set_learning_rate(run.optimizer, learning_rate)
    assert run.reader.wait_for(step - 1) is None
    metrics = train_step(
        run.accelerator,
        run.model,
        run.optimizer,
        run.reader.micro_batches(step - 1),
        tokens_per_step=4 * 32,
        max_grad_norm=1.0,
        detector=run.detector,
    )
    run.logger.log_step(step, metrics, learning_rate, data_seconds=run.reader.waited_seconds)
