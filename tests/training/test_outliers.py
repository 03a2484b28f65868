"""Which updates are skipped: those of a loss or gradient norm that is NaN, infinite or an outlier."""

import math

import pytest
import torch

from modeling_gpt2repro.training.outliers import WINDOW_STEPS, OutlierDetector

CPU = torch.device("cpu")


def skips(detector: OutlierDetector, loss: float, norm: float) -> bool:
    return bool(detector.should_skip(torch.tensor(loss), torch.tensor(norm)))


def normal_values(step: int) -> tuple[float, float]:
    """A loss that falls slowly and a norm, both with noise, the same each time."""
    noise = torch.randn(2, generator=torch.Generator().manual_seed(step)).tolist()
    return 4 - step / 1000 + 0.05 * noise[0], 0.5 + 0.05 * noise[1]


def full_detector(steps: int = WINDOW_STEPS) -> OutlierDetector:
    detector = OutlierDetector(CPU, skip_outliers=True)
    assert not any(skips(detector, *normal_values(step)) for step in range(steps))
    return detector


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("skip_outliers", [False, True])
def test_nan_and_infinity_are_always_skipped(bad, skip_outliers):
    detector = OutlierDetector(CPU, skip_outliers)
    assert skips(detector, bad, 1.0)
    assert skips(detector, 1.0, bad)
    assert not skips(detector, 1.0, 1.0)


def test_outliers_are_skipped_only_when_asked_for():
    detector = OutlierDetector(CPU)
    assert not any(skips(detector, *normal_values(step)) for step in range(200))
    assert not skips(detector, 50.0, 50.0)


@pytest.mark.parametrize(("loss", "norm"), [(5.0, 0.5), (3.9, 5.0)])
def test_an_outlier_of_loss_or_norm_is_skipped(loss, norm):
    assert skips(full_detector(), loss, norm)


def test_the_limit_is_six_robust_deviations_above_the_median():
    detector = OutlierDetector(CPU, skip_outliers=True)
    for step in range(WINDOW_STEPS):  # median 2, median absolute deviation 0.1 for the loss; all equal for the norm
        skips(detector, 2.0 + 0.1 * (step % 3 - 1), 1.0)
    loss_limit, norm_limit = detector.limits().tolist()
    assert loss_limit == pytest.approx(2.0 + 6 * 1.4826 * 0.1, abs=1e-5)
    assert norm_limit == pytest.approx(1.0 + 6 * 0.01, abs=1e-5)


def test_nothing_is_an_outlier_until_the_window_is_full():
    assert not skips(full_detector(WINDOW_STEPS - 1), 50.0, 50.0)
    assert skips(full_detector(WINDOW_STEPS), 50.0, 50.0)


def test_ordinary_noise_and_a_sudden_fall_are_no_outliers():
    detector = full_detector(2000)
    assert not skips(detector, 0.5, 0.01)


def test_outliers_do_not_enter_the_window():
    detector = full_detector()
    assert all(skips(detector, 9.0, 0.5) for _ in range(2 * WINDOW_STEPS))


def test_the_window_moves_with_the_run():
    detector = full_detector()
    for step in range(WINDOW_STEPS):
        assert not skips(detector, 2.0 + 0.05 * normal_values(step)[1], 0.5)  # lower, so never above the limit
    assert skips(detector, 4.0, 0.5)  # was normal once


def test_the_window_is_part_of_the_checkpoint():
    detector = full_detector(150)
    fresh = OutlierDetector(CPU, skip_outliers=True)
    fresh.load_state_dict(detector.state_dict())
    assert torch.equal(fresh.window, detector.window)
    for values in (normal_values(7), (50.0, 0.5), normal_values(8), (3.9, 50.0)):
        assert skips(fresh, *values) == skips(detector, *values)
    assert torch.equal(fresh.window, detector.window)
