"""SHA-256 checksums of files, and of all files in a folder."""

import hashlib
import json
import shutil
from pathlib import Path

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


def verify_checksums(folder: Path, listing: str) -> str | None:
    """Describe the first file of a folder that differs from its listing; None if all are as they were written."""
    try:
        checksums = json.loads((folder / listing).read_text(encoding="utf-8"))
        for name, expected in checksums.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size:,} of {expected['bytes']:,} bytes"
            if sha256_of(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{listing} cannot be read"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None
