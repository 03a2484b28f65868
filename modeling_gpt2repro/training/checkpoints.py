"""Checkpoints: a Hub folder with the training state in a subfolder, written under a temporary name, then renamed."""

import json
import os
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
from modeling_gpt2repro.storage.checksums import write_checksums
from modeling_gpt2repro.storage.json_files import shown
from modeling_gpt2repro.storage.model_files import loading_problem
from modeling_gpt2repro.storage.retry import describe_error

from .checkpoint_checks import (
    CHECKSUMS_FILE,
    STATE_FILE,
    STATE_FOLDER,
    STEP_FOLDER,
    checkpoint_problem,
    read_checked_state,
)
from .optimizer_state import OPTIMIZER_FILE, RANDOM_FILE, save_tensors

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


def step_folders(output_dir: Path) -> list[Path]:
    """All that is named like a checkpoint, finished or not, the oldest first."""
    return sorted((path for path in output_dir.glob("step-*") if STEP_FOLDER.fullmatch(path.name)), key=step_of)


def find_checkpoints(output_dir: Path) -> list[Path]:
    """All finished checkpoints, the oldest first. A folder gets its name only when everything is in it."""
    return [path for path in step_folders(output_dir) if (path / CHECKSUMS_FILE).is_file()]


def find_resume_checkpoint(
    resume_from: str | None, output_dir: Path, read_config: Callable[[Path], object] = lambda checkpoint: None
) -> tuple[Path | None, list[str]]:
    """Resolve `--resume_from_checkpoint`: None, 'latest' (None if there is none yet), a folder, or a Hub repository.

    Args:
        read_config: Raises ValueError if the config in a checkpoint is not one of the model's.

    Returns:
        The checkpoint, checked by `checkpoint_problem`, and a sentence on each newer one that is damaged or unfinished.

    Raises:
        ValueError: If the folder is not a checkpoint, or damaged, or all are.
    """
    if resume_from is None:
        return None, []
    recover_interrupted_replace(output_dir, "step-*")
    found = step_folders(output_dir)
    if resume_from == "latest":
        passed_over = []
        for checkpoint in reversed(found):
            problem = checkpoint_problem(checkpoint, read_config)
            if problem is None:
                return checkpoint, passed_over
            passed_over.append(f"{checkpoint} {problem} and is passed over.")
        if passed_over:
            nothing_left = f"{output_dir} has no other checkpoint: give a new --output_dir."
            raise ValueError("\n".join([*passed_over, nothing_left]))
        return None, []
    checkpoint = open_named_checkpoint(resume_from, read_config)
    is_here = os.path.realpath(checkpoint) in map(os.path.realpath, found)
    later = [path.name for path in found if is_here and step_of(path) > step_of(checkpoint)]
    if later:
        raise ValueError(
            f"{output_dir} holds later checkpoints than {checkpoint.name} ({', '.join(later)}): move them away first, "
            "so that the run has one history."
        )
    return checkpoint, []


def open_named_checkpoint(name: str, read_config: Callable[[Path], object]) -> Path:
    """A checkpoint by its folder, or downloaded from the Hub by `owner/name` or `owner/name@revision`.

    Raises:
        ValueError: If there is none, or it is damaged, see `checkpoint_problem`.
    """
    checkpoint = Path(name)
    if not checkpoint.is_dir() and (on_hub := HUB_NAME.fullmatch(name)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            checkpoint = Path(snapshot_download(on_hub["repository"], revision=on_hub["revision"]))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            reason = loading_problem(error)
            raise ValueError(f"{name} is not a folder, and the Hub does not provide it ({reason}).") from error
    if not (checkpoint / CHECKSUMS_FILE).is_file():
        raise ValueError(f"{name} is not a checkpoint (no {CHECKSUMS_FILE}): give a step-... folder or 'latest'.")
    if problem := checkpoint_problem(checkpoint, read_config):
        raise ValueError(f"{name} {problem}: resume from another one, or move this one away.")
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
    except (OSError, RuntimeError, SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{checkpoint} is damaged ({describe_error(error)}): resume from another step-... folder, or move this one "
            "away."
        ) from error


def read_state(checkpoint: Path, data_fingerprint: dict | None = None, optimizer: str | None = None) -> dict:
    """The checkpoint's state.json, see `read_checked_state`.

    Args:
        data_fingerprint, optimizer: Of the run that continues, to be compared with the checkpoint's.

    Raises:
        ValueError: If it is damaged, or belongs to a run on other data, in another order or with another optimizer:
            every difference, one a line.
    """
    with raise_if_corrupt(checkpoint):
        state = read_checked_state(checkpoint)
    usual = {"overfit_one_batch": False}  # fingerprints name it only where it is True
    saved = usual | state["identity"]
    wanted = usual | data_fingerprint if data_fingerprint else {}
    differences = [
        f"{checkpoint} was made with {name} {shown(saved.get(name), 1000)}, not {shown(value, 1000)}: give the same, "
        "or start a new run in another --output_dir."
        for name, value in wanted.items()
        if saved.get(name) != value
    ]
    if optimizer not in (None, state["optimizer"]):
        differences.append(
            f"{checkpoint} holds the state of the optimizer {state['optimizer']}, which {optimizer} cannot continue "
            f"from: give the --recipe of its run, or --optimizer {state['optimizer']}, or start a new run from its "
            f"weights with --init_from {checkpoint} and another --output_dir."
        )
    if differences:
        raise ValueError("\n".join(differences))
    return state
