"""Writing the token shards of one split."""

import hashlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from modeling_gpt2repro.storage.atomic import abort, commit, open_temporary

from .layouts import shard_length, shard_name


class ShardWriter:
    """Write the shards of one split, `max_tokens` at most: each aside and as it comes, flushed, then renamed."""

    def __init__(
        self,
        folder: Path,
        split: str,
        shard_tokens: int,
        end_of_text: int,
        max_tokens: int | None = None,
        layout: str = "plain",
    ):
        self.folder, self.split, self.layout = folder, split, layout
        self.end_of_text, self.max_tokens = end_of_text, max_tokens
        self.shard_tokens = shard_length(layout, split, shard_tokens)
        self.tokens = self.documents = self.text_bytes = 0
        self.entries: list[dict] = []
        self._file: BinaryIO | None = None

    @property
    def is_full(self) -> bool:
        """Whether no more is taken."""
        return self.tokens == self.max_tokens

    def append(self, ids: np.ndarray, text_bytes: int, unit: int):
        """Add ids (n,) uint16 after what was added before; a shard ends wherever it is full.

        Args:
            text_bytes: UTF-8 bytes that the ids stand for; counted in proportion where not all are taken.
            unit: Number of the unit that they come from.
        """
        all_ids, ids = len(ids), ids if self.max_tokens is None else ids[: self.max_tokens - self.tokens]
        self.text_bytes += text_bytes * len(ids) // max(1, all_ids)
        while len(ids):
            if self._file is None:
                self._begin(unit)
            entry = self.entries[-1]
            taken = ids if self.shard_tokens is None else ids[: self.shard_tokens - entry["tokens"]]
            documents = int(np.count_nonzero(taken == self.end_of_text))
            data = np.ascontiguousarray(taken, dtype="<u2").data
            self._file.write(data)
            self._hash.update(data)
            entry["tokens"] += len(taken)
            entry["documents"] += documents
            entry["units"][1] = unit
            self.tokens += len(taken)
            self.documents += documents
            ids = ids[len(taken) :]
            if entry["tokens"] == self.shard_tokens:
                self._end()

    def finish(self) -> dict:
        """Write what is left and return the split's part of the manifest."""
        if self._file is not None:
            self._end()
        totals = {"tokens": self.tokens, "documents": self.documents, "text_bytes": self.text_bytes}
        return {**totals, "shards": self.entries}

    def abandon(self):
        """Remove the shard that is not whole, if there is one."""
        if self._file is not None:
            abort(self._file)

    def _begin(self, unit: int):
        name = shard_name(self.layout, self.split, len(self.entries))
        self._file, self._hash = open_temporary(self.folder / name), hashlib.sha256()
        self.entries.append({"file": name, "tokens": 0, "documents": 0, "units": [unit, unit]})
        _write_header(self._file, 0)

    def _end(self):
        entry = self.entries[-1]
        entry["sha256"] = self._hash.hexdigest()
        self._file.seek(0)
        _write_header(self._file, entry["tokens"])  # as long as the first: numpy leaves room for the count to grow
        commit(self._file, self.folder / entry["file"])
        self._file = None


def _write_header(file: BinaryIO, tokens: int):
    np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
