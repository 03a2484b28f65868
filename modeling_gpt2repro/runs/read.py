"""Read a run's folder: records of metrics.jsonl, resume points, configuration, and the baselines to compare with."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modeling_gpt2repro.storage.atomic import write_json

from .folder import BASELINES_FILE, METRICS_FILE, RUN_CONFIG_FILE

OLD_BASELINES_FILE = "yardsticks.json"  # its keys end in _yardsticks; still read, never written
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
# HellaSwag protocol -> the name of its accuracy in metrics.jsonl; its 95 % interval has the suffixes _low and _high.
HELLASWAG_METRICS = {
    "completion": "hellaswag_completion_acc_norm",
    "lm-eval": "hellaswag_lm_eval_acc_norm",
}


@dataclass(frozen=True)
class Run:
    """A training run, as if it had never been interrupted."""

    folder: Path
    records: list[dict]  # lines of metrics.jsonl, without those that were undone by resuming from an earlier checkpoint
    resumed_steps: list[int]  # the steps at which training was resumed
    config: dict  # run.json, with the arguments of the last resume; empty if the file is missing
    # For each stretch between two resumes: first step, last step, arguments. Empty if run.json is missing.
    stretches: list[tuple[int, int, dict]] = field(default_factory=list)
    # Label -> nats per token, such as the loss of a uniform guess.
    loss_baselines: dict[str, float] = field(default_factory=dict)
    # Protocol -> model -> published acc_norm.
    hellaswag_baselines: dict[str, dict[str, float]] = field(default_factory=dict)

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) and finite values (n,) of one metric, without the steps whose update was skipped."""
        skipped = self._skipped_steps()
        pairs = [
            (record["tokens"], record[name])
            for record in self.records
            if name in record and record["step"] not in skipped
        ]
        tokens, values = np.array(pairs, dtype=float).reshape(-1, 2).T  # null in the file, NaN here
        finite = np.isfinite(values)
        return tokens[finite], values[finite]

    def resumed_tokens(self) -> np.ndarray:
        """Tokens (n,) at which training was resumed."""
        return np.array([step * self._tokens_per_step() for step in self.resumed_steps], dtype=float)

    def skipped_tokens(self) -> np.ndarray:
        """Tokens (n,) at which an update was skipped."""
        return np.array([step * self._tokens_per_step() for step in sorted(self._skipped_steps())], dtype=float)

    def dataset(self) -> str | None:
        """The Hub dataset of the run, streamed or from shards that still exist; None if it trained on other text."""
        return self._dataset_and_tokenizer()[0]

    def uses_fineweb_edu(self) -> bool:
        """Whether its losses are per GPT-2 token of FineWeb-Edu, and so comparable with OpenAI's GPT-2 there."""
        dataset, tokenizer = self._dataset_and_tokenizer()
        return dataset == FINEWEB_EDU and tokenizer in (None, "gpt2", "openai-community/gpt2")

    def _dataset_and_tokenizer(self) -> tuple[str | None, str | None]:
        arguments = self.config.get("arguments", {})
        if arguments.get("mix"):
            return None, None
        dataset = arguments.get("dataset_name")
        tokenizer = arguments.get("tokenizer")
        if arguments.get("shards"):
            folder = Path(arguments["shards"])
            manifest = _read_json(folder / "manifest.json")
            dataset = manifest.get("source", {}).get("dataset")
            tokenizer = manifest.get("tokenizer", {}).get("name")
            if not manifest and any(folder.glob("edufineweb_val_*.npy")):  # written by build-nanogpt's fineweb.py
                dataset = FINEWEB_EDU
        is_hub_id = "/" in (dataset or "")
        return dataset if is_hub_id else None, tokenizer

    def _skipped_steps(self) -> set[int]:
        return {record["step"] for record in self.records if record.get("event") == "skipped"}

    def _tokens_per_step(self) -> float:
        return next((r["tokens"] / r["step"] for r in self.records if r["step"] and "tokens" in r), 0.0)


def read_run(folder: Path) -> Run:
    """Read whatever a run has written so far.

    Raises:
        ValueError: If the folder has no metrics.jsonl.
    """
    if not (folder / METRICS_FILE).is_file():
        raise ValueError(f"{folder} is not a run: it has no {METRICS_FILE}; give the --output_dir of a training.")
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    records, resumes = drop_undone_records(lines)
    config = _read_json(folder / RUN_CONFIG_FILE)
    stretches = []
    if config:
        starts = {0: {}, **resumes}
        if resumes and not any("loss" in record and record["step"] <= min(resumes) for record in records):
            starts = resumes  # it began with another run's checkpoint, whose steps were trained there
        steps = [*starts, max([record["step"] for record in records], default=0)]
        began_with = config["arguments"]
        for first, last, changed in zip(steps, steps[1:], starts.values(), strict=False):
            config["arguments"] = began_with | {name: now for name, (_, now) in changed.items()}
            if last > first:
                stretches.append((first + 1, last, config["arguments"]))
    resumed_steps = [step for step in resumes if step > 0]
    return Run(folder, records, resumed_steps, config, stretches, **read_baselines(folder))


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run as if it had never been interrupted; [] if there is no metrics.jsonl."""
    return read_run(folder).records if (folder / METRICS_FILE).is_file() else []


def drop_undone_records(lines: Iterable[str]) -> tuple[list[dict], dict[int, dict[str, list]]]:
    """Parse metrics.jsonl and drop what was undone by resuming from an earlier step.

    Steps 1 2 3 4, resume at 2, steps 3 4 5 -> steps 1 2 3 4 5, where 3 and 4 are those of the second attempt.
    What is no record, such as a line that a crash cut off, is dropped, too.

    Returns:
        The records, and for each step at which the run was resumed the arguments that differ from run.json:
        name -> [then, now].
    """
    records: list[dict] = []
    resumes: dict[int, dict[str, list]] = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if not isinstance(record, dict) or "step" not in record:
            continue
        if record.get("event") != "resume":
            records.append(record)
            continue
        step = record["step"]
        # A checkpoint is saved before the evaluation of the same step: the resumed run repeats that evaluation, but
        # neither the training step itself nor its events.
        records = [r for r in records if r["step"] < step or (r["step"] == step and ("loss" in r or "event" in r))]
        resumes = {earlier: changed for earlier, changed in resumes.items() if earlier < step}
        resumes[step] = record.get("changed", {})  # complete: relative to run.json, not to the last resume
    return records, resumes


def write_baselines(
    folder: Path, loss: dict[str, float], hellaswag: Sequence[tuple[str, str, float | None, float, str]]
):
    """Write the baselines that figures and the model card compare the run with into its folder.

    Args:
        loss: Label -> nats per token.
        hellaswag: Published results (model, protocol, acc, acc_norm, source); the first of a model and protocol counts.
    """
    published: dict[str, dict[str, float]] = {}
    for model, protocol, _, acc_norm, _ in hellaswag:
        published.setdefault(protocol, {}).setdefault(model, acc_norm)
    write_json(folder / BASELINES_FILE, {"loss_baselines": loss, "hellaswag_baselines": published})


def read_baselines(folder: Path) -> dict[str, dict]:
    """{"loss_baselines": ..., "hellaswag_baselines": ...} of a run's folder; {} if there are none."""
    stored = _read_json(folder / BASELINES_FILE) or _read_json(folder / OLD_BASELINES_FILE)
    return {name.replace("_yardsticks", "_baselines"): baselines for name, baselines in stored.items()}


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
