"""Read a run's folder: records of metrics.jsonl, resume points, configuration, and the baselines to compare with."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub import try_to_load_from_cache

from modeling_gpt2repro.storage.atomic import write_json
from modeling_gpt2repro.storage.json_files import (
    is_count,
    is_size,
    parse_json,
    read_bounded,
    read_json_object,
    require,
    shown,
)

from .config import check_argument_types, read_run_config
from .folder import BASELINES_FILE, METRICS_FILE, SAMPLES_FILE

MAX_LINES_BYTES = 2**28  # of metrics.jsonl or samples.jsonl; 19,073 steps of the lecture's run have 8 MB
OLD_BASELINES_FILE = "yardsticks.json"  # its keys end in _yardsticks; still read, never written
MANIFEST = "manifest.json"  # of shards
HUB_ID = r"\w[\w.-]{0,95}/\w[\w.-]{0,95}"  # owner/name, with re.ASCII
PINNED_SHARDS = rf"hf://({HUB_ID})@([0-9a-f]{{40}})"  # on the Hub, at a commit
CONFIG_NAME = r"\w[\w.-]{0,95}"
FINEWEB_EDU = "HuggingFaceFW/fineweb-edu"
# HellaSwag protocol -> the name of its accuracy in metrics.jsonl; its 95 % interval has the suffixes _low and _high.
HELLASWAG_METRICS = {
    "completion": "hellaswag_completion_acc_norm",
    "lm-eval": "hellaswag_lm_eval_acc_norm",
}

STORY_FLOOR = "the floor, entropy of the stories"  # the baseline below which no model can be
# All other values of a record are numbers.
NOT_NUMBERS = {"step", "tokens", "event", "changed", "rows_by_process", "batch_hash"}
FLAGS = {"skipped", "overflowed"}  # these may be true
MAX_SECONDS = 1e12  # thousands of years; sums of what is less are finite


class HubDataset(NamedTuple):
    """A dataset on the Hub, as far as a run's files name it."""

    name: str  # owner/name
    revision: str | None = None  # the commit
    config: str | None = None


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
    unreadable_lines: int = 0  # of metrics.jsonl, such as one that a crash cut off
    undone_records: list[dict] = field(default_factory=list)  # done once more after a resume from an earlier checkpoint

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) and finite values (n,) of one metric, without the steps whose update was skipped."""
        skipped = self._skipped_steps()
        pairs = [
            (record["tokens"], record[name])
            for record in self.records
            if name in record and "tokens" in record and record["step"] not in skipped
        ]
        tokens, values = np.array(pairs, dtype=float).reshape(-1, 2).T  # null in the file, NaN here
        finite = np.isfinite(values)
        return tokens[finite], values[finite]

    def evaluations(self) -> list[dict]:
        """The records of evaluations that have all their numbers; a loss that is not a number is None."""
        complete = []
        for record in self.records:
            needed = {"tokens", "validation_tokens"}
            if record.get("validation_loss") is not None:
                needed.add("validation_perplexity")
            numbers = {name: value for name, value in record.items() if value is not None}
            if "validation_loss" in record and needed <= numbers.keys():
                complete.append({"validation_loss": None, **numbers})
        return complete

    def resumed_tokens(self) -> np.ndarray:
        """Tokens (n,) at which training was resumed."""
        return np.array([step * self._tokens_per_step() for step in self.resumed_steps], dtype=float)

    def skipped_tokens(self) -> np.ndarray:
        """Tokens (n,) at which an update was skipped."""
        return np.array([step * self._tokens_per_step() for step in sorted(self._skipped_steps())], dtype=float)

    def hub_datasets(self) -> list[HubDataset]:
        """The datasets on the Hub that the run's text and shards are from; [] if they are from elsewhere."""
        arguments = self.config.get("arguments", {})
        if arguments.get("mix"):
            found = [pinned_shards(part.rpartition(":")[0]) for part in arguments["mix"].split(",")]
        elif arguments.get("shards"):
            found = [hub_dataset(self._manifest().get("source", {})), pinned_shards(arguments["shards"])]
        else:
            data = self.config.get("data", {}).get("data")
            stream = data if type(data) is dict else {}
            found = [hub_dataset({"dataset": arguments.get("dataset_name"), **stream})]
        return list(dict.fromkeys(filter(None, found)))

    def dataset(self) -> HubDataset | None:
        """The dataset on the Hub whose text the run trained on; None if it was other text, or a mixture."""
        is_mixture = self.config.get("arguments", {}).get("mix")
        return next(iter(self.hub_datasets()), None) if not is_mixture else None

    def uses_fineweb_edu(self) -> bool:
        """Whether its losses are per GPT-2 token of FineWeb-Edu, and so comparable with OpenAI's GPT-2 there."""
        arguments = self.config.get("arguments", {})
        of_shards = self._manifest().get("tokenizer", {}).get("name")
        tokenizer = of_shards if arguments.get("shards") else arguments.get("tokenizer")
        dataset = self.dataset()
        is_fineweb_edu = dataset is not None and dataset.name == FINEWEB_EDU
        return is_fineweb_edu and tokenizer in (None, "gpt2", "openai-community/gpt2")

    def _manifest(self) -> dict[str, dict]:
        """Source and tokenizer of the run's shards; {} if they are gone, or it has none."""
        shards = self.config.get("arguments", {}).get("shards")
        if not shards:
            return {}
        folder = Path(shards)
        if on_hub := pinned_shards(shards):
            cached = None
            with suppress(OSError, ValueError):  # a name that the Hub does not take
                cached = try_to_load_from_cache(on_hub.name, MANIFEST, revision=on_hub.revision, repo_type="dataset")
            if not isinstance(cached, str):
                return {}
            folder = Path(cached).parent
        manifest = _read_manifest(folder)
        with suppress(OSError):  # a disk that refuses them, as it may when the run's last checkpoint is written
            if not manifest and any(folder.glob("edufineweb_val_*.npy")):  # written by build-nanogpt's fineweb.py
                return {"source": {"dataset": FINEWEB_EDU}}
        return manifest

    def _skipped_steps(self) -> set[int]:
        return {record["step"] for record in self.records if record.get("event") == "skipped"}

    def _tokens_per_step(self) -> float:
        return next((r["tokens"] / r["step"] for r in self.records if r["step"] and "tokens" in r), 0.0)


def read_run(folder: Path) -> Run:
    """Read whatever a run has written so far.

    Raises:
        OSError: If the disk refuses a file.
        ValueError: If the folder has no metrics.jsonl, or another file is damaged. A damaged line of metrics.jsonl is
            left out, and counted.
    """
    if not (folder / METRICS_FILE).is_file():
        raise ValueError(f"{folder} is not a run: it has no {METRICS_FILE}; give the --output_dir of a training.")
    try:
        lines = [line for line in read_bounded(folder / METRICS_FILE, MAX_LINES_BYTES).split(b"\n") if line]
    except ValueError as error:
        raise ValueError(f"{folder / METRICS_FILE} cannot be read: {error}.") from error
    readable = [record for record in map(parse_record, lines) if record is not None]
    records, resumes = drop_undone_records(readable)
    config = read_run_config(folder)
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
    unreadable_lines = len(lines) - len(readable)
    kept = set(map(id, records))
    return Run(
        folder,
        records,
        resumed_steps,
        config,
        stretches,
        **read_baselines(folder),
        unreadable_lines=unreadable_lines,
        undone_records=[record for record in readable if id(record) not in kept and record.get("event") != "resume"],
    )


def read_metrics(folder: Path) -> list[dict]:
    """The records of a run as if it had never been interrupted; [] if there is no metrics.jsonl."""
    return read_run(folder).records if (folder / METRICS_FILE).is_file() else []


def read_samples(folder: Path, prompt: str) -> list[tuple[int, str]]:
    """(step, text) of the first sample for this prompt in each evaluation, in the order of the file.

    [] if there is no samples.jsonl, or none that can be read; lines that are damaged are left out.
    """
    return read_all_samples(folder).get(prompt, [])


def read_all_samples(folder: Path) -> dict[str, list[tuple[int, str]]]:
    """Prompt -> (step, text) of its first sample in each evaluation, as `read_samples`."""
    samples: dict[str, list[tuple[int, str]]] = {}
    with suppress(OSError, ValueError):
        for line in read_bounded(folder / SAMPLES_FILE, MAX_LINES_BYTES).split(b"\n"):
            with suppress(ValueError):
                record = parse_json(line)
                require(type(record) is dict and type(record.get("prompt")) is str, "it has no prompt")
                require(is_count(record.get("step")), "it has no step")
                texts = record.get("samples")
                require(type(texts) is list and len(texts) > 0 and type(texts[0]) is str, "it has no text")
                samples.setdefault(record["prompt"], []).append((record["step"], texts[0]))
    return samples


def parse_record(line: str | bytes) -> dict | None:
    """A line of metrics.jsonl; None if it is damaged: cut off, not an object, or without a step that is a number.

    NaN and infinity, which other programs write into JSON, become None, as our own are.
    """
    try:
        record = parse_json(line)
        require(type(record) is dict and is_count(record.get("step")), "it has no step")
        require(is_count(record.get("tokens", 0)), "tokens is not a number")
        for name in ("event", "batch_hash"):
            require(type(record.get(name, "")) is str, f"{name} is not a string")
        changed = record.get("changed", {})
        require(type(changed) is dict, "changed is not an object")
        require(all(type(pair) is list and len(pair) == 2 for pair in changed.values()), "changed has no pairs")
        check_argument_types({name: now for name, (_, now) in changed.items()})
        for name in record.keys() - NOT_NUMBERS:
            value = record[name]
            is_number = type(value) in (int, float) or (type(value) is bool and name in FLAGS)
            require(value is None or is_number, f"{name} is not a number")
            limit = MAX_SECONDS if name.endswith("_seconds") else math.inf
            record[name] = value if value is not None and abs(value) < limit else None
            require(not isinstance(value, int) or abs(value) < 2**64, f"{name} is too large")
    except ValueError:
        return None
    return record


def drop_undone_records(written: Iterable[dict]) -> tuple[list[dict], dict[int, dict[str, list]]]:
    """Drop what was undone by resuming from an earlier step.

    Steps 1 2 3 4, resume at 2, steps 3 4 5 -> steps 1 2 3 4 5, where 3 and 4 are those of the second attempt.

    Returns:
        The records, and for each step at which the run was resumed the arguments that differ from run.json:
        name -> [then, now].
    """
    records: list[dict] = []
    resumes: dict[int, dict[str, list]] = {}
    for record in written:
        if record.get("event") != "resume":
            records.append(record)
            continue
        step = record["step"]
        # A checkpoint is saved before the evaluation of the same step: the resumed run repeats that evaluation, but
        # neither the training step itself, nor its events, nor the save.
        done = ("loss", "event", "save_seconds")
        records = [r for r in records if r["step"] < step or (r["step"] == step and any(name in r for name in done))]
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
    """{"loss_baselines": ..., "hellaswag_baselines": ...} of a run's folder; {} if there are none.

    Raises:
        OSError: If the disk refuses the file.
        ValueError: If it is damaged.
    """
    for path in (folder / BASELINES_FILE, folder / OLD_BASELINES_FILE):
        if not path.exists():
            continue
        try:
            stored = read_json_object(path)
            baselines = {name.replace("_yardsticks", "_baselines"): stored[name] for name in stored}
            for name, value in baselines.items():
                require(name in ("loss_baselines", "hellaswag_baselines"), f"it has {shown(name)}")
                require(type(value) is dict, f"{name} is {shown(value)}")
            for numbers in (baselines.get("loss_baselines", {}), *baselines.get("hellaswag_baselines", {}).values()):
                require(type(numbers) is dict, f"it has {shown(numbers)}")
                for label, value in numbers.items():
                    require(is_size(value), f"{shown(label)} is {shown(value)}")
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): delete it; a run writes it when it starts.") from error
        return baselines
    return {}


def pinned_shards(address: object) -> HubDataset | None:
    """'hf://owner/name@5f0c...' -> the dataset and its commit; None if it is another address, or a folder."""
    match = re.fullmatch(PINNED_SHARDS, address, re.ASCII) if isinstance(address, str) else None
    return HubDataset(match[1], match[2]) if match else None


def hub_dataset(source: Mapping) -> HubDataset | None:
    """The dataset in a run.json or manifest, which may be somebody else's; None if its name is not that of one."""
    name, revision, config = (source.get(key) for key in ("dataset", "revision", "config"))
    if not isinstance(name, str) or not re.fullmatch(HUB_ID, name, re.ASCII):
        return None
    return HubDataset(
        name,
        revision if isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision) else None,
        config if isinstance(config, str) and re.fullmatch(CONFIG_NAME, config, re.ASCII) else None,
    )


def _read_manifest(shards: Path) -> dict:
    """Source and tokenizer by the manifest of the shards; {} if they are gone, or other files are there by now."""
    try:
        manifest = read_json_object(shards / MANIFEST)
    except (OSError, ValueError):
        return {}
    return {name: value for name, value in manifest.items() if type(value) is dict}
