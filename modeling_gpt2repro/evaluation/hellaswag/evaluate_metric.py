"""HellaSwag's accuracy as a metric of `evaluate`. Importing this file imports `evaluate`, which takes seconds."""

import datasets
import evaluate

from .metrics import Summary, summarize
from .score import ExampleScores

DESCRIPTION = """Share of examples in which the right ending has the largest log-likelihood (acc), and the largest
log-likelihood for its length (acc_norm), with 95 % intervals (Wilson)."""
INPUTS = """
Args:
    predictions: for each example, the log-likelihoods of its endings, in nats, summed over their tokens.
    lengths: for each example, the lengths of its endings: tokens under `completion`, characters under `lm-eval`.
    references: for each example, the number of the right ending, from 0.

Returns:
    acc, acc_norm, acc_interval and acc_norm_interval (lower and upper bound), correct, correct_norm, rows.

Example:
    >>> metric = HellaSwagAccuracy()
    >>> metric.compute(predictions=[[-5.0, -8.0, -9.0, -6.0]], lengths=[[2, 4, 3, 2]], references=[1])["acc_norm"]
    1.0
"""
CITATION = "Zellers et al. 2019, HellaSwag: Can a Machine Really Finish Your Sentence?, arXiv:1905.07830"


class HellaSwagAccuracy(evaluate.Metric):
    """acc and acc_norm from log-likelihoods, lengths and labels, computed by `summarize`; needs no network.

    For one process that has all examples: `gather_scores` brings them together. The metric's own way to combine
    processes relies on lock files in a folder that all of them share.
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

    def _compute(self, predictions: list[list[float]], lengths: list[list[int]], references: list[int]) -> Summary:
        scores = []
        for index, (of_endings, sizes, label) in enumerate(zip(predictions, lengths, references, strict=True)):
            if not 0 <= label < len(of_endings) == len(sizes):
                raise ValueError(
                    f"example {index} has {len(of_endings)} log-likelihoods, {len(sizes)} lengths and the reference "
                    f"{label}: give one length for each log-likelihood, and the number of one of them, from 0."
                )
            scores.append(ExampleScores(index, "", label, tuple(of_endings), tuple(sizes)))
            if not scores[-1].is_finite:
                raise ValueError(f"example {index} has log-likelihoods {of_endings}: give finite numbers only.")
        return summarize(scores)
