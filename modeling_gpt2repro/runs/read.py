"""A run's folder, read: its rows of numbers, where it was resumed, its arguments, and what it is measured by."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modeling_gpt2repro.storage.atomic import atomic_write

METRICS_FILE = "metrics.jsonl"
RUN_RECORD = "run.json"
YARDSTICKS_FILE = "yardsticks.json"
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"


@dataclass(frozen=True)
class Run:
    """One run, as if it had never been stopped.

    Args:
        rows: Of metrics.jsonl, without those that a resume went back behind.
        resumed_steps: Where it went on after a stop.
        record: run.json, with the arguments that the run last went on with; empty where there is none.
        loss_yardsticks: Label -> nats per token: what guessing gives.
        hellaswag_yardsticks: Protocol -> model -> published acc_norm.
    """

    folder: Path
    rows: list[dict]
    resumed_steps: list[int]
    record: dict
    loss_yardsticks: dict[str, float] = field(default_factory=dict)
    hellaswag_yardsticks: dict[str, dict[str, float]] = field(default_factory=dict)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) and finite values (n,) of one number; steps whose update was skipped are left out."""
        skipped = self._skipped_steps()
        pairs = [(row["tokens"], row[name]) for row in self.rows if name in row and row["step"] not in skipped]
        tokens, values = np.array(pairs, dtype=float).reshape(-1, 2).T
        finite = np.isfinite(values)
        return tokens[finite], values[finite]

    def resumed_tokens(self) -> np.ndarray:
        """Tokens (n,) at which the run went on after a stop."""
        return np.array([step * self._tokens_per_step() for step in self.resumed_steps], dtype=float)

    def skipped_tokens(self) -> np.ndarray:
        """Tokens (n,) at which an update was skipped."""
        return np.array([step * self._tokens_per_step() for step in sorted(self._skipped_steps())], dtype=float)

    def dataset(self) -> str | None:
        """The Hub dataset that was trained on, streamed or from shards that are still there; None of any other text."""
        return self._dataset_and_tokenizer()[0]

    def reads_fineweb_edu(self) -> bool:
        """Whether its losses are of GPT-2's tokens of FineWeb-Edu."""
        dataset, tokenizer = self._dataset_and_tokenizer()
        return dataset == FINEWEB_EDU and tokenizer in (None, "gpt2", "openai-community/gpt2")

    def _dataset_and_tokenizer(self) -> tuple[str | None, str | None]:
        arguments = self.record.get("arguments", {})
        if arguments.get("mix"):
            return None, None
        dataset, tokenizer = arguments.get("dataset_name"), arguments.get("tokenizer")
        if arguments.get("shards"):
            folder = Path(arguments["shards"])
            manifest = _read_json(folder / "manifest.json")
            dataset, tokenizer = manifest.get("source", {}).get("dataset"), manifest.get("tokenizer", {}).get("name")
            if not manifest and any(folder.glob("edufineweb_val_*.npy")):  # the lecture's own shards
                dataset = FINEWEB_EDU
        return (dataset if "/" in (dataset or "") else None), tokenizer

    def _skipped_steps(self) -> set[int]:
        return {row["step"] for row in self.rows if row.get("event") == "skipped"}

    def _tokens_per_step(self) -> float:
        return next((row["tokens"] / row["step"] for row in self.rows if row["step"] and "tokens" in row), 0.0)


def read_run(folder: Path) -> Run:
    """Read what there is of a run.

    Raises:
        ValueError: If the folder holds no metrics.jsonl.
    """
    if not (folder / METRICS_FILE).is_file():
        raise ValueError(f"{folder} is no run: it has no {METRICS_FILE}; give the --output_dir of a training.")
    rows, resumed_steps, changed = replay((folder / METRICS_FILE).read_text(encoding="utf-8").splitlines())
    record = _read_json(folder / RUN_RECORD)
    if record:
        record["arguments"] |= {name: now for name, (_, now) in changed.items()}
    return Run(folder, rows, resumed_steps, record, **_read_json(folder / YARDSTICKS_FILE))


def read_metrics(folder: Path) -> list[dict]:
    """The rows of the run as if it had never been stopped; none where there is no metrics.jsonl."""
    return read_run(folder).rows if (folder / METRICS_FILE).is_file() else []


def replay(lines: Iterable[str]) -> tuple[list[dict], list[int], dict[str, list]]:
    """Rows without those that a resume went back behind, the steps at which the run was resumed, and which arguments
    are no longer those in its record: name -> [then, now].

    A line that a crash cut off is left out, too.
    """
    rows: list[dict] = []
    resumed: list[int] = []
    changed: dict[str, list] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("event") == "resume":
            step = row["step"]
            # The evaluation at that step is repeated; what came of the training step that led to it is not.
            rows = [r for r in rows if r["step"] < step or (r["step"] == step and ("loss" in r or "event" in r))]
            resumed = [earlier for earlier in resumed if earlier < step] + ([step] if step else [])
            changed = row.get("changed", {})  # all of them, not only those since the last time
        else:
            rows.append(row)
    return rows, resumed, changed


def write_yardsticks(
    folder: Path, loss: dict[str, float], hellaswag: Sequence[tuple[str, str, float | None, float, str]]
):
    """Note in the run's folder what its numbers are to be measured by, for whoever draws or describes them.

    Args:
        loss: Label -> nats per token.
        hellaswag: Published numbers: model, protocol, acc, acc_norm, source. Of several of one model the first counts.
    """
    published: dict[str, dict[str, float]] = {}
    for model, protocol, _, acc_norm, _ in hellaswag:
        published.setdefault(protocol, {}).setdefault(model, acc_norm)
    text = json.dumps({"loss_yardsticks": loss, "hellaswag_yardsticks": published}, indent=1)
    with atomic_write(folder / YARDSTICKS_FILE) as file:
        file.write(text.encode())


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
