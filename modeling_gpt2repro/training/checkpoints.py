"""Checkpoints: Hub folders with the training state in a subfolder, written aside, completed, renamed."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.optim import Optimizer

from .progress import TrainProgress

STATE_FOLDER = "training_state"


def checkpoint_name(step: int) -> str:
    """500 -> 'step-000500'."""
    return f"step-{step:06d}"


def find_checkpoints(output_dir: Path) -> list[Path]:
    """All finished checkpoints, the oldest first. A folder gets its name only when everything is in it."""
    named = [path for path in output_dir.glob("step-*") if path.name.removeprefix("step-").isdigit()]
    finished = [path for path in named if (path / STATE_FOLDER / "state.json").is_file()]
    return sorted(finished, key=step_of)


def step_of(checkpoint: Path) -> int:
    """'step-000500' -> 500."""
    return int(checkpoint.name.removeprefix("step-"))


def find_resume_checkpoint(resume_from: str | None, output_dir: Path) -> Path | None:
    """Resolve `--resume_from_checkpoint`: None, 'latest' (None where there is none yet) or a folder.

    Raises:
        ValueError: If the folder is not a checkpoint.
    """
    if resume_from is None:
        return None
    found = find_checkpoints(output_dir)
    if resume_from == "latest":
        return found[-1] if found else None
    if not (Path(resume_from) / STATE_FOLDER / "state.json").is_file():
        raise ValueError(
            f"{resume_from} is no checkpoint (it has no {STATE_FOLDER}/state.json): give a step-... folder or 'latest'."
        )
    checkpoint = Path(resume_from)
    later = [path.name for path in found if checkpoint.parent.resolve() == output_dir.resolve() and path > checkpoint]
    if later:
        raise ValueError(
            f"{output_dir} holds later checkpoints than {checkpoint.name} ({', '.join(later)}): move them away first, "
            "so that there is one history."
        )
    return checkpoint


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
        put_in_place(aside, folder)
        for old in find_checkpoints(output_dir)[:-save_total_limit] if save_total_limit else []:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return folder


def put_in_place(aside: Path, folder: Path):
    """Rename a finished folder to its name; one that had it stays until then."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def clear_remains(output_dir: Path):
    """Remove what a killed save left half-written."""
    for pattern in (".step-*.partial", ".step-*.old", ".model.partial", ".model.old"):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path)


@contextmanager
def damage_is_told(checkpoint: Path):
    """Around reading a checkpoint: what a damaged file raises becomes a ValueError that names the folder."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, but not the file's fault
    except (RuntimeError, SafetensorError, pickle.UnpicklingError, json.JSONDecodeError, KeyError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{checkpoint} is damaged ({reason}): resume from another step-... folder, or move this one away."
        ) from error


def read_state(checkpoint: Path, identity: dict) -> dict:
    """The checkpoint's `progress` and `data`.

    Raises:
        ValueError: If it belongs to another run: every difference, one a line.
    """
    with damage_is_told(checkpoint):
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
    """Restore the optimizer's moments; its rates stay those of the arguments. Nothing in the file can run code."""
    path = checkpoint / STATE_FOLDER / "optimizer.pt"
    rates = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    # Mapped, so that no second copy is held; on the CPU the moments would stay in the file, which may be deleted.
    with damage_is_told(checkpoint):
        state = torch.load(path, map_location=device, weights_only=True, mmap=device.type != "cpu")
    optimizer.load_state_dict(state)
    for group, wanted in zip(optimizer.param_groups, rates, strict=True):
        group.update(wanted)


def _join(states: list[dict]) -> dict:
    """One state from those of all processes: dictionaries are united, everything else is equal anyway."""
    joined = dict(states[0])
    for state in states[1:]:
        for name, value in state.items():
            joined[name] = {**joined[name], **value} if isinstance(value, dict) else value
    return joined
