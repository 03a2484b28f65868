"""Checkpoints: Hub folders with the training state in a subfolder, written aside, completed, renamed."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.optim import Optimizer

from .progress import TrainProgress

STATE_FOLDER = "training_state"


def checkpoint_name(step: int) -> str:
    """500 -> 'step-000500'."""
    return f"step-{step:06d}"


def find_checkpoints(output_dir: Path) -> list[Path]:
    """All finished checkpoints, the oldest first. A folder gets its name only when everything is in it."""
    return sorted(p for p in output_dir.glob("step-*") if (p / STATE_FOLDER / "state.json").is_file())


def find_resume_checkpoint(resume_from: str | None, output_dir: Path) -> Path | None:
    """Resolve `--resume_from_checkpoint`: None, 'latest' (None where there is none yet) or a folder.

    Raises:
        ValueError: If the folder is not a checkpoint.
    """
    if resume_from is None:
        return None
    if resume_from == "latest":
        return (find_checkpoints(output_dir) or [None])[-1]
    if not (Path(resume_from) / STATE_FOLDER / "state.json").is_file():
        raise ValueError(
            f"{resume_from} is no checkpoint (it has no {STATE_FOLDER}/state.json): give a step-... folder or 'latest'."
        )
    return Path(resume_from)


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    write_model: Callable[[Path], None],
    optimizer: Optimizer,
    progress: TrainProgress,
    data_state: dict,
    identity: dict,
    save_total_limit: int | None = None,
) -> Path:
    """Write `output_dir/step-NNNNNN`; to be called by all processes together.

    Args:
        write_model: Writes what loads from the Hub into a folder; called on the main process.
        data_state: This process's place in the data; the places of all processes are joined.
        identity: What must be the same when the run goes on (data, order, shape).
        save_total_limit: Older checkpoints beyond this number are removed, after the new one stands.
    """
    joined = _join(gather_object([data_state]))
    folder = output_dir / checkpoint_name(progress.step)
    if accelerator.is_main_process:
        aside = output_dir / f".{folder.name}.partial"
        shutil.rmtree(aside, ignore_errors=True)
        (aside / STATE_FOLDER).mkdir(parents=True)
        write_model(aside)
        torch.save(optimizer.state_dict(), aside / STATE_FOLDER / "optimizer.pt")
        state = {"progress": progress.state_dict(), "data": joined, "identity": identity}
        (aside / STATE_FOLDER / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in aside.rglob("*"):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
        for old in find_checkpoints(output_dir)[:-save_total_limit] if save_total_limit else []:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def read_state(checkpoint: Path, identity: dict) -> dict:
    """The checkpoint's `progress` and `data`.

    Raises:
        ValueError: If it belongs to another run: every difference, one a line.
    """
    state = json.loads((checkpoint / STATE_FOLDER / "state.json").read_text(encoding="utf-8"))
    differences = [
        f"{checkpoint} was made with {name} {state['identity'].get(name)}, not {value}: give the same, or start a new "
        "run in another --output_dir."
        for name, value in identity.items()
        if state["identity"].get(name) != value
    ]
    if differences:
        raise ValueError("\n".join(differences))
    return state


def load_optimizer(checkpoint: Path, optimizer: Optimizer, device: torch.device):
    """Restore the optimizer's moments; nothing in the file can run code."""
    path = checkpoint / STATE_FOLDER / "optimizer.pt"
    optimizer.load_state_dict(torch.load(path, map_location=device, weights_only=True, mmap=True))


def _join(states: list[dict]) -> dict:
    """One state from those of all processes: dictionaries are united, everything else is equal anyway."""
    joined = dict(states[0])
    for state in states[1:]:
        for name, value in state.items():
            joined[name] = {**joined[name], **value} if isinstance(value, dict) else value
    return joined
