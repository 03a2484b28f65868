"""HellaSwag's accuracy as a metric of `evaluate`. Importing this file imports `evaluate`, which takes seconds."""

import tempfile
from collections.abc import Sequence

import datasets
import evaluate

from .metrics import count_rows, summary_of
from .score import ExampleScores

DESCRIPTION = """Share of rows in which the right ending has the largest log-likelihood (acc), and the largest
log-likelihood by its length (acc_norm), with 95 % intervals (Wilson)."""
INPUTS = """
Args:
    predictions: for each row, the log-likelihoods of its endings, in nats, summed over their tokens.
    lengths: for each row, those of its endings: tokens under `completion`, characters under `lm-eval`.
    references: for each row, the number of the right ending, from 0.

Returns:
    acc, acc_norm, acc_interval and acc_norm_interval (lower and upper bound), correct, correct_norm, rows.

Example:
    >>> metric = HellaSwagAccuracy()
    >>> metric.compute(predictions=[[-5.0, -8.0, -9.0, -6.0]], lengths=[[2, 4, 3, 2]], references=[1])["acc_norm"]
    1.0
"""
CITATION = "Zellers et al. 2019, HellaSwag: Can a Machine Really Finish Your Sentence?, arXiv:1905.07830"


class HellaSwagAccuracy(evaluate.Metric):
    """acc and acc_norm from log-likelihoods, lengths and labels; asks no network.

    For one process that has all rows: eval_hellaswag.py gathers them, the training loop adds up counts
    (distributed.py). evaluate's own way with several leans on lock files in a folder that all of them share.
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.List(datasets.Value("float64")),
                    "lengths": datasets.List(datasets.Value("int64")),
                    "references": datasets.Value("int64"),
                }
            ),
            reference_urls=["https://rowanzellers.com/hellaswag"],
        )

    def _compute(
        self, predictions: list[list[float]], lengths: list[list[int]], references: list[int]
    ) -> dict[str, float | int | tuple[float, float]]:
        if not predictions:
            raise ValueError("there are no rows to take an accuracy of: give the log-likelihoods of at least one.")
        rows = []
        for number, (totals, sizes, label) in enumerate(zip(predictions, lengths, references, strict=True)):
            if not 0 <= label < len(totals) == len(sizes):
                raise ValueError(
                    f"row {number} has {len(totals)} log-likelihoods, {len(sizes)} lengths and the reference {label}: "
                    "give as many of the one as of the other, and one of their numbers, from 0."
                )
            rows.append(ExampleScores(number, "", label, tuple(totals), tuple(sizes)))
            if not rows[-1].is_finite:
                raise ValueError(f"row {number} has log-likelihoods {totals}: NaN and infinity are no scores.")
        return summary_of(count_rows(rows))


def accuracies_of(results: Sequence[ExampleScores], protocols: Sequence[str]) -> dict[str, dict]:
    """{protocol: what the metric says of its results}; nothing is left on disk."""
    numbers = {}
    with tempfile.TemporaryDirectory() as folder:
        for protocol in protocols:
            of_protocol = [result for result in results if result.protocol == protocol]
            numbers[protocol] = HellaSwagAccuracy(keep_in_memory=True, cache_dir=folder).compute(
                predictions=[result.log_likelihoods for result in of_protocol],
                lengths=[result.lengths for result in of_protocol],
                references=[result.label for result in of_protocol],
            )
    return numbers
