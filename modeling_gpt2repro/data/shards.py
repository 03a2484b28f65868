"""Token shards: 16-bit ids in .npy files, beside a manifest that says what they are and proves that they are whole."""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .tokenizer import tokenizer_sha256

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation")


class ShardWriter:
    """Write the shards of one split: each under a temporary name, flushed to disk, then renamed."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder, self.split = folder, split
        self.tokens = self.documents = self.text_bytes = 0
        self.entries: list[dict] = []
        self._buffer = np.empty(shard_tokens, dtype=np.uint16)
        self._filled = 0

    def append(self, ids: np.ndarray):
        """Add ids (n,) uint16 after what was added before; a shard ends wherever it is full."""
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
        digest = hashlib.sha256(ids.tobytes()).hexdigest()
        self.entries.append({"file": path.name, "tokens": len(ids), "sha256": digest})
        self._filled = 0


def write_manifest(folder: Path, manifest: dict):
    """Write the manifest last, whole or not at all: a folder without one is not a prepared folder."""
    temporary = folder / (MANIFEST + ".partial")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"format": FORMAT, **manifest}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / MANIFEST)


def clear_unfinished(folder: Path, dry_run: bool = False):
    """Make `folder` ready to be written; only remains of an unfinished preparation are removed.

    Args:
        dry_run: Only look whether it can be done.

    Raises:
        ValueError: If it holds finished shards or anything that is not ours.
    """
    if not folder.exists():
        if not dry_run:
            folder.mkdir(parents=True)
        return
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder as --output_dir.")
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds prepared shards already: use them, or give another --output_dir.")
    ours = [p for p in folder.iterdir() if p.name.startswith(SPLITS) and p.suffix in (".npy", ".partial")]
    ours += [p for p in (folder / "tokenizer", folder / (MANIFEST + ".partial")) if p.exists()]
    foreign = sorted({p.name for p in folder.iterdir()} - {p.name for p in ours})
    if foreign:
        raise ValueError(f"{folder} holds other files ({', '.join(foreign[:3])}): give an empty --output_dir.")
    for path in ours if not dry_run else []:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass(frozen=True)
class PreparedShards:
    """An opened folder of shards: the manifest, the tokenizer that made the ids, and each split's memory-mapped ids."""

    folder: Path
    manifest: dict
    tokenizer: PreTrainedTokenizerFast

    def shards(self, split: str) -> list[np.ndarray]:
        """Memory maps of the split's shards, uint16, in order; nothing is read until it is used."""
        return [_open_shard(self.folder / e["file"], e["tokens"]) for e in self.manifest["splits"][split]["shards"]]

    @property
    def fingerprint(self) -> str:
        """One hash of all shards' hashes and the tokenizer's: equal ones mean the same ids in the same order."""
        parts = [self.manifest["tokenizer"]["sha256"]]
        parts += [e["sha256"] for split in SPLITS for e in self.manifest["splits"][split]["shards"]]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def bytes_per_token(self, split: str) -> float | None:
        """UTF-8 bytes of text a token of the split stands for; None where the manifest does not tell."""
        totals = self.manifest["splits"][split]
        return totals["text_bytes"] / totals["tokens"] if totals.get("text_bytes") and totals["tokens"] else None


def open_shards(folder: str | Path) -> PreparedShards:
    """Open a folder that `prepare_data.py` wrote; sizes are checked, contents are not read.

    Raises:
        ValueError: If it is no such folder, a shard is missing or truncated, or its tokenizer is not the manifest's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: prepare it with prepare_data.py --output_dir {folder}.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MANIFEST}: its preparation was not finished; run prepare_data.py again."
        ) from None
    except ValueError as error:
        raise ValueError(f"{folder / MANIFEST} is damaged ({error}): prepare the data again.") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST} is of format {manifest.get('format')}; this version reads {FORMAT}.")
    for split in SPLITS:
        for entry in manifest["splits"][split]["shards"]:
            _open_shard(folder / entry["file"], entry["tokens"])
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'tokenizer'} does not load ({error}): prepare the data again.") from error
    if tokenizer_sha256(tokenizer) != manifest["tokenizer"]["sha256"]:
        raise ValueError(f"{folder / 'tokenizer'} is not the tokenizer that these shards were made with.")
    return PreparedShards(folder, manifest, tokenizer)


def _open_shard(path: Path, tokens: int) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r")
    except FileNotFoundError:
        raise ValueError(f"shard {path} is missing: prepare the data again, or copy it whole.") from None
    except ValueError as error:
        raise ValueError(f"shard {path} is truncated or damaged ({error}): prepare the data again.") from error
    if ids.dtype != np.uint16 or ids.shape != (tokens,):
        raise ValueError(f"shard {path} holds {ids.size} ids of {ids.dtype}, not {tokens} of uint16.")
    return ids
