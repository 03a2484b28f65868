"""HellaSwag's accuracies: counts that add up, 95 % intervals, and where a model stands among published numbers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from .examples import PROTOCOLS
from .score import ExampleScores

# model, protocol, acc, acc_norm, source. All on the 10,042 validation rows, without examples in the context.
BASELINES = (
    ("gpt2", "completion", 0.2859, 0.2955, "build-nanogpt, hellaswag.py"),
    ("gpt2", "completion", None, 0.294463, "build-nanogpt, notebook"),
    ("gpt2-medium", "completion", None, 0.375224, "build-nanogpt, notebook"),
    ("gpt2-large", "completion", None, 0.431986, "build-nanogpt, notebook"),
    ("gpt2-xl", "completion", 0.3842, 0.4893, "build-nanogpt, hellaswag.py"),
    # By OpenAI's unpublished code; build-nanogpt sets it beside its own numbers.
    ("GPT-3 124M", "completion", None, 0.337, "Brown et al. 2020"),
    ("gpt2", "lm-eval", 0.2892, 0.3114, "lm-evaluation-harness"),
    ("gpt2-xl", "lm-eval", 0.4004, 0.5089, "lm-evaluation-harness"),
)
Z95 = 1.959964  # the normal distribution's 97.5 % point


def count_rows(results: Iterable[ExampleScores]) -> dict[str, int]:
    """{"correct", "correct_norm", "rows"}: whole numbers, which processes can add up."""
    right = [(result.correct, result.correct_norm) for result in results]
    return {"correct": sum(a for a, _ in right), "correct_norm": sum(b for _, b in right), "rows": len(right)}


def count_correct(results: Sequence[ExampleScores], protocols: Sequence[str] = PROTOCOLS) -> dict[str, dict[str, int]]:
    """{protocol: `count_rows` of its results}."""
    return {protocol: count_rows(r for r in results if r.protocol == protocol) for protocol in protocols}


def summary_of(count: Mapping[str, int]) -> dict[str, float | int | tuple[float, float]]:
    """The counts of all rows, acc and acc_norm, and their 95 % intervals (Wilson's)."""
    summary = dict(count)
    for name, correct in (("acc", count["correct"]), ("acc_norm", count["correct_norm"])):
        summary[name] = correct / count["rows"]
        summary[f"{name}_interval"] = wilson_interval(correct, count["rows"])
    return summary


def wilson_interval(correct: int, rows: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927), sound for 0 of n too: 3000 of 10000 -> 0.2911, 0.3091."""
    z = Z95
    middle = (correct + z * z / 2) / (rows + z * z)
    half = z / (rows + z * z) * math.sqrt(correct * (rows - correct) / rows + z * z / 4)
    return max(0.0, middle - half), min(1.0, middle + half)  # rounding reaches past the ends


class Baseline(NamedTuple):
    """A published acc_norm; `within_interval`: it lies in the 95 % interval of what was measured.

    That interval is of one model alone. Both are of the same rows, so whether two models differ, only --compare says.
    """

    model: str
    acc_norm: float
    within_interval: bool


class BaselineRank(NamedTuple):
    """What a model has passed, the lowest first, and what comes next; None where nothing is left to pass."""

    passed: list[Baseline]
    next: Baseline | None

    def as_json(self) -> dict:
        """{"passed": [{"model": "gpt2", "acc_norm": 0.2955, "within_interval": False}], "next": {...}}."""
        return {
            "passed": [yardstick._asdict() for yardstick in self.passed],
            "next": self.next and self.next._asdict(),
        }


def baseline_rank(protocol: str, acc_norm: float, interval: tuple[float, float]) -> BaselineRank:
    """Where an acc_norm over all official rows stands among the published ones of its protocol.

    Of several figures for one model the highest counts.
    """
    published = {}
    for model, its_protocol, _, figure, _ in BASELINES:
        if its_protocol == protocol:
            published[model] = max(figure, published.get(model, 0.0))
    low, high = interval
    yardsticks = [
        Baseline(model, figure, low <= figure <= high)
        for model, figure in sorted(published.items(), key=lambda item: item[1])
    ]
    passed = [yardstick for yardstick in yardsticks if yardstick.acc_norm < acc_norm]
    return BaselineRank(passed, next(iter(yardsticks[len(passed) :]), None))
