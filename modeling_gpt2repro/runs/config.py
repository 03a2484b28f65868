"""run.json: the arguments, versions and commit of a run, written before its first step."""

import json
import platform
import subprocess
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from modeling_gpt2repro.storage.atomic import atomic_write
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.validate import RUN_RECORD

PACKAGES = ("torch", "transformers", "accelerate", "numpy", "tokenizers", "tiktoken", "safetensors")


def make_writable(folder: Path):
    """Make the run's folder, and find out before the first step whether it can be written.

    Raises:
        ValueError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir ({folder}) cannot be written ({error.strerror}): give another.") from error


def write_run_config(args: TrainArguments, hardware: dict, data: dict):
    """Write the run's record into its folder, or leave the one that is there (a resumed run keeps its own).

    Args:
        hardware: What the arguments do not say: device, processes, precision.
        data: The identity of the data: its fingerprint and what decides the order of rows.
    """
    folder = Path(args.output_dir)
    if (folder / RUN_RECORD).exists():
        return
    record = {
        "arguments": asdict(args),
        "hardware": hardware,
        "data": data,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": current_commit(),
    }
    with atomic_write(folder / RUN_RECORD) as file:
        file.write(json.dumps(record, indent=1).encode())


def saved_config(output_dir: Path) -> dict:
    """The arguments that a run began with; none where there is no record."""
    record = output_dir / RUN_RECORD
    return json.loads(record.read_text(encoding="utf-8"))["arguments"] if record.exists() else {}


def diff_config(args: TrainArguments) -> dict[str, tuple]:
    """Which arguments differ from those in the run's record: name -> (then, now); none where there is no record.

    Where things are and what is shown may change freely and is left out. Files go by their names alone: metrics.jsonl,
    where this is noted, is published with the model.
    """
    then = saved_config(Path(args.output_dir))
    return {
        name: (without_folder(then[name]), without_folder(now))
        for name, now in asdict(args).items()
        if name in then
        and then[name] != now
        and name not in ("output_dir", "resume_from_checkpoint", "report_to", "shards", "mix")
    }


def without_folder(value: object) -> object:
    """'/home/me/rows.jsonl' -> 'rows.jsonl'; what is no path of this machine stays."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def current_commit() -> str | None:
    """The commit of the checkout that this file lies in; None outside of one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
