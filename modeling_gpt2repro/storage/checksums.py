"""SHA-256 checksums of files, and of all files in a folder."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from .json_files import is_count, read_json_object, require, shown

LISTED_NAME = re.compile(r"[^/\\:\x00-\x1f\x7f]+(/[^/\\:\x00-\x1f\x7f]+)*")  # relative, with / on every system
SHA256 = re.compile(r"[0-9a-f]{64}")
READ_BYTES = 2**20  # held in memory at a time


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_checksums(folder: Path, listing: str):
    """Write size and SHA-256 of every file in `folder` into its file `listing`, which must be the last one written.

    README.md is left out, because people edit model cards. Every file gets the permissions that the umask gave the
    listing: safetensors creates its files readable by their owner only.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    checksums = {
        name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in files.items()
        if name != "README.md"
    }
    (folder / listing).write_text(json.dumps(checksums, indent=1), encoding="utf-8")
    for path in files.values():
        shutil.copymode(folder / listing, path)


def verify_checksums(folder: Path, listing: str, required: Iterable[str] = ()) -> str | None:
    """Describe the first file of a folder that differs from its listing; None if all are as they were written.

    Args:
        required: Names that the listing must have: whatever it leaves out is not compared.
    """
    try:
        checksums = read_listing(folder / listing)
    except (OSError, ValueError) as error:
        return f"{listing} cannot be read: {error}"
    if missing := [name for name in required if name not in checksums]:
        return f"{listing} does not list {missing[0]}"
    try:
        for name, expected in checksums.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} of {expected['bytes']:,} bytes"
            if sha256_of(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def is_sha256(value: object) -> bool:
    """Whether it is a SHA-256 in hexadecimal."""
    return type(value) is str and SHA256.fullmatch(value) is not None


def read_listing(path: Path) -> dict[str, dict]:
    """File name -> bytes and sha256, as `write_checksums` wrote them.

    Raises:
        OSError: If it is missing, or the disk refuses it.
        ValueError: If it is damaged, empty, or names a file outside of its folder.
    """
    checksums = read_json_object(path)
    require(bool(checksums), "it lists no file")
    for name, expected in checksums.items():
        is_inside = LISTED_NAME.fullmatch(name) is not None and ".." not in name.split("/")
        require(is_inside, f"{shown(name)} is not the name of a file in this folder")
        require(type(expected) is dict and is_count(expected.get("bytes")), f"it has no size of {name}")
        require(is_sha256(expected.get("sha256")), f"it has no SHA-256 of {name}")
    return checksums
