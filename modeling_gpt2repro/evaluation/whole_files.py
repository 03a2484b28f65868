"""Files that are there whole or not at all; data/written_aside.py is the data room's own, as rooms share no code."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write inside the `with` block; after it, `path` is there with all of it, its folder made if need be.

    If the block raises, what was at `path` before stays as it is. Two writers do not meet: the later one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
