"""HellaSwag's accuracies: worked by hand, their intervals, the metric for `evaluate`, the rank among published ones."""

import math
import socket
from dataclasses import asdict, replace

import numpy as np
import pytest

from modeling_gpt2repro.evaluation.hellaswag.metrics import (
    BASELINES,
    baseline_rank,
    summarize_by_protocol,
    wilson_interval,
)
from modeling_gpt2repro.evaluation.hellaswag.report import rank_sentence
from modeling_gpt2repro.evaluation.hellaswag.score import ExampleScores

# By sum the last ending is best; by length the second (-8 / 4 = -2), as an empty one must not win.
SCORES = ExampleScores(0, "lm-eval", 1, (-5.0, -8.0, -9.0, -1.5), (2, 4, 3, 0))


def test_a_summary_worked_by_hand():
    assert (SCORES.correct, SCORES.correct_norm) == (False, True)
    results = [SCORES, replace(SCORES, index=1, label=0), replace(SCORES, index=2), replace(SCORES, index=3, label=3)]
    summary = summarize_by_protocol(results, ["lm-eval"])["lm-eval"]
    assert (summary["rows"], summary["acc"], summary["acc_norm"]) == (4, 0.25, 0.5)
    # Wilson's interval of 2 of 4: (2 + z²/2 ± z sqrt(1 + z²/4)) / (4 + z²), z = 1.96.
    assert summary["acc_norm_interval"] == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_an_example_with_a_score_that_is_not_finite_counts_as_wrong(score):
    for ending in range(4):
        totals = [-5.0, -8.0, -9.0, -6.0]
        totals[ending] = score
        for label in range(4):
            scores = ExampleScores(0, "completion", label, tuple(totals), (2, 4, 3, 2))
            assert (scores.prediction, scores.prediction_norm) == (None, None)
            assert not scores.correct
            assert not scores.correct_norm


def test_a_model_is_ranked_among_the_published_numbers_of_its_protocol():
    rank = baseline_rank("completion", 0.31, (0.3010, 0.3191))
    assert rank_sentence("completion", rank) == "completion: passed gpt2 (0.2955); next GPT-3 124M (0.3370)"
    rank = baseline_rank("completion", 0.2960, (0.2871, 0.3050))
    assert rank_sentence("completion", rank) == (
        "completion: passed gpt2 (0.2955, inside the 95 % interval); next GPT-3 124M (0.3370)"
    )
    # Two figures are published for gpt2: a model must exceed the higher one.
    assert baseline_rank("completion", 0.2950, (0.2861, 0.3039)).passed == []
    assert baseline_rank("completion", 0.2955, (0.2866, 0.3044)).passed == []  # equal is not better
    rank = baseline_rank("lm-eval", 0.51, (0.5002, 0.5198))
    assert rank_sentence("lm-eval", rank).endswith("gpt2-xl (0.5089, inside the 95 % interval); next none")
    assert asdict(rank)["next"] is None
    assert asdict(rank)["passed"][0] == {"model": "gpt2", "acc_norm": 0.3114, "within_interval": False}


def test_the_baselines_are_the_published_numbers():
    assert [baseline[:4] for baseline in BASELINES] == [
        ("gpt2", "completion", 0.2859, 0.2955),
        ("gpt2", "completion", None, 0.294463),
        ("gpt2-medium", "completion", None, 0.375224),
        ("gpt2-large", "completion", None, 0.431986),
        ("gpt2-xl", "completion", 0.3842, 0.4893),
        ("GPT-3 124M", "completion", None, 0.337),
        ("gpt2", "lm-eval", 0.2892, 0.3114),
        ("gpt2-xl", "lm-eval", 0.4004, 0.5089),
    ]


@pytest.fixture
def metric(tmp_path, monkeypatch):
    from modeling_gpt2repro.evaluation.hellaswag.evaluate_metric import HellaSwagAccuracy

    def refused(*_):
        raise AssertionError("the metric must not use the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    return HellaSwagAccuracy(keep_in_memory=True, cache_dir=str(tmp_path))


@pytest.fixture
def answers():
    """Scores of 50 examples as arrays, and their accuracies by sum and by mean."""
    draw = np.random.default_rng(0)
    sums = -draw.uniform(5, 50, (50, 4))
    lengths = draw.integers(1, 9, (50, 4))
    labels = draw.integers(0, 4, 50)
    right = [(values.argmax(1) == labels).mean() for values in (sums, sums / lengths)]
    return {"predictions": sums, "lengths": lengths, "references": labels}, right


def test_the_metric_equals_numpy_at_once_in_batches_and_one_by_one(metric, answers):
    columns, (acc, acc_norm) = answers
    at_once = metric.compute(**columns)
    assert (at_once["acc"], at_once["acc_norm"]) == (acc, acc_norm)
    assert at_once["acc_interval"] == wilson_interval(round(50 * acc), 50)
    for part in (slice(0, 20), slice(20, 50)):
        metric.add_batch(**{name: values[part].tolist() for name, values in columns.items()})
    assert metric.compute() == at_once
    for sums, lengths, label in zip(*columns.values(), strict=True):
        metric.add(prediction=sums, lengths=lengths, reference=label)
    assert metric.compute() == at_once


def test_the_metric_combines_with_others(metric, answers, tmp_path):
    import datasets
    import evaluate

    class Rows(evaluate.Metric):
        def _info(self):
            features = datasets.Features({"references": datasets.Value("int64")})
            return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

        def _compute(self, references):
            return {"zeros": references.count(0)}

    columns, (acc, _) = answers
    both = evaluate.combine([metric, Rows(keep_in_memory=True, cache_dir=str(tmp_path))])
    both.add_batch(**columns)
    numbers = both.compute()
    assert (numbers["acc"], numbers["zeros"]) == (acc, (columns["references"] == 0).sum())


def test_the_metric_refuses_examples_that_do_not_fit_together(metric):
    with pytest.raises(ValueError, match="example 0 has 4 log-likelihoods, 3 lengths and the reference 1"):
        metric.compute(predictions=[[-1.0] * 4], lengths=[[1] * 3], references=[1])
    with pytest.raises(ValueError, match="4 lengths and the reference 4"):
        metric.compute(predictions=[[-1.0] * 4], lengths=[[1] * 4], references=[4])
    with pytest.raises(ValueError, match=r"example 0 has log-likelihoods \[nan, .*\]: give finite numbers only"):
        metric.compute(predictions=[[np.nan, -1.0, -1.0, -1.0]], lengths=[[1] * 4], references=[0])


def test_no_examples_have_no_accuracy(metric, one_sentence):
    with pytest.raises(ValueError, match="there are no examples to compute an accuracy of") as error:
        metric.compute(predictions=[], lengths=[], references=[])
    one_sentence(error)
