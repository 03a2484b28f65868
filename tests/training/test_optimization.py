"""The learning rate schedule, the decay groups, and the fused optimizer."""

import itertools

import accelerate.utils.versions
import pytest
import torch
from packaging.version import Version
from toy_runs import toy_flags

import train_accelerate
from modeling_gpt2repro.training.optimization import (
    OPTIMIZERS,
    build_optimizer,
    learning_rate_at,
    scheduled_learning_rate,
)


def test_the_rate_warms_up_linearly_and_falls_to_a_tenth():
    rates = [learning_rate_at(step, 19073, 715, 6e-4, 0.1) for step in range(19074)]
    assert rates[0] == pytest.approx(6e-4 / 715)
    assert rates[714] == rates[715] == 6e-4 == max(rates)
    assert rates[(715 + 19073) // 2] == pytest.approx(3.3e-4)
    assert rates[-1] == pytest.approx(6e-5)
    assert all(a >= b for a, b in itertools.pairwise(rates[715:]))


@pytest.mark.parametrize(
    ("schedule", "cooldown_steps", "expected"),
    [
        ("linear", 0, {10: 1.0, 55: 0.5, 99: 1 / 90, 100: 0.0, 120: 0.0}),
        ("constant", 0, {10: 1.0, 55: 1.0, 99: 1.0, 120: 1.0}),
        ("wsd", 20, {10: 1.0, 80: 1.0, 90: 0.5, 99: 0.05, 100: 0.0, 120: 0.0}),
        ("wsd", 90, {10: 1.0, 55: 0.5, 99: 1 / 90}),  # all of it: the linear one
    ],
)
def test_after_the_same_warm_up_each_schedule_has_its_shape(schedule, cooldown_steps, expected):
    rates = [learning_rate_at(step, 100, 10, 1.0, 0.0, schedule, cooldown_steps) for step in range(121)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert {step: rates[step] for step in expected} == pytest.approx(expected)


def test_a_stable_run_can_be_cooled_down_at_any_checkpoint_without_a_jump():
    stable = toy_schedule(lr_scheduler_type="wsd", train_tokens=1000, cooldown_tokens=200)
    cooled = toy_schedule(lr_scheduler_type="wsd", train_tokens=500, cooldown_tokens=100)  # from step 40 on
    assert scheduled_learning_rate(stable, 40) == scheduled_learning_rate(cooled, 40) == 1e-3
    assert scheduled_learning_rate(cooled, 45) == pytest.approx(5e-4)
    assert scheduled_learning_rate(stable, 45) == 1e-3


def test_a_schedule_of_an_older_checkpoint_is_a_cosine():
    older = {k: v for k, v in toy_schedule().items() if k not in ("lr_scheduler_type", "cooldown_tokens")}
    assert scheduled_learning_rate(older, 70) == learning_rate_at(70, 100, 10, 1e-3, 0.0)


def toy_schedule(**changed) -> dict:
    """100 steps of 10 tokens, 10 of them warm-up."""
    lengths = {"train_tokens": 1000, "tokens_per_step": 10, "warmup_tokens": 100, "cooldown_tokens": None}
    rates = {"lr_scheduler_type": "cosine", "learning_rate": 1e-3, "final_learning_rate_ratio": 0.0}
    return lengths | rates | changed


def test_only_matrices_and_embeddings_are_decayed(tiny_model):
    optimizer = build_optimizer(tiny_model, 1e-3, weight_decay=0.1)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in tiny_model.named_parameters():
        is_matrix = name.endswith("weight") and ".ln_" not in name
        assert decay[id(parameter)] == (0.1 if is_matrix else 0.0), name
    assert len(decay) == len(list(tiny_model.parameters()))


@pytest.mark.parametrize(
    ("device", "torch_version", "fused"),
    [
        ("cpu", "2.11.0", True),
        ("cuda:1", "2.11.0", True),
        ("mps", "2.12.1", False),
        ("mps", "2.13.0", True),
        ("mps", "2.14.0+git1", True),
        ("xpu", "2.13.0", False),
        ("hpu", "2.13.0", False),
    ],
)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizer_is_fused_where_the_kernel_can_skip_a_step(
    tiny_model, kind, device, torch_version, fused, monkeypatch
):
    """The model is still on the CPU then."""
    monkeypatch.setattr(accelerate.utils.versions, "torch_version", Version(torch_version))
    optimizer = build_optimizer(tiny_model, 1e-3, optimizer=kind, device=torch.device(device))
    assert optimizer.defaults["fused"] is fused


def test_by_default_the_optimizer_is_for_the_device_where_the_model_is(tiny_model):
    assert build_optimizer(tiny_model, 1e-3).defaults["fused"]
    assert not build_optimizer(tiny_model.to("meta"), 1e-3).defaults["fused"]


def test_the_script_builds_the_optimizer_for_the_device_where_the_model_will_be(shards, tmp_path, monkeypatch):
    def build(*arguments, device, **options):
        raise SystemExit(f"for {device}")

    monkeypatch.setattr(train_accelerate, "build_optimizer", build)
    monkeypatch.setattr(accelerate.Accelerator, "device", torch.device("mps"))
    with pytest.raises(SystemExit, match="for mps"):
        train_accelerate.main(toy_flags(tmp_path / "run", shards, hellaswag="none"))
