"""Files that are there whole or not at all, and a disk that is full."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

# How a file ends that is not whole; what is left of one when its writer was killed may be removed.
PARTIAL = re.compile(r".+\.[0-9a-f]{8}\.partial")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_aside(path: Path) -> BinaryIO:
    """A new file beside `path`, under a name of its own: two writers of the same file do not meet."""
    return open(path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial"), "wb")


def put_in_place(file: BinaryIO, path: Path):
    """Give a file of `open_aside` its name, once all of it has reached the disk."""
    file.flush()
    os.fsync(file.fileno())
    file.close()
    os.replace(file.name, path)
    if os.name == "posix":  # the name is on the disk when the folder is
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def written_aside(path: Path) -> Iterator[BinaryIO]:
    """A file to write inside the `with` block; after it, `path` is there with all of it."""
    file = open_aside(path)
    try:
        yield file
        put_in_place(file, path)
    except BaseException:
        discard(file)
        raise


def discard(file: BinaryIO):
    """Remove a file of `open_aside`, so that a full disk gets its room back."""
    with suppress(OSError):  # what was not written yet does not fit either
        file.close()
    Path(file.name).unlink(missing_ok=True)


@contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk into a sentence.

    Raises:
        ValueError: If the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        raise ValueError(
            f"the disk of {folder} is full ({error.strerror}): make room and run the same command again; what is "
            "finished is kept."
        ) from error
