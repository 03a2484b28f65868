"""run.json: the arguments, versions and commit of a run, written before its first step."""

import json
import platform
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path

from modeling_gpt2repro.storage.atomic import write_json

from .folder import RUN_CONFIG_FILE

PACKAGES = ("torch", "transformers", "accelerate", "numpy", "tokenizers", "tiktoken", "safetensors")
# Where things are and what is shown may change without changing the run.
NOT_COMPARED = ("output_dir", "resume_from_checkpoint", "report_to", "shards", "mix")


def make_writable(folder: Path):
    """Create the run's folder, and find out before the first step whether it can be written.

    Raises:
        ValueError: If it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"output_dir ({folder}) cannot be written ({error.strerror}): give another.") from error


def write_run_config(output_dir: Path, arguments: dict, hardware: dict, data_fingerprint: dict):
    """Write run.json, unless there is one: a resumed run keeps its own."""
    if (output_dir / RUN_CONFIG_FILE).exists():
        return
    config = {
        "arguments": arguments,
        "hardware": hardware,
        "data": data_fingerprint,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": current_commit(),
    }
    write_json(output_dir / RUN_CONFIG_FILE, config)


def diff_arguments(output_dir: Path, arguments: dict) -> dict[str, tuple]:
    """Which arguments differ from those that the run began with: name -> (then, now).

    Of files only the names are kept: metrics.jsonl, where the difference is recorded, is published with the model.
    """
    path = output_dir / RUN_CONFIG_FILE
    saved = json.loads(path.read_text(encoding="utf-8"))["arguments"] if path.exists() else {}
    return {
        name: (without_folder(saved[name]), without_folder(value))
        for name, value in arguments.items()
        if name in saved and saved[name] != value and name not in NOT_COMPARED
    }


def without_folder(value: object) -> object:
    """'/home/me/rows.jsonl' -> 'rows.jsonl'; anything but an absolute path stays."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def current_commit() -> str | None:
    """The git commit of the checkout that this file lies in; None if it is not in one."""
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
