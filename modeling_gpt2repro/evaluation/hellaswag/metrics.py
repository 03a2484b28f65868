"""HellaSwag's accuracies, their 95 % intervals, and the published accuracies that a model has passed."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .examples import PROTOCOLS
from .score import ExampleScores, gather_scores, score_task, without_autocast
from .tokenize import HellaSwagTask

# model, protocol, acc, acc_norm, source. All on the 10,042 validation examples, zero-shot.
BASELINES = (
    ("gpt2", "completion", 0.2859, 0.2955, "build-nanogpt, hellaswag.py"),
    ("gpt2", "completion", None, 0.294463, "build-nanogpt, notebook"),
    ("gpt2-medium", "completion", None, 0.375224, "build-nanogpt, notebook"),
    ("gpt2-large", "completion", None, 0.431986, "build-nanogpt, notebook"),
    ("gpt2-xl", "completion", 0.3842, 0.4893, "build-nanogpt, hellaswag.py"),
    # Measured by OpenAI's unpublished code; build-nanogpt shows it beside its own numbers.
    ("GPT-3 124M", "completion", None, 0.337, "Brown et al. 2020"),
    ("gpt2", "lm-eval", 0.2892, 0.3114, "lm-evaluation-harness"),
    ("gpt2-xl", "lm-eval", 0.4004, 0.5089, "lm-evaluation-harness"),
)
Z95 = 1.959964  # the normal distribution's 97.5 % quantile

Summary = dict[str, float | int | tuple[float, float]]


def summarize(scores: Sequence[ExampleScores]) -> Summary:
    """Accuracies of one protocol: correct, correct_norm, rows, acc, acc_interval, acc_norm, acc_norm_interval.

    Raises:
        ValueError: If there are no scores.
    """
    if not scores:
        raise ValueError("there are no examples to compute an accuracy of: give the scores of at least one.")
    rows = len(scores)
    correct = sum(example_scores.correct for example_scores in scores)
    correct_norm = sum(example_scores.correct_norm for example_scores in scores)
    return {
        "correct": correct,
        "correct_norm": correct_norm,
        "rows": rows,
        "acc": correct / rows,
        "acc_interval": wilson_interval(correct, rows),
        "acc_norm": correct_norm / rows,
        "acc_norm_interval": wilson_interval(correct_norm, rows),
    }


def summarize_by_protocol(scores: Sequence[ExampleScores], protocols: Sequence[str] = PROTOCOLS) -> dict[str, Summary]:
    """{protocol: `summarize` of its scores}."""
    return {protocol: summarize([s for s in scores if s.protocol == protocol]) for protocol in protocols}


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), valid for 0 of n, too: 3000 of 10000 -> 0.2911, 0.3091."""
    z = Z95
    center = (correct + z * z / 2) / (total + z * z)
    half_width = z / (total + z * z) * math.sqrt(correct * (total - correct) / total + z * z / 4)
    return max(0.0, center - half_width), min(1.0, center + half_width)  # rounding can exceed [0, 1]


def evaluate_hellaswag(model: nn.Module, task: HellaSwagTask) -> tuple[dict[str, float], list[ExampleScores]]:
    """Score the examples of all processes, in the precision of the weights.

    Args:
        model: Unwrapped: each process scores its share at its own pace, and they meet when all are done.
        task: This process's share.

    Returns:
        Numbers for metrics.jsonl, `hellaswag_completion_acc`, `hellaswag_completion_acc_low` and `_high` (the bounds of
        the 95 % interval), ..., `hellaswag_seconds`; and the scores of all processes.
    """
    started = time.perf_counter()
    with without_autocast(model):
        scores = gather_scores(score_task(model, task))
    numbers = {}
    for protocol, summary in summarize_by_protocol(scores, task.protocols).items():
        for metric in ("acc", "acc_norm"):
            name = f"hellaswag_{protocol.replace('-', '_')}_{metric}"
            low, high = summary[f"{metric}_interval"]
            numbers |= {name: summary[metric], f"{name}_low": low, f"{name}_high": high}
    numbers["hellaswag_seconds"] = time.perf_counter() - started
    return numbers, scores


@dataclass(frozen=True)
class Baseline:
    """A published acc_norm, and whether it lies in the 95 % interval of the measured one.

    That interval ignores that both are of the same examples: whether two models differ, only --compare can tell.
    """

    model: str
    acc_norm: float
    within_interval: bool


@dataclass(frozen=True)
class BaselineRank:
    """The published models that a model has passed, the lowest first, and the next one; None after the last."""

    passed: list[Baseline]
    next: Baseline | None


def baseline_rank(protocol: str, acc_norm: float, interval: tuple[float, float]) -> BaselineRank:
    """Rank an acc_norm on all official examples among the published ones of its protocol.

    Where several figures are published for a model, the highest one counts.
    """
    published: dict[str, float] = {}
    for model, its_protocol, _, its_acc_norm, _ in BASELINES:
        if its_protocol == protocol:
            published[model] = max(its_acc_norm, published.get(model, 0.0))
    low, high = interval
    ascending = sorted(published.items(), key=lambda item: item[1])
    baselines = [Baseline(model, figure, within_interval=low <= figure <= high) for model, figure in ascending]
    passed = [baseline for baseline in baselines if baseline.acc_norm < acc_norm]
    return BaselineRank(passed, next(iter(baselines[len(passed) :]), None))
