"""Writing token shards, so that a folder is either a whole preparation or known to be unfinished."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np

from .shards import FORMAT, MANIFEST, SPLITS

# Made first and renamed last: a folder that holds it is an unfinished preparation, and may be cleared.
UNFINISHED = MANIFEST + ".partial"
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})_\d{{6,}}\.(npy|partial)")


class ShardWriter:
    """Write the shards of one split, `max_tokens` at most: each under a temporary name, flushed, then renamed."""

    def __init__(self, folder: Path, split: str, shard_tokens: int, end_of_text: int, max_tokens: int | None = None):
        self.folder, self.split = folder, split
        self.end_of_text, self.max_tokens = end_of_text, max_tokens
        self.tokens = self.documents = self.text_bytes = 0
        self.entries: list[dict] = []
        self._buffer = np.empty(shard_tokens, dtype=np.uint16)
        self._filled = 0

    @property
    def is_full(self) -> bool:
        """Whether no more is taken."""
        return self.tokens == self.max_tokens

    def append(self, ids: np.ndarray, text_bytes: int):
        """Add ids (n,) uint16 after what was added before; a shard ends wherever it is full.

        Args:
            text_bytes: UTF-8 bytes that the ids stand for; counted in proportion where not all are taken.
        """
        all_ids, ids = len(ids), ids if self.max_tokens is None else ids[: self.max_tokens - self.tokens]
        self.documents += int(np.count_nonzero(ids == self.end_of_text))
        self.text_bytes += text_bytes * len(ids) // max(1, all_ids)
        while len(ids):
            taken = min(len(ids), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken] = ids[:taken]
            self._filled += taken
            self.tokens += taken
            ids = ids[taken:]
            if self._filled == len(self._buffer):
                self._write()

    def finish(self) -> dict:
        """Write what is left and return the split's part of the manifest."""
        if self._filled:
            self._write()
        totals = {"tokens": self.tokens, "documents": self.documents, "text_bytes": self.text_bytes}
        return {**totals, "shards": self.entries}

    def _write(self):
        path = self.folder / f"{self.split}_{len(self.entries):06d}.npy"
        temporary = path.with_suffix(".partial")
        ids = self._buffer[: self._filled]
        with open(temporary, "wb") as file:
            np.save(file, ids)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        digest = hashlib.sha256(ids).hexdigest()
        self.entries.append({"file": path.name, "tokens": len(ids), "sha256": digest})
        self._filled = 0


def write_manifest(folder: Path, manifest: dict):
    """Write the manifest last, whole or not at all: a folder without one is not a prepared folder."""
    with open(folder / UNFINISHED, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **manifest}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / UNFINISHED, folder / MANIFEST)


def find_remains(folder: Path) -> list[Path]:
    """What an unfinished preparation left in `folder`; nothing where there is none.

    Raises:
        ValueError: If shards cannot be written there: it is no folder, write-protected, or holds something else.
    """
    nearest = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if nearest.exists() and not nearest.is_dir():
        raise ValueError(f"{nearest} is a file: give a folder as --output_dir.")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{nearest} cannot be written to: give another --output_dir.")
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds prepared shards already: use them, or give another --output_dir.")
    inside = sorted(folder.iterdir()) if folder.exists() else []
    unfinished = (folder / UNFINISHED).exists()
    ours = [p for p in inside if unfinished and (p.name in ("tokenizer", UNFINISHED) or SHARD_NAME.fullmatch(p.name))]
    foreign = [path.name for path in inside if path not in ours]
    if foreign:
        raise ValueError(f"{folder} holds other files ({', '.join(foreign[:3])}): give an empty --output_dir.")
    return ours


def begin_preparation(folder: Path):
    """Make `folder`, or clear what an unfinished preparation left there, and mark it as unfinished.

    Raises:
        ValueError: See `find_remains`.
    """
    for path in find_remains(folder):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != UNFINISHED:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).touch()
