"""Curves that stay legible: a running mean, few enough points to draw, and the range that an axis should show."""

from collections.abc import Sequence

import numpy as np

POINTS = 1000  # about as many as a panel has pixels


def mean_width(count: int, share: float = 0.02) -> int:
    """How many values a running mean of `count` takes together: `share` of them, an odd number."""
    return 2 * int(share * count / 2) + 1


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of each value (n,) and its neighbours, `width` in all; fewer at the ends.

    Its middle is the value itself, so the curve is not late, as a mean of the past would be while the loss falls.
    """
    half, count = width // 2, len(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first, last = np.maximum(np.arange(count) - half, 0), np.minimum(np.arange(count) + half + 1, count)
    return (sums[last] - sums[first]) / (last - first)


def downsample(x: np.ndarray, y: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` of the points (n,): the lowest and the highest of each stretch, so that no spike is lost."""
    if len(x) <= points:
        return x, y
    stretches = np.array_split(np.arange(len(x)), points // 2)
    kept = np.unique([i for part in stretches for i in (part[np.argmin(y[part])], part[np.argmax(y[part])])])
    return x[kept], y[kept]


def axis_limits(
    values: np.ndarray, yardsticks: Sequence[float] = (), below: float = 0.0, above: float = 0.0
) -> tuple[float, float]:
    """The lowest and highest value (n,) that an axis shows: all but the highest 2 % of many, the fall at the start.

    Args:
        yardsticks: Taken in where they lie at most so much `below` or `above` that.
    """
    low, high = float(values.min()), float(np.percentile(values, 98, method="higher"))
    near = [yardstick for yardstick in yardsticks if low - below <= yardstick <= high + above]
    low, high = min([low, *near]), max([high, *near])
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + (2 if high in near else 1) * margin  # a yardstick's name stands above it
