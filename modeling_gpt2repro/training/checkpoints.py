"""Checkpoints: a Hub folder with the training state in a subfolder, written under a temporary name, then renamed."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from modeling_gpt2repro.runs.folder import MODEL_FOLDER, step_of
from modeling_gpt2repro.storage.atomic import delete_dir, recover_interrupted_replace, remove_abandoned, replace_dir
from modeling_gpt2repro.storage.checksums import verify_checksums, write_checksums
from modeling_gpt2repro.storage.retry import describe_error

from .optimizer_state import OPTIMIZER_FILE, RANDOM_FILE, save_tensors

STATE_FOLDER = "training_state"
STATE_FILE = f"{STATE_FOLDER}/state.json"
CHECKSUMS_FILE = f"{STATE_FOLDER}/files.json"  # written last: its presence means that all files are there
PREFLIGHT_NAME = "step-preflight"  # a trial that nothing resumes from
# What a killed process may leave: saves, replacements and deletions under way, snapshots for an upload.
STALE_FOLDERS = (
    ".step-*.partial",
    ".step-*.old",
    ".step-*.gone",
    f".{MODEL_FOLDER}.partial",
    f".{MODEL_FOLDER}.old",
    ".push-*",
    PREFLIGHT_NAME,
)
HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def find_checkpoints(output_dir: Path) -> list[Path]:
    """All finished checkpoints, the oldest first. A folder gets its name only when everything is in it."""
    named = [path for path in output_dir.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted((path for path in named if (path / CHECKSUMS_FILE).is_file()), key=step_of)


def find_resume_checkpoint(resume_from: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """Resolve `--resume_from_checkpoint`: None, 'latest' (None if there is none yet), a folder, or a Hub repository.

    Returns:
        The checkpoint, every file of which has been verified, and a sentence on each newer one that is damaged.

    Raises:
        ValueError: If the folder is not a checkpoint, or damaged, or all are.
    """
    if resume_from is None:
        return None, []
    recover_interrupted_replace(output_dir, "step-*")
    found = find_checkpoints(output_dir)
    if resume_from == "latest":
        damaged = []
        for checkpoint in reversed(found):
            problem = verify_checksums(checkpoint, CHECKSUMS_FILE)
            if problem is None:
                return checkpoint, damaged
            damaged.append(f"{checkpoint} is damaged ({problem}) and passed over.")
        if damaged:
            raise ValueError("\n".join([*damaged, f"{output_dir} has no checkpoint left: give another --output_dir."]))
        return None, []
    checkpoint = open_named_checkpoint(resume_from)
    is_here = checkpoint.resolve() in [path.resolve() for path in found]
    later = [path.name for path in found if is_here and step_of(path) > step_of(checkpoint)]
    if later:
        raise ValueError(
            f"{output_dir} holds later checkpoints than {checkpoint.name} ({', '.join(later)}): move them away first, "
            "so that the run has one history."
        )
    return checkpoint, []


def open_named_checkpoint(name: str) -> Path:
    """A checkpoint by its folder, or downloaded from the Hub by `owner/name` or `owner/name@revision`.

    Raises:
        ValueError: If there is none, or a file differs from what was written.
    """
    checkpoint = Path(name)
    if not checkpoint.is_dir() and (on_hub := HUB_NAME.fullmatch(name)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            checkpoint = Path(snapshot_download(on_hub["repository"], revision=on_hub["revision"]))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"{name} is not a folder, and the Hub does not provide it ({reason}).") from error
    if not (checkpoint / CHECKSUMS_FILE).is_file():
        raise ValueError(f"{name} is not a checkpoint (no {CHECKSUMS_FILE}): give a step-... folder or 'latest'.")
    if problem := verify_checksums(checkpoint, CHECKSUMS_FILE):
        raise ValueError(f"{name} is damaged ({problem}): resume from another one, or move this one away.")
    return checkpoint


@dataclass(frozen=True)
class RetentionPolicy:
    """Which older checkpoints to keep when a new one is complete."""

    limit: int | None = None  # how many of the newest; all if None or 0
    every: int = 0  # those whose step is a multiple are kept for good; none if 0

    def expired(self, found: list[Path], newest: Path) -> list[Path]:
        """Those to delete; never one that is later than the newest, which can only be a damaged one."""
        if not self.limit:
            return []
        ordinary = [path for path in found if not (self.every and step_of(path) % self.every == 0)]
        ordinary = [path for path in ordinary if step_of(path) <= step_of(newest)]
        return ordinary[: -self.limit]


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    write_model: Callable[[Path], None],
    *,
    optimizer: dict[str, torch.Tensor],
    random: dict[str, torch.Tensor],
    state: dict,
    policy: RetentionPolicy,
) -> str | None:
    """Write `folder`, a `step-NNNNNN`. All processes must call this; the main one writes.

    Args:
        write_model: Writes what loads from the Hub into a folder.
        optimizer, random: See `optimizer_state`.
        state: For state.json: `progress`, `data`, `identity` (what must be equal when the run resumes), ...
        policy: Which older ones to keep.

    Returns:
        None, or why it could not be written, on all processes; then the other checkpoints are as before. Older ones
        that cannot be deleted are no reason.
    """
    problem = None
    if accelerator.is_main_process:
        temporary = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / STATE_FOLDER).mkdir(parents=True)
            write_model(temporary)
            save_tensors(optimizer, temporary / STATE_FOLDER / OPTIMIZER_FILE)
            save_tensors(random, temporary / STATE_FOLDER / RANDOM_FILE)
            (temporary / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            write_checksums(temporary, CHECKSUMS_FILE)
            replace_dir(temporary, folder)
        except (OSError, SafetensorError) as error:
            problem = getattr(error, "strerror", None) or str(error)
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            delete_expired(policy, newest=folder)
    return broadcast_object_list([problem])[0]


def delete_expired(policy: RetentionPolicy, newest: Path):
    """Delete the checkpoints that are no longer kept; those that the disk refuses to delete wait for the next call."""
    found = []
    with suppress(OSError):
        found = find_checkpoints(newest.parent)
    for checkpoint in policy.expired(found, newest):
        with suppress(OSError):
            delete_dir(checkpoint)


def remove_stale_files(output_dir: Path):
    """Delete what a killed process left half-written. The caller must hold the folder's lock."""
    for pattern in STALE_FOLDERS:
        for path in output_dir.glob(pattern):
            shutil.rmtree(path)
    remove_abandoned(output_dir)


def join_states(states: list[dict]) -> dict:
    """One state from those of all processes: dictionaries are united, anything else is that of the first process."""
    joined = dict(states[0])
    for state in states[1:]:
        for name, value in state.items():
            if isinstance(value, dict):
                joined[name] = {**joined[name], **value}
    return joined


@contextmanager
def raise_if_corrupt(checkpoint: Path) -> Iterator[None]:
    """Around reading a checkpoint: the error of a damaged file becomes a ValueError that names the folder."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, but not the file's fault
    except (RuntimeError, SafetensorError, json.JSONDecodeError, KeyError, EOFError) as error:
        raise ValueError(
            f"{checkpoint} is damaged ({describe_error(error)}): resume from another step-... folder, or move this one "
            "away."
        ) from error


def read_entry(checkpoint: Path, name: str, default: dict | None = None) -> dict:
    """One entry of the checkpoint's state.json; `default` where an older version, which did not know it, wrote that."""
    with raise_if_corrupt(checkpoint):
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        return state[name] if default is None else state.get(name, default)


def read_state(checkpoint: Path, data_fingerprint: dict) -> dict:
    """The checkpoint's state.json.

    Raises:
        ValueError: If it belongs to a run on other data or in another order: every difference, one a line.
    """
    with raise_if_corrupt(checkpoint):
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    saved = state["identity"]
    differences = [
        f"{checkpoint} was made with {name} {saved.get(name)}, not {value}: give the same, or start a new run in "
        "another --output_dir."
        for name, value in data_fingerprint.items()
        if saved.get(name) != value
    ]
    if differences:
        raise ValueError("\n".join(differences))
    return state
