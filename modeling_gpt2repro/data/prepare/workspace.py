"""The folder of a preparation: started, resumed, cleared, finished."""

import os
import shutil
from pathlib import Path

from modeling_gpt2repro.data.shards.dataset import MANIFEST, SPEC_FILE
from modeling_gpt2repro.data.shards.nanogpt_format import SHARD_NAME
from modeling_gpt2repro.storage.atomic import PARTIAL
from modeling_gpt2repro.storage.lock import LOCK_FILE

from .spec import PrepareSpec, read_spec, write_spec
from .token_cache import CACHE_DIR, cached_partitions, clear_unfinished_partitions, mark_unverified

LOGS = "logs"
SLURM_JOBS = "slurm_jobs"  # the ids of submitted jobs, one a line, until the last one ends: the others take no lock
OURS = (SPEC_FILE, CACHE_DIR, LOGS, "tokenizer", MANIFEST)  # beside the shards and LOCK_FILE
ALREADY_PREPARED = "{} holds prepared shards already: use them, or give another --output_dir."


def find_partial_output(folder: Path) -> list[Path]:
    """List what an unfinished preparation left in `folder`; empty if there was none.

    Raises:
        ValueError: If shards cannot be written there: it is a file, write-protected, holds other files, or Slurm's jobs
            may be writing them.
    """
    nearest = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if nearest.exists() and not nearest.is_dir():
        raise ValueError(f"{nearest} is a file: give a folder as --output_dir.")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{nearest} cannot be written to: give another --output_dir.")
    # Listed once, so that a preparation that is just starting or finishing is not seen in two states.
    content = sorted(path for path in folder.iterdir() if path.name != LOCK_FILE) if folder.exists() else []
    is_unfinished = folder / SPEC_FILE in content
    if folder / MANIFEST in content and not is_unfinished:
        raise ValueError(ALREADY_PREPARED.format(folder))
    if (jobs := folder / SLURM_JOBS) in content:
        ids = " ".join(jobs.read_text(encoding="ascii", errors="replace").split())
        raise ValueError(
            f"{folder} is being prepared by Slurm's jobs {ids or '(being submitted)'}: wait until they have ended, or, "
            f"to start again, end them by 'scancel {ids or 'ID'}' and delete {jobs}."
        )
    ours = [path for path in content if _is_partial(path) or (is_unfinished and _is_ours(path))]
    foreign = [path.name for path in content if path not in ours]
    if foreign:
        raise ValueError(f"{folder} holds other files ({', '.join(foreign[:3])}): give an empty --output_dir.")
    return ours


def start_job(folder: Path, spec: PrepareSpec, resume: bool = False) -> PrepareSpec:
    """Create `folder` and write the spec, which marks it as unfinished; clear what an unfinished preparation left.

    Args:
        resume: Keep the partitions that are finished already. If their file may have changed since, the workers compare
            them with it first.

    Returns:
        The spec as it was written, with the cache numbers of the partitions that are kept.

    Raises:
        ValueError: See `find_partial_output`; or if the preparation to be resumed has another spec.
    """
    leftovers = find_partial_output(folder)
    if resume and (cached := cached_partitions(folder)):
        previous_spec = read_spec(folder)
        if names := spec.differences(previous_spec):
            if names == ["source"] and spec.source == {**previous_spec.source, "line_ends": "LF"}:
                raise ValueError(
                    f"{folder} holds an unfinished preparation that an older version began, which left line ends as "
                    "they are: delete it, or give another --output_dir."
                )
            differences = ", ".join(_describe_difference(name, previous_spec, spec) for name in names)
            raise ValueError(
                f"{folder} holds an unfinished preparation with other options ({differences}): give the same options "
                "to resume it, another --output_dir, or delete it."
            )
        leftovers = [path for path in leftovers if _is_partial(path) or SHARD_NAME.fullmatch(path.name)]
        spec, unverified = spec.resume_from(previous_spec, unused_number=max([*cached, *previous_spec.numbers]) + 1)
        mark_unverified(folder, unverified)  # before the spec is written, which says that all files are as they are now
        clear_unfinished_partitions(folder, spec.numbers)
    # The spec goes last: if this is interrupted, the rest would not be recognized as ours without it.
    for path in sorted(leftovers, key=lambda path: path.name == SPEC_FILE):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    write_spec(folder, spec)
    return spec


def is_prepared(folder: Path, spec: PrepareSpec) -> bool:
    """Whether all shards of the spec are written, and only `finish_job` was interrupted.

    Raises:
        ValueError: If the shards there are of another spec.
    """
    if not (folder / MANIFEST).exists():
        return False
    previous_spec = read_spec(folder)  # None if another program has finished it meanwhile
    if previous_spec is None or spec.differences(previous_spec) or spec.changed_files(previous_spec):
        raise ValueError(ALREADY_PREPARED.format(folder))
    return True


def finish_job(folder: Path, keep_logs: bool = False):
    """Delete what only the preparation needed, once its manifest is written."""
    shutil.rmtree(folder / CACHE_DIR, ignore_errors=True)
    if not keep_logs:
        shutil.rmtree(folder / LOGS, ignore_errors=True)
    (folder / SLURM_JOBS).unlink(missing_ok=True)
    (folder / SPEC_FILE).unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    return path.name in OURS or SHARD_NAME.fullmatch(path.name) is not None


def _is_partial(path: Path) -> bool:
    """Whether it is a temporary file of `atomic_write` for a spec, a manifest or a shard."""
    name = path.name.rsplit(".", 2)[0]
    return PARTIAL.fullmatch(path.name) is not None and (name in OURS or SHARD_NAME.fullmatch(name) is not None)


def _describe_difference(name: str, previous_spec: PrepareSpec, spec: PrepareSpec) -> str:
    before = getattr(previous_spec, name)
    now = getattr(spec, name)
    if isinstance(before, dict):
        changed = {key for key in {**before, **now} if before.get(key) != now.get(key)}
        before = {key: value for key, value in before.items() if key in changed}
        now = {key: value for key, value in now.items() if key in changed}
    return f"{name} {before} there, {now} now"
