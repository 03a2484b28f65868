"""Checkpoints: Hub folders with the training state in a subfolder, written aside, completed, renamed."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from modeling_gpt2repro.storage.atomic import delete_dir, recover_interrupted_replace, replace_dir
from modeling_gpt2repro.storage.checksums import verify_checksums, write_checksums

from .optimizer_state import OPTIMIZER_FILE, RANDOM_FILE, save_tensors

STATE_FOLDER = "training_state"
STATE_FILE = f"{STATE_FOLDER}/state.json"
PREFLIGHT = "step-preflight"  # a checkpoint for a trial, not to be gone on from
CHECKSUMS_FILE = f"{STATE_FOLDER}/files.json"  # written last: its presence means that all files are there
HUB_NAME = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


def checkpoint_name(step: int) -> str:
    """500 -> 'step-000500'."""
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """'step-000500' -> 500."""
    return int(checkpoint.name.removeprefix("step-"))


def find_checkpoints(output_dir: Path) -> list[Path]:
    """All finished checkpoints, the oldest first. A folder gets its name only when everything is in it."""
    named = [path for path in output_dir.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    return sorted((path for path in named if (path / CHECKSUMS_FILE).is_file()), key=step_of)


def find_resume_checkpoint(resume_from: str | None, output_dir: Path) -> tuple[Path | None, list[str]]:
    """Resolve `--resume_from_checkpoint`: None, 'latest' (None where there is none yet), a folder, or a Hub repository.

    Returns:
        The checkpoint, every file of which is as it was written, and a sentence on each newer one that is not.

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
            wrong = verify_checksums(checkpoint, CHECKSUMS_FILE)
            if wrong is None:
                return checkpoint, damaged
            damaged.append(f"{checkpoint} is damaged ({wrong}) and passed over.")
        if damaged:
            raise ValueError("\n".join([*damaged, f"{output_dir} has no checkpoint left: give another --output_dir."]))
        return None, []
    checkpoint = open_named_checkpoint(resume_from)
    here = checkpoint.resolve() in [path.resolve() for path in found]
    later = [path.name for path in found if here and step_of(path) > step_of(checkpoint)]
    if later:
        raise ValueError(
            f"{output_dir} holds later checkpoints than {checkpoint.name} ({', '.join(later)}): move them away first, "
            "so that there is one history."
        )
    return checkpoint, []


def open_named_checkpoint(name: str) -> Path:
    """A checkpoint by its folder, or fetched from the Hub by `owner/name` or `owner/name@revision`.

    Raises:
        ValueError: If there is none, or not all of it is as it was written.
    """
    checkpoint = Path(name)
    if not checkpoint.is_dir() and (on_hub := HUB_NAME.fullmatch(name)):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            checkpoint = Path(snapshot_download(on_hub["repository"], revision=on_hub["revision"]))
        except (HfHubHTTPError, LocalEntryNotFoundError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise ValueError(f"{name} is no folder, and the Hub does not give it ({reason}).") from error
    if not (checkpoint / CHECKSUMS_FILE).is_file():
        raise ValueError(f"{name} is no checkpoint (it has no {CHECKSUMS_FILE}): give a step-... folder or 'latest'.")
    if wrong := verify_checksums(checkpoint, CHECKSUMS_FILE):
        raise ValueError(f"{name} is damaged ({wrong}): resume from another one, or move this one away.")
    return checkpoint


@dataclass(frozen=True)
class RetentionPolicy:
    """Which checkpoints stay when a new one stands.

    Args:
        limit: The newest so many; all where it is None or 0.
        every: Those whose step is a multiple stay for good; none where it is 0.
    """

    limit: int | None = None
    every: int = 0

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
    optimizer: dict[str, torch.Tensor],
    random: dict[str, torch.Tensor],
    state: dict,
    keep: RetentionPolicy,
) -> str | None:
    """Write `folder`, a `step-NNNNNN`; to be called by all processes together, the main one writes.

    Args:
        write_model: Writes what loads from the Hub into a folder.
        optimizer, random: See `state_tensors`.
        state: For state.json: `progress`, `data`, `identity` (what must be the same when the run goes on), ...
        keep: Which older ones stay.

    Returns:
        None, or why it could not be written; then everything is as before, on all processes.
    """
    problem = None
    if accelerator.is_main_process:
        aside = folder.with_name(f".{folder.name}.partial")
        try:
            shutil.rmtree(aside, ignore_errors=True)
            (aside / STATE_FOLDER).mkdir(parents=True)
            write_model(aside)
            save_tensors(optimizer, aside / STATE_FOLDER / OPTIMIZER_FILE)
            save_tensors(random, aside / STATE_FOLDER / RANDOM_FILE)
            (aside / STATE_FILE).write_text(json.dumps(state, indent=1), encoding="utf-8")
            write_checksums(aside, CHECKSUMS_FILE)
            replace_dir(aside, folder)
            for old in keep.expired(find_checkpoints(folder.parent), folder):
                delete_dir(old)
        except (OSError, SafetensorError) as error:
            problem = getattr(error, "strerror", None) or str(error)
            shutil.rmtree(aside, ignore_errors=True)
    return broadcast_object_list([problem])[0]


def remove_stale_files(output_dir: Path):
    """Remove what a killed save left half-written."""
    for pattern in (
        ".step-*.partial",
        ".step-*.old",
        ".step-*.gone",
        ".model.partial",
        ".model.old",
        ".push-*",
        PREFLIGHT,
    ):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path)


def join_states(states: list[dict]) -> dict:
    """One state from those of all processes: dictionaries are united, everything else is equal anyway."""
    joined = dict(states[0])
    for state in states[1:]:
        for name, value in state.items():
            joined[name] = {**joined[name], **value} if isinstance(value, dict) else value
    return joined


@contextmanager
def raise_if_corrupt(checkpoint: Path):
    """Around reading a checkpoint: what a damaged file raises becomes a ValueError that names the folder."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, but not the file's fault
    except (RuntimeError, SafetensorError, json.JSONDecodeError, KeyError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{checkpoint} is damaged ({reason}): resume from another step-... folder, or move this one away."
        ) from error


def read_state(checkpoint: Path, identity: dict) -> dict:
    """The checkpoint's state.json.

    Raises:
        ValueError: If it belongs to another run: every difference, one a line.
    """
    with raise_if_corrupt(checkpoint):
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    differences = [
        f"{checkpoint} was made with {name} {state['identity'].get(name)}, not {value}: give the same, or start a new "
        "run in another --output_dir."
        for name, value in identity.items()
        if state["identity"].get(name) != value
    ]
    if differences:
        raise ValueError("\n".join(differences))
    return state
