"""Folders that are whole or not there: written aside, listed with sizes and hashes, renamed when all is on disk."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path


def seal(folder: Path, listing: str):
    """Write sizes and hashes of all files in `folder` into its file `listing`, the last one.

    A README.md is not listed: people edit cards. Each may be read by whom the umask lets read the listing: safetensors
    are their owner's alone when they are written.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    known = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in files.items()
        if name != "README.md"
    }
    (folder / listing).write_text(json.dumps(known, indent=1), encoding="utf-8")
    for path in files.values():
        shutil.copymode(folder / listing, path)


def what_is_wrong(folder: Path, listing: str) -> str | None:
    """The first file of a sealed folder that is not as it was written, in words; None where all are."""
    try:
        known = json.loads((folder / listing).read_text(encoding="utf-8"))
        for name, written in known.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != written["bytes"]:
                return f"{name} has {path.stat().st_size:,} of {written['bytes']:,} bytes"
            if sha256_of(path) != written["sha256"]:
                return f"{name} has changed since it was written"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{listing} cannot be read"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def sha256_of(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def put_in_place(aside: Path, folder: Path):
    """Rename a finished folder to its name, once all of it is on disk; one that had the name stays until then."""
    flush(aside)
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    flush_names(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def bring_back(folder: Path, pattern: str):
    """Give folders their name back that were about to be replaced when the process was killed."""
    for old in folder.glob(f".{pattern}.old"):
        name = old.name.removeprefix(".").removesuffix(".old")
        if not (folder / name).exists():
            os.replace(old, folder / name)


def remove(folder: Path):
    """Delete a folder that is never seen half-deleted under its name."""
    gone = folder.with_name(f".{folder.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def flush(folder: Path):
    """Bring a folder's files and names to disk."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            flush_names(path)
        else:
            with open(path, "rb+") as file:
                os.fsync(file.fileno())


def flush_names(folder: Path):
    """Bring the names in `folder` to disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL:  # as some network disks answer, which know it for files only
                raise
        finally:
            os.close(descriptor)
