"""The folder of a preparation, from the first file to the last: what may be begun, gone on with, or cleared."""

import os
import shutil
from pathlib import Path

from modeling_gpt2repro.data.shards.dataset import MANIFEST
from modeling_gpt2repro.data.shards.layouts import SHARD_NAME
from modeling_gpt2repro.storage.atomic import PARTIAL

from .spec import PLAN, PrepareSpec, read_spec, write_spec
from .token_cache import UNITS, clear_unfinished_partitions, finished_partitions

LOGS = "logs"
PREPARED = "{} holds prepared shards already: use them, or give another --output_dir."
OURS = (PLAN, UNITS, LOGS, "tokenizer", MANIFEST)


def find_partial_output(folder: Path) -> list[Path]:
    """What an unfinished preparation left in `folder`; nothing where there is none.

    Raises:
        ValueError: If shards cannot be written there: it is no folder, write-protected, or holds something else.
    """
    nearest = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if nearest.exists() and not nearest.is_dir():
        raise ValueError(f"{nearest} is a file: give a folder as --output_dir.")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{nearest} cannot be written to: give another --output_dir.")
    unfinished = (folder / PLAN).exists()
    if (folder / MANIFEST).exists() and not unfinished:
        raise ValueError(PREPARED.format(folder))
    inside = sorted(folder.iterdir()) if folder.exists() else []
    ours = [path for path in inside if _is_partial(path) or (unfinished and _is_ours(path))]
    foreign = [path.name for path in inside if path not in ours]
    if foreign:
        raise ValueError(f"{folder} holds other files ({', '.join(foreign[:3])}): give an empty --output_dir.")
    return ours


def start_job(folder: Path, plan: PrepareSpec, resume: bool = False):
    """Make `folder` and mark it as unfinished by the plan; what an unfinished preparation left there is cleared.

    Args:
        resume: Finished units stay, to go on with them.

    Raises:
        ValueError: See `find_partial_output`; and if what would be gone on with was another plan.
    """
    remains = find_partial_output(folder)
    if resume and finished_partitions(folder):
        begun = read_spec(folder)
        if differing := plan.differences(begun):
            told = ", ".join(_difference(name, begun, plan) for name in differing)
            raise ValueError(
                f"{folder} holds an unfinished preparation with another plan ({told}): give the same options to go on "
                "with it, another --output_dir, or delete it."
            )
        remains = [path for path in remains if _is_partial(path) or SHARD_NAME.fullmatch(path.name)]
        clear_unfinished_partitions(folder)
    # The plan goes last: without it, what is left would not be known as ours.
    for path in sorted(remains, key=lambda path: path.name == PLAN):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_spec(folder, plan)


def is_prepared(folder: Path, plan: PrepareSpec) -> bool:
    """Whether the plan's shards are all there, and nothing but the clearing was cut off.

    Raises:
        ValueError: If those of another plan are.
    """
    if not (folder / MANIFEST).exists():
        return False
    if plan.differences(read_spec(folder)):
        raise ValueError(PREPARED.format(folder))
    return True


def finish_job(folder: Path, keep_logs: bool = False):
    """Remove what served the preparation alone, after its manifest was written."""
    shutil.rmtree(folder / UNITS, ignore_errors=True)
    if not keep_logs:
        shutil.rmtree(folder / LOGS, ignore_errors=True)
    (folder / PLAN).unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    return path.name in OURS or SHARD_NAME.fullmatch(path.name) is not None


def _is_partial(path: Path) -> bool:
    """Whether `atomic_write` had begun it in this folder: a plan, a manifest or a shard."""
    name = path.name.rsplit(".", 2)[0]
    return PARTIAL.fullmatch(path.name) is not None and (name in OURS or SHARD_NAME.fullmatch(name) is not None)


def _difference(name: str, begun: PrepareSpec, now: PrepareSpec) -> str:
    before, after = getattr(begun, name), getattr(now, name)
    if name in ("units", "files"):
        return "other text, or text that changed"
    if isinstance(before, dict):
        before, after = (
            {key: value for key, value in one.items() if other.get(key) != value}
            for one, other in ((before, after), (after, before))
        )
    return f"{name} {before} there, {after} now"
