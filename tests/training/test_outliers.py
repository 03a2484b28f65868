"""Steps that are not to be taken: what is no number, what is far out of the usual."""

import math

import pytest
import torch
from test_training import accelerator_for, random_rows, step_of

from modeling_gpt2repro.training.optimization import build_optimizer
from modeling_gpt2repro.training.outliers import WINDOW_STEPS, OutlierDetector
from modeling_gpt2repro.training.state import TrainState
from train_accelerate import step_unless

CPU = torch.device("cpu")


def rejected(guard: OutlierDetector, loss: float, norm: float) -> bool:
    return bool(guard.should_skip(torch.tensor(loss), torch.tensor(norm)))


def usual(step: int) -> tuple[float, float]:
    """A loss that falls slowly and a norm, both with noise, the same each time."""
    noise = torch.randn(2, generator=torch.Generator().manual_seed(step)).tolist()
    return 4 - step / 1000 + 0.05 * noise[0], 0.5 + 0.05 * noise[1]


def full_guard(steps: int = WINDOW_STEPS) -> OutlierDetector:
    guard = OutlierDetector(CPU, skip_outliers=True)
    assert not any(rejected(guard, *usual(step)) for step in range(steps))
    return guard


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("skip_outliers", [False, True])
def test_what_is_no_number_is_always_rejected(bad, skip_outliers):
    guard = OutlierDetector(CPU, skip_outliers)
    assert rejected(guard, bad, 1.0)
    assert rejected(guard, 1.0, bad)
    assert not rejected(guard, 1.0, 1.0)


@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_changes_nothing(tiny_model, fused):
    accelerator = accelerator_for(1)
    bare = build_optimizer(tiny_model, 1e-2)
    if not fused:
        bare = torch.optim.AdamW(tiny_model.parameters(), lr=1e-2, fused=False)
    model, optimizer = accelerator.prepare(tiny_model, bare)
    step_of(accelerator, model, optimizer, random_rows(4), 4)
    before = [tensor.clone() for tensor in state_of(model, optimizer)]
    with torch.no_grad():
        saved = model.lm_head.weight[3, 3].clone()
        model.lm_head.weight[3, 3] = math.nan
    numbers = step_of(accelerator, model, optimizer, random_rows(4), 4)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = saved
    assert numbers.skipped
    for was, now in zip(before, state_of(model, optimizer), strict=True):
        assert torch.equal(was, now)
    assert not step_of(accelerator, model, optimizer, random_rows(4), 4).skipped
    assert not torch.equal(before[0], next(model.parameters()))


def state_of(model, optimizer) -> list[torch.Tensor]:
    moments = [tensor for state in optimizer.state.values() for tensor in state.values()]
    return [parameter.detach() for parameter in model.parameters()] + moments


def test_a_step_that_is_taken_is_that_of_plain_adamw(tiny_model):
    weights = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    results = []
    for guarded in (True, False):
        parameter = torch.nn.Parameter(weights.clone())
        optimizer = torch.optim.AdamW([parameter], lr=1e-2, fused=True)
        for _ in range(3):
            parameter.grad = parameter.detach() ** 2
            step_unless(torch.tensor(False), optimizer) if guarded else optimizer.step()
        results.append(parameter.detach())
    assert torch.equal(*results)


def test_outliers_are_rejected_only_when_asked_for():
    guard = OutlierDetector(CPU)
    assert not any(rejected(guard, *usual(step)) for step in range(200))
    assert not rejected(guard, 50.0, 50.0)


@pytest.mark.parametrize(("loss", "norm"), [(5.0, 0.5), (3.9, 5.0)])
def test_an_outlier_of_either_number_is_rejected(loss, norm):
    assert rejected(full_guard(), loss, norm)


def test_the_limit_is_six_robust_deviations_above_the_median():
    guard = OutlierDetector(CPU, skip_outliers=True)
    for step in range(WINDOW_STEPS):  # median 2, median absolute deviation 0.1 for the loss; all equal for the norm
        rejected(guard, 2.0 + 0.1 * (step % 3 - 1), 1.0)
    loss_limit, norm_limit = guard.limits().tolist()
    assert loss_limit == pytest.approx(2.0 + 6 * 1.4826 * 0.1, abs=1e-5)
    assert norm_limit == pytest.approx(1.0 + 6 * 0.01, abs=1e-5)


def test_the_rule_rests_until_the_window_is_full():
    assert not rejected(full_guard(WINDOW_STEPS - 1), 50.0, 50.0)
    assert rejected(full_guard(WINDOW_STEPS), 50.0, 50.0)


def test_ordinary_noise_and_a_sudden_fall_are_no_outliers():
    guard = full_guard(2000)
    assert not rejected(guard, 0.5, 0.01)


def test_the_window_does_not_take_in_outliers():
    guard = full_guard()
    assert all(rejected(guard, 9.0, 0.5) for _ in range(2 * WINDOW_STEPS))


def test_the_window_moves_on_with_the_run():
    guard = full_guard()
    for step in range(WINDOW_STEPS):
        assert not rejected(guard, 2.0 + 0.05 * usual(step)[1], 0.5)  # lower, so never above the limit
    assert rejected(guard, 4.0, 0.5)  # usual once


def test_the_window_is_part_of_the_checkpoint():
    guard, fresh = full_guard(150), OutlierDetector(CPU, skip_outliers=True)
    fresh.load_state_dict(guard.state_dict())
    assert torch.equal(fresh.window, guard.window)
    for values in (usual(7), (50.0, 0.5), usual(8), (3.9, 50.0)):
        assert rejected(fresh, *values) == rejected(guard, *values)
    assert torch.equal(fresh.window, guard.window)


def test_only_steps_next_to_each_other_are_in_a_row():
    progress = TrainState()
    assert [progress.record_skip(step) for step in (3, 4, 5, 7, 8)] == [1, 2, 3, 1, 2]
