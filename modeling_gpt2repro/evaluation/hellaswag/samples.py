"""What a model said to each row of HellaSwag, on disk: one JSON object a line, which other programs read, too."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from modeling_gpt2repro.storage.atomic import atomic_write

from .examples import Example
from .score import ExampleScores


class SavedScores(NamedTuple):
    """One line of a file of results: the question's fingerprint, and the scores."""

    question: str
    scores: ExampleScores


def write_results(path: Path, results: Iterable[ExampleScores], rows: Sequence[Example]):
    """Write one line for each row and protocol, whole or not at all.

    Example, on one line: {"row": 0, "ind": 24, "question": "6a2e51c09b7f", "protocol": "completion", "label": 3,
    "log_likelihoods": [-31.2, -28.9, -40.0, -30.1], "lengths": [7, 6, 9, 7], "prediction": 1, "correct": false,
    "prediction_norm": 3, "correct_norm": true}. `ind` is the row's number in HellaSwag's sources, which may repeat.
    What is NaN or infinite is null, as JSON has neither, and so are the predictions of that row.
    """
    with atomic_write(path) as file:
        for scores in results:
            row = rows[scores.row]
            line = {
                "row": scores.row,
                "ind": row.ind,
                "question": fingerprint(row),
                "protocol": scores.protocol,
                "label": scores.label,
                "log_likelihoods": [total if math.isfinite(total) else None for total in scores.log_likelihoods],
                "lengths": scores.lengths,
                "prediction": scores.prediction,
                "correct": scores.correct,
                "prediction_norm": scores.prediction_norm,
                "correct_norm": scores.correct_norm,
            }
            file.write(json.dumps(line).encode() + b"\n")


def fingerprint(row: Example) -> str:
    """Twelve hex digits that name a question by what it says, whether it came from the Hub or from a file."""
    said = {name: value for name, value in asdict(row).items() if name != "ind"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


def read_results(path: str | Path) -> list[SavedScores]:
    """The lines of `write_results`; null is read as NaN.

    Raises:
        OSError: It cannot be read.
        ValueError: A line is none of `write_results`; or there is none.
    """
    saved = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                found = json.loads(line)
                totals = tuple(math.nan if total is None else float(total) for total in found["log_likelihoods"])
                lengths = tuple(map(int, found["lengths"]))
                scores = ExampleScores(int(found["row"]), str(found["protocol"]), int(found["label"]), totals, lengths)
                if not len(scores.log_likelihoods) == len(scores.lengths) == 4:
                    raise ValueError
                saved.append(SavedScores(str(found["question"]), scores))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f"{path}, line {number}: {line.strip()[:40]!r} is no result of a row: give the .jsonl that "
                    "eval_hellaswag.py has written beside its .json."
                ) from error
    if not saved:
        raise ValueError(f"{path} has no results: give the .jsonl that eval_hellaswag.py has written.")
    return saved
