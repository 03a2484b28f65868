"""HellaSwag's accuracies: worked by hand, their intervals, the metric for evaluate, the place among published ones."""

import socket
from dataclasses import replace

import numpy as np
import pytest

from modeling_gpt2repro.evaluation.hellaswag import BASELINES, EndingScores
from modeling_gpt2repro.evaluation.hellaswag_accuracy import standing, summarize, wilson_interval
from modeling_gpt2repro.evaluation.hellaswag_report import standing_sentence

# By sum the first ending is best; by length the second (-8 / 4 = -2), then an empty one must not win.
SCORES = EndingScores(0, "lm-eval", 1, (-5.0, -8.0, -9.0, -6.0), (2, 4, 3, 0))


def test_a_summary_worked_by_hand():
    assert (SCORES.correct, SCORES.correct_norm) == (False, True)
    results = [SCORES, replace(SCORES, row=1, label=0), replace(SCORES, row=2), replace(SCORES, row=3, label=3)]
    summary = summarize(results)["lm-eval"]
    assert (summary["rows"], summary["acc"], summary["acc_norm"]) == (4, 0.25, 0.5)
    # Wilson's interval of 2 of 4: (2 + z²/2 ± z sqrt(1 + z²/4)) / (4 + z²), z = 1.96.
    assert summary["acc_norm_interval"] == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_a_model_is_placed_among_the_published_numbers_of_its_protocol():
    place = standing("completion", 0.31, (0.3010, 0.3191))
    assert standing_sentence("completion", place) == "completion: passed gpt2 (0.2955); next GPT-3 124M (0.3370)"
    place = standing("completion", 0.2960, (0.2871, 0.3050))
    assert standing_sentence("completion", place) == (
        "completion: passed gpt2 (0.2955, within the interval: not significant); next GPT-3 124M (0.3370)"
    )
    # Two figures are published for gpt2: the higher one is to be passed.
    assert standing("completion", 0.2950, (0.2861, 0.3039)).passed == []
    place = standing("lm-eval", 0.51, (0.5002, 0.5198))
    assert standing_sentence("lm-eval", place).endswith(
        "gpt2-xl (0.5089, within the interval: not significant); next none"
    )
    assert place.as_json()["next"] is None
    assert place.as_json()["passed"][0] == {"model": "gpt2", "acc_norm": 0.3114, "within_interval": False}
    assert all(protocol in ("completion", "lm-eval") and acc_norm < 1 for _, protocol, _, acc_norm, _ in BASELINES)


@pytest.fixture
def metric(tmp_path, monkeypatch):
    from modeling_gpt2repro.evaluation.hellaswag_metric import HellaSwagAccuracy

    def refused(*_):
        raise AssertionError("a metric asks no network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    return HellaSwagAccuracy(keep_in_memory=True, cache_dir=str(tmp_path))


@pytest.fixture
def answers():
    """Scores of 50 rows as arrays, and how many are right by sum and by length."""
    draw = np.random.default_rng(0)
    sums, lengths, labels = -draw.uniform(5, 50, (50, 4)), draw.integers(1, 9, (50, 4)), draw.integers(0, 4, 50)
    right = [(values.argmax(1) == labels).mean() for values in (sums, sums / lengths)]
    return {"predictions": sums, "lengths": lengths, "references": labels}, right


def test_the_metric_equals_numpy_at_once_in_batches_and_row_by_row(metric, answers):
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


def test_the_metric_refuses_rows_that_do_not_fit_together(metric):
    with pytest.raises(ValueError, match="row 0 has 4 log-likelihoods, 3 lengths and the reference 1"):
        metric.compute(predictions=[[-1.0] * 4], lengths=[[1] * 3], references=[1])
    with pytest.raises(ValueError, match="4 lengths and the reference 4"):
        metric.compute(predictions=[[-1.0] * 4], lengths=[[1] * 4], references=[4])
