"""A model's scores for each HellaSwag example, on disk as JSON lines that other programs can read, too."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from modeling_gpt2repro.storage.atomic import atomic_write
from modeling_gpt2repro.storage.json_files import parse_json

from .examples import Example
from .score import ExampleScores


class SavedScores(NamedTuple):
    """One line of a file of scores."""

    question: str  # the example's `fingerprint`
    scores: ExampleScores


def write_scores(path: Path, scores: Iterable[ExampleScores], examples: Sequence[Example]):
    """Write one line for each example and protocol, atomically.

    Example, on one line: {"row": 0, "ind": 24, "question": "6a2e51c09b7f", "protocol": "completion", "label": 3,
    "log_likelihoods": [-31.2, -28.9, -40.0, -30.1], "lengths": [7, 6, 9, 7], "prediction": 1, "correct": false,
    "prediction_norm": 3, "correct_norm": true}. "row" is the example's index; "ind" is its number in HellaSwag's
    sources, which may repeat. JSON has neither NaN nor infinity: such a score is null, and so are the predictions.
    """
    with atomic_write(path) as file:
        for example_scores in scores:
            example = examples[example_scores.index]
            totals = [total if math.isfinite(total) else None for total in example_scores.log_likelihoods]
            line = {
                "row": example_scores.index,
                "ind": example.ind,
                "question": fingerprint(example),
                "protocol": example_scores.protocol,
                "label": example_scores.label,
                "log_likelihoods": totals,
                "lengths": example_scores.lengths,
                "prediction": example_scores.prediction,
                "correct": example_scores.correct,
                "prediction_norm": example_scores.prediction_norm,
                "correct_norm": example_scores.correct_norm,
            }
            file.write(json.dumps(line).encode() + b"\n")


def fingerprint(example: Example) -> str:
    """Twelve hex digits that identify a question by its text and label, from whichever source it was read."""
    content = {name: value for name, value in asdict(example).items() if name != "ind"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def read_scores(path: str | Path) -> list[SavedScores]:
    """Read the lines of `write_scores`; null becomes NaN.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line was not written by `write_scores`, or there is none.
    """
    saved = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                saved.append(_parse_line(line))
            except (KeyError, OverflowError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: {line.strip()[:40]!r} is not the scores of an example: give the .jsonl "
                    "that eval_hellaswag.py has written beside its .json."
                ) from error
    if not saved:
        raise ValueError(f"{path} has no scores: give the .jsonl that eval_hellaswag.py has written.")
    return saved


def _parse_line(line: str) -> SavedScores:
    record = parse_json(line)
    scores = ExampleScores(
        index=int(record["row"]),
        protocol=str(record["protocol"]),
        label=int(record["label"]),
        log_likelihoods=tuple(math.nan if total is None else float(total) for total in record["log_likelihoods"]),
        lengths=tuple(map(int, record["lengths"])),
    )
    if not len(scores.log_likelihoods) == len(scores.lengths) == 4:
        raise ValueError
    return SavedScores(str(record["question"]), scores)
