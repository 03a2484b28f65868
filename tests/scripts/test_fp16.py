"""Training in fp16 with a loss scale, as on GPUs that have no bf16; here on the CPU, with torch's own scaler."""

import itertools
import json
import math
import re
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from steps import accelerator_for, in_fp16, random_sequences, take_step
from toy_runs import CPU_FP32, TOKENS_PER_STEP, WEIGHTS, logged_values, toy_flags, train_here

import train_accelerate
from modeling_gpt2repro.runs.read import read_metrics
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.training.optimization import OPTIMIZERS, build_optimizer
from modeling_gpt2repro.training.outliers import OutlierDetector

SCALE = 2.0**16  # with which torch's scaler begins
TOO_LARGE = 2.0**26  # for fp16, whose largest number is 65,504
GROWTH_INTERVAL = 7  # instead of 2,000, so that the scale grows within a toy run


@pytest.fixture(autouse=True)
def fresh_accelerators():
    """Accelerate keeps the precision of the first accelerator for all later ones of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_scaled_steps_are_unscaled_ones_bit_for_bit(tiny_config, kind):
    """In fp32, where a power of two changes no digit: what is clipped, logged and applied has to be unscaled."""
    from modeling_gpt2repro import GPT2ReproForCausalLM

    results = []
    for is_scaled in (False, True):
        torch.manual_seed(0)
        model = GPT2ReproForCausalLM(tiny_config)
        accelerator = accelerator_for(2)
        model, optimizer = accelerator.prepare(ModelWithLoss(model), build_optimizer(model, 1e-2, optimizer=kind))
        if is_scaled:
            in_fp16(accelerator)
        steps = [
            take_step(accelerator, model, optimizer, random_sequences(8, seed=seed), 4, max_grad_norm=0.5)
            for seed in range(3)
        ]
        numbers = [(step.loss.item(), step.grad_norm.item()) for step in steps]
        results.append((numbers, [parameter.detach().clone() for parameter in model.parameters()]))
        assert [step.loss_scale for step in steps] == [SCALE if is_scaled else None] * 3
    (expected, expected_weights), (scaled, scaled_weights) = results
    assert scaled == expected
    assert all(norm > 0.5 for _, norm in expected)  # all are clipped
    for a, b in zip(scaled_weights, expected_weights, strict=True):
        assert torch.equal(a, b)


def test_fp16_gives_nearly_the_losses_of_fp32_with_weights_in_fp32(tiny_config):
    from modeling_gpt2repro import GPT2ReproForCausalLM

    losses = []
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        model = GPT2ReproForCausalLM(tiny_config)
        accelerator = accelerator_for(2)
        if precision == "fp16":
            in_fp16(accelerator)
        model, optimizer = accelerator.prepare(ModelWithLoss(model), build_optimizer(model, 1e-3))
        losses.append([take_step(accelerator, model, optimizer, random_sequences(8), 4).loss.item() for _ in range(4)])
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], abs=2e-3)
    assert losses[1] != losses[0]


# Steps without an update


def weights_and_moments(model, optimizer) -> list[torch.Tensor]:
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return [parameter.detach() for parameter in model.parameters()] + moments


@pytest.fixture(params=[(kind, fused) for kind in OPTIMIZERS for fused in (True, False)], ids=str)
def fp16_run(request, tiny_model):
    """fp16_run(**of the scaler) -> accelerator, model and optimizer after one step."""
    kind, fused = request.param

    def start(**scaler):
        accelerator = in_fp16(accelerator_for(1), **scaler)
        bare = build_optimizer(tiny_model.train(), 1e-2, optimizer=kind)
        if not fused:
            groups = [{**group, "fused": False} for group in bare.param_groups]
            bare = type(bare)(groups, lr=1e-2, fused=False)
        prepared = accelerator.prepare(ModelWithLoss(tiny_model), bare)
        assert step(accelerator, *prepared).skipped == 0
        return accelerator, *prepared

    return start


def step(accelerator, model, optimizer):
    return take_step(accelerator, model, optimizer, random_sequences(4), micro_batch_size=4)


def test_a_step_that_overflows_changes_the_scale_alone(fp16_run):
    accelerator, model, optimizer = fp16_run()
    before = [tensor.clone() for tensor in weights_and_moments(model, optimizer)]
    accelerator.scaler.update(TOO_LARGE)
    scales = []
    metrics = step(accelerator, model, optimizer)
    while metrics.overflowed:
        scales.append(metrics.loss_scale.item())
        assert metrics.skipped
        assert metrics.loss.isfinite()
        assert not metrics.grad_norm.isfinite()
        for old, new in zip(before, weights_and_moments(model, optimizer), strict=True):
            assert torch.equal(old, new)
        metrics = step(accelerator, model, optimizer)
    assert scales == [TOO_LARGE / 2**n for n in range(len(scales))]
    assert len(scales) > 1
    assert not torch.equal(before[0], next(model.parameters()))


def test_nan_is_skipped_as_a_fault_and_the_scaler_sees_it_too(fp16_run):
    accelerator, model, optimizer = fp16_run()
    before = [tensor.clone() for tensor in weights_and_moments(model, optimizer)]
    with torch.no_grad():
        saved = model.model.lm_head.weight[3, 3].clone()
        model.model.lm_head.weight[3, 3] = math.nan
    metrics = step(accelerator, model, optimizer)
    with torch.no_grad():
        model.model.lm_head.weight[3, 3] = saved
    assert metrics.skipped
    assert not metrics.overflowed
    assert accelerator.scaler.get_scale() == SCALE / 2
    for old, new in zip(before, weights_and_moments(model, optimizer), strict=True):
        assert torch.equal(old, new)
    assert not step(accelerator, model, optimizer).skipped


def test_an_outlier_is_skipped_and_leaves_the_scale(fp16_run, monkeypatch):
    """Its gradients are finite: the scaler alone would take the step."""
    accelerator, model, optimizer = fp16_run()
    before = [tensor.clone() for tensor in weights_and_moments(model, optimizer)]
    monkeypatch.setattr(OutlierDetector, "should_skip", lambda self, loss, norm: torch.tensor(True))
    metrics = step(accelerator, model, optimizer)
    assert (bool(metrics.skipped), bool(metrics.overflowed)) == (True, False)
    assert accelerator.scaler.state_dict()["scale"] == SCALE
    assert accelerator.scaler.state_dict()["_growth_tracker"] == 2
    for old, new in zip(before, weights_and_moments(model, optimizer), strict=True):
        assert torch.equal(old, new)


def test_the_scale_grows_after_so_many_steps_without_overflow(fp16_run):
    run = fp16_run(growth_interval=3, init_scale=4.0)
    assert [step(*run).loss_scale.item() for _ in range(6)] == [4, 4, 8, 8, 8, 16]


# Whole runs


@pytest.fixture
def train_in_fp16(shards, monkeypatch):
    """As `train_here`, in fp16 with a scale that is too large at first; 20 steps with one evaluation."""
    build = train_accelerate.build_accelerator
    shorter = {"train_tokens": 20 * TOKENS_PER_STEP, "eval_steps": 0, "hellaswag": "none", "num_samples": 1}

    def train(output_dir, **flags) -> int:
        with monkeypatch.context() as patch:
            options = {"init_scale": TOO_LARGE, "growth_interval": GROWTH_INTERVAL}
            patch.setattr(train_accelerate, "build_accelerator", lambda **given: in_fp16(build(**given), **options))
            return train_here(output_dir, shards, **{**shorter, **flags})

    return train


def state_of(run, step: int) -> dict:
    return json.loads((run / f"step-{step:06}/training_state/state.json").read_text())


def test_a_run_finds_its_scale_and_resumes_bit_for_bit(train_in_fp16, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_in_fp16(run) == 0
    printed = capsys.readouterr().out
    assert "precision    fp16" in printed
    records = [record for record in read_metrics(run) if "loss" in record]
    overflows = [record["step"] for record in records if "overflowed" in record]
    scales = [record["loss_scale"] for record in records]
    assert overflows[:2] == [1, 2]
    assert printed.count("no update, because gradients overflowed in fp16") == len(overflows)
    assert f"step      1: no update, because gradients overflowed in fp16 at the loss scale {TOO_LARGE:,.0f}" in printed
    assert "skipped" not in printed
    assert not [record for record in read_metrics(run) if "skipped" in record or record.get("event") == "skipped"]
    assert all(math.isfinite(record["loss"]) for record in records)
    assert any(after > before for before, after in itertools.pairwise(scales))
    tenth, last = (state_of(run, step)["loss_scale"] for step in (10, 20))
    assert tenth["scale"] == scales[10]  # the next step's
    assert 0 < tenth["_growth_tracker"] < GROWTH_INTERVAL

    weights = (run / WEIGHTS).read_bytes()
    losses = logged_values(run)
    for later in ("step-000020", "model"):
        shutil.rmtree(run / later)
    assert train_in_fp16(run, resume_from_checkpoint="latest") == 0
    assert "resuming from step 10" in capsys.readouterr().out
    assert logged_values(run) == losses
    assert logged_values(run, "loss_scale") == scales
    assert (run / WEIGHTS).read_bytes() == weights
    assert state_of(run, 20)["loss_scale"] == last


def test_a_run_changes_its_precision_when_it_resumes(train_in_fp16, finished, shards, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run, ignore=shutil.ignore_patterns("step-000020", "step-000030", "model"))
    assert "loss_scale" not in state_of(run, 10)
    assert train_in_fp16(run, resume_from_checkpoint="latest", max_skipped=1) == 0
    assert logged_values(run, "loss_scale")[0] == TOO_LARGE
    assert state_of(run, 20)["loss_scale"]["scale"] < TOO_LARGE
    assert train_here(run, shards, resume_from_checkpoint="latest") == 0
    assert "resuming from step 20" in capsys.readouterr().out
    assert "loss_scale" not in state_of(run, 30)


def test_a_preflight_finds_the_scale_and_no_problem(train_in_fp16, tmp_path, capsys):
    assert train_in_fp16(tmp_path / "run", preflight=True) == 0
    assert "not usable" not in capsys.readouterr().out


TWO_PROCESSES = """
import itertools
import math
import os
import sys
import torch
import train_accelerate
from steps import in_fp16

build, take_step, scale = train_accelerate.build_accelerator, train_accelerate.train_step, torch.amp.GradScaler.scale
losses = itertools.count(1)

def overflow_on_one(self, value):  # in the first of the two micro-batches of step 3
    too_large = value.requires_grad and next(losses) == 5 and os.environ["RANK"] == "1"
    return scale(self, value) * (math.inf if too_large else 1)

def show_step(accelerator, model, *others, **limits):
    metrics = take_step(accelerator, model, *others, **limits)
    norm = sum(parameter.double().norm() for parameter in model.parameters())
    print("seen:", *(value.item() for value in metrics), norm.item(), accelerator.scaler.state_dict())
    return metrics

torch.amp.GradScaler.scale = overflow_on_one
train_accelerate.train_step = show_step
train_accelerate.build_accelerator = lambda **given: in_fp16(build(**given))
train_accelerate.main(sys.argv[1:])
"""


def test_an_overflow_on_one_process_skips_the_step_on_both(shards, warm_python, tmp_path):
    flags = {"per_device_train_batch_size": 2, "train_tokens": 5 * TOKENS_PER_STEP, "eval_steps": 0, "num_samples": 0}
    flags = toy_flags(tmp_path / "run", shards, **flags | {"hellaswag": "none"})
    results = warm_python.run_together(2, "-c", TWO_PROCESSES, *flags, **CPU_FP32)
    seen = [re.findall("^seen: .*", result.stdout, re.MULTILINE) for result in results]
    assert seen[0] == seen[1]
    assert len(set(seen[0])) == 5
    assert [record.get("overflowed") for record in read_metrics(tmp_path / "run") if "loss" in record] == [
        *(None, None, True, None, None)
    ]
    assert logged_values(tmp_path / "run", "loss_scale") == [SCALE, SCALE, SCALE, SCALE / 2, SCALE / 2]
