"""Atomic writes of files and folders: a temporary name, fsync, rename.

A reader of `path` finds all of the file or nothing, also after a crash or a power cut.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

PARTIAL = re.compile(r".+\.[0-9a-f]{8}\.partial")  # the name of a temporary file
ABANDONED_SECONDS = 600.0  # without a write, after which its writer is taken for dead
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing inside the `with` block; afterwards `path` holds all of it, and its folder exists.

    If the block raises, whatever was at `path` before is left as it was. Of two writers, the later one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open_temporary(path)
    try:
        yield file
        commit(file, path)
    except BaseException:
        abort(file)
        raise


def write_json(path: Path, value: Mapping | Sequence):
    """Write JSON atomically, indented for people."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=2).encode() + b"\n")


def open_temporary(path: Path) -> BinaryIO:
    """Open a new file beside `path`, with a name of its own, so that two writers of one path do not collide."""
    return open(path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial"), "wb")


def commit(file: BinaryIO, path: Path):
    """Rename a file of `open_temporary` to `path` once its content is on disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    fsync_dir(path.parent)


def abort(file: BinaryIO):
    """Delete a file of `open_temporary`, which gives a full disk its space back; never raises an OSError."""
    with suppress(OSError):  # closing flushes what is buffered, and that does not fit either
        file.close()
    with suppress(OSError):  # there is none, or the disk refuses everything for now
        os.unlink(file.name)


def remove_abandoned(folder: Path):
    """Delete temporary files that killed programs left in `folder`: those not written to for ten minutes.

    A younger one may belong to a live program that needs no lock: a plot of the run, a worker on another machine.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        now = os.fstat(file.fileno()).st_mtime  # by the file server's clock, like the times below
    for path in folder.glob("*.partial"):
        with suppress(FileNotFoundError):  # it has just been renamed
            if PARTIAL.fullmatch(path.name) and now - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()


def replace_dir(temporary: Path, folder: Path):
    """Rename a finished folder to `folder` once its content is on disk; an older `folder` stays until then.

    Raises:
        OSError: If the disk refuses; an older `folder` is still there then.
    """
    fsync_tree(temporary)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except OSError:
        with suppress(OSError):  # else `recover_interrupted_replace` does it when the run is resumed
            os.replace(old, folder)
        raise
    fsync_dir(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover_interrupted_replace(parent: Path, pattern: str):
    """Give folders their name back if the process was killed between the two renames of `replace_dir`."""
    for old in parent.glob(f".{pattern}.old"):
        name = old.name.removeprefix(".").removesuffix(".old")
        if not (parent / name).exists():
            os.replace(old, parent / name)


def delete_dir(folder: Path):
    """Delete a folder that must never be seen half-deleted under its name."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def fsync_tree(folder: Path):
    """Flush a folder's files, and the names in it and in its subfolders, to disk."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            fsync_dir(path)
        else:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def fsync_dir(folder: Path):
    """Flush the names in a folder to disk, where the system can: a rename is durable only after this."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the answer of network disks that can flush files but not folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def explain_disk_full(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a sentence.

    Raises:
        ValueError: If the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise ValueError(
            f"the disk of {folder} is full ({error.strerror}): free some space and run the same command again; "
            "finished work is kept."
        ) from error
