"""HellaSwag's scores of each example: written atomically, read back, and two models compared on them."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from modeling_gpt2repro.evaluation.hellaswag.compare import PairedDifference, compare_scores
from modeling_gpt2repro.evaluation.hellaswag.examples import PROTOCOLS
from modeling_gpt2repro.evaluation.hellaswag.samples import fingerprint, read_scores, write_scores
from modeling_gpt2repro.evaluation.hellaswag.score import ExampleScores


def scores_of(examples, is_right=lambda index: True, protocols=PROTOCOLS):
    """Scores by which an example is right, by sum and by mean, or wrong."""

    def log_likelihoods(index, label):
        best = label if is_right(index) else (label + 1) % 4
        return tuple(-1.0 if ending == best else -9.0 for ending in range(4))

    return [
        ExampleScores(index, protocol, example.label, log_likelihoods(index, example.label), (1, 1, 1, 1))
        for index, example in enumerate(examples)
        for protocol in protocols
    ]


@pytest.fixture
def file_of(tmp_path, hellaswag_rows):
    """file_of(name, ...) -> the path of scores on the seven examples."""

    def written(name, examples=hellaswag_rows, **options):
        write_scores(tmp_path / name, scores_of(examples, **options), examples)
        return tmp_path / name

    return written


def test_scores_are_read_back_and_name_their_questions(tmp_path, hellaswag_rows):
    results = scores_of(hellaswag_rows)
    results[0] = replace(results[0], log_likelihoods=(-5.1, -8.2, -9.3, -6.4), lengths=(2, 4, 3, 2))
    path = tmp_path / "new" / "a.jsonl"
    write_scores(path, results, hellaswag_rows)
    saved = read_scores(path)
    assert [line.scores for line in saved] == results
    assert len({line.question for line in saved}) == len(hellaswag_rows)
    assert json.loads(path.read_text().splitlines()[0]) == {
        "row": 0,
        "ind": 24,
        "question": fingerprint(hellaswag_rows[0]),
        "protocol": "completion",
        "label": 1,
        "log_likelihoods": [-5.1, -8.2, -9.3, -6.4],
        "lengths": [2, 4, 3, 2],
        "prediction": 0,
        "correct": False,
        "prediction_norm": 1,
        "correct_norm": True,
    }
    assert fingerprint(hellaswag_rows[0]) == fingerprint(replace(hellaswag_rows[0], ind=25))
    endings = (*hellaswag_rows[0].endings[:3], "falls.")
    for change in ({"label": 2}, {"ctx": "A cat"}, {"endings": endings}):
        assert fingerprint(hellaswag_rows[0]) != fingerprint(replace(hellaswag_rows[0], **change))


def test_scores_that_are_not_finite_are_null_and_give_no_prediction(tmp_path, hellaswag_rows):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    [result] = scores_of(hellaswag_rows[:1], protocols=("completion",))
    write_scores(
        tmp_path / "a.jsonl", [replace(result, log_likelihoods=(math.nan, -1.0, -math.inf, -2.0))], hellaswag_rows
    )
    line = json.loads((tmp_path / "a.jsonl").read_text(), parse_constant=refuse)
    assert line["log_likelihoods"] == [None, -1.0, None, -2.0]
    assert [line[name] for name in ("prediction", "correct", "prediction_norm")] == [None, False, None]
    [saved] = read_scores(tmp_path / "a.jsonl")
    assert not saved.scores.correct
    assert [math.isnan(total) for total in saved.scores.log_likelihoods] == [True, False, True, False]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, hellaswag_rows):
    path = tmp_path / "a.jsonl"
    write_scores(path, scores_of(hellaswag_rows), hellaswag_rows)
    before = path.read_bytes()
    with pytest.raises(IndexError):
        write_scores(path, scores_of(hellaswag_rows), hellaswag_rows[:3])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


THREE_ENDINGS = '{"row": 0, "question": "6a", "protocol": "completion", "label": 1, "log_likelihoods": [-1, -2, -3], '


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[1]",
        "[" * 100_000,
        '{"row": 1e999}',
        "<html>",
        '{"row": 0',
        "",
        "\xff",
        THREE_ENDINGS + '"lengths": [1, 1, 1]}',
    ],
)
def test_a_file_that_holds_no_scores_is_refused(tmp_path, line, one_sentence):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: .* is not the scores of an example") as error:
        read_scores(tmp_path / "a.jsonl")
    one_sentence(error)
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"a.jsonl has no scores"):
        read_scores(tmp_path / "a.jsonl")


def test_two_models_are_compared_example_by_example(file_of):
    first = file_of("a", is_right=lambda index: index in (0, 1, 2))
    second = file_of("b", is_right=lambda index: index in (2, 3, 4, 5))
    compared = compare_scores(first, second)
    assert set(compared) == set(PROTOCOLS)
    for pair in (pair for measures in compared.values() for pair in measures.values()):
        assert pair == PairedDifference(num_examples=7, both=1, only_first=2, only_second=3)
        assert pair.accuracies == (3 / 7, 4 / 7)
        assert pair.difference == pytest.approx(1 / 7)
    assert set(compare_scores(first, second, ("lm-eval",))) == {"lm-eval"}


def test_scores_of_different_examples_or_protocols_are_not_compared(file_of, hellaswag_rows, one_sentence):
    other = [*hellaswag_rows[:4], replace(hellaswag_rows[4], label=1), *hellaswag_rows[5:]]
    refused = {
        r"a has 7 examples, .*b 6: a paired difference needs the same examples": file_of("b", hellaswag_rows[:6]),
        r"example 4 of .*a is another question \(fingerprint \w{12}\) than example 4 of .*c": file_of("c", other),
        r"a holds completion and lm-eval, .*d completion:.*--protocol": file_of("d", protocols=("completion",)),
    }
    for sentence, path in refused.items():
        with pytest.raises(ValueError, match=sentence) as error:
            compare_scores(file_of("a"), path)
        one_sentence(error)
    assert set(compare_scores(file_of("a"), file_of("d", protocols=("completion",)), ("completion",))) == {"completion"}


def test_mcnemars_test_equals_trying_every_outcome():
    for only_first, only_second in ((0, 0), (1, 5), (5, 1), (0, 8), (4, 6), (5, 5)):
        n = only_first + only_second
        seen = abs(only_first - only_second)
        outcomes = [abs(2 * sum(outcome) - n) for outcome in itertools.product((0, 1), repeat=n)]
        expected = sum(outcome >= seen for outcome in outcomes) / 2**n
        assert PairedDifference(100, 50, only_first, only_second).p_value == pytest.approx(expected)
    # For many examples the normal distribution gives nearly the same.
    chance = math.erfc((1200 - 1100 - 1) / math.sqrt(2 * 2300))
    assert PairedDifference(10_042, 3000, 1100, 1200).p_value == pytest.approx(chance, rel=0.01)
    assert PairedDifference(10_042, 0, 0, 10_042).p_value < 1e-300


def test_the_interval_of_a_paired_difference_holds_95_times_in_100():
    # (20 + 1 - 10 - 1) / 102 = 0.0980; half its width is 1.96 sqrt((32 / 102 - 0.0980²) / 102) = 0.1070.
    assert PairedDifference(100, 30, 10, 20).interval == pytest.approx((-0.0090, 0.2051), abs=1e-4)
    low, high = PairedDifference(50, 50, 0, 0).interval
    assert low == -high < 0
    draw = np.random.default_rng(0)
    for shares, rows in (((0.4, 0.10, 0.15), 300), ((0.9, 0.01, 0.02), 1000)):
        counts = draw.multinomial(rows, [*shares, 1 - sum(shares)], size=4000)[:, :3].tolist()
        intervals = [PairedDifference(rows, *count).interval for count in counts]
        covered = sum(low <= shares[2] - shares[1] <= high for low, high in intervals) / len(intervals)
        assert covered == pytest.approx(0.95, abs=0.012)
