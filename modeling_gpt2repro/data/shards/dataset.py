"""Open prepared token shards: 16-bit ids in .npy files, and a manifest with their source, tokenizer and checksums."""

import hashlib
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.data.tokenizer import load_tokenizer, load_tokenizer_folder, tokenizer_sha256

from .nanogpt_format import find_nanogpt_shards, nanogpt_manifest
from .shard_file import ShardFile

MANIFEST = "manifest.json"
SPEC_FILE = "plan.json"  # there while a preparation is unfinished, see prepare/spec.py
FORMAT = 1
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenDataset:
    """An opened folder of shards: the manifest, the tokenizer that made the ids, and each split's memory-mapped ids."""

    folder: Path
    manifest: dict
    tokenizer: PreTrainedTokenizerFast

    def shards(self, split: str) -> list[np.ndarray]:
        """Memory maps (n,) uint16 of the split's shards, in order; the disk is read only where they are indexed."""
        return [_open_shard(self.folder / file, tokens) for file, tokens, _ in _shard_entries(self.manifest, split)]

    def shard_files(self, split: str) -> list[ShardFile]:
        """The same for training, which must outlive files that vanish: see `ShardFile`."""
        entries = _shard_entries(self.manifest, split)
        offsets = [_open_shard(self.folder / file, tokens).offset for file, tokens, _ in entries]
        return [
            ShardFile(self.folder / file, at, tokens) for (file, tokens, _), at in zip(entries, offsets, strict=True)
        ]

    @property
    def fingerprint(self) -> str:
        """One hash of the shards' and the tokenizer's hashes: if equal, the same ids in the same order."""
        parts = [self.manifest["tokenizer"]["sha256"]]
        parts += [sha256 for split in SPLITS for _, _, sha256 in _shard_entries(self.manifest, split)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def bytes_per_token(self, split: str) -> float | None:
        """Mean UTF-8 bytes of text per token of the split; None if the manifest does not have them."""
        totals = self.manifest["splits"][split]
        return totals["text_bytes"] / totals["tokens"] if totals.get("text_bytes") and totals["tokens"] else None


def open_shards(folder: str | Path) -> TokenDataset:
    """Open a folder that `prepare_data.py` wrote; sizes are checked, contents are not read.

    A folder of the lecture's own shards, which have no manifest, is taken to hold GPT-2's ids.

    Raises:
        ValueError: If it is not such a folder, a shard is missing or truncated, or the tokenizer is another one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        command = f"prepare_data.py --output_dir {shlex.quote(str(folder))}"
        raise ValueError(f"there is no folder {folder}: prepare it with {command}.")
    is_ours = any((folder / name).exists() for name in (MANIFEST, SPEC_FILE, "tokenizer"))
    if not is_ours and find_nanogpt_shards(folder, "train"):
        return TokenDataset(folder, nanogpt_manifest(folder), load_tokenizer("gpt2"))
    manifest = read_manifest(folder)
    if problems := shard_problems(folder, manifest):
        raise ValueError(next(iter(problems.values())))
    return TokenDataset(folder, manifest, open_tokenizer(folder, manifest))


def shard_problems(folder: Path, manifest: dict) -> dict[str, str]:
    """Map the file name of each missing, truncated or foreign shard to what is wrong; contents are not read."""
    problems = {}
    for split in SPLITS:
        for file, tokens, _ in _shard_entries(manifest, split):
            try:
                _open_shard(folder / file, tokens)
            except ValueError as error:
                problems[file] = str(error)
    return problems


def open_tokenizer(folder: Path, manifest: dict) -> PreTrainedTokenizerFast:
    """Load the tokenizer beside the shards.

    Raises:
        ValueError: If it does not load, or is not the manifest's.
    """
    tokenizer = load_tokenizer_folder(folder / "tokenizer")
    if tokenizer_sha256(tokenizer) != manifest["tokenizer"]["sha256"]:
        raise ValueError(
            f"{folder / 'tokenizer'} is not the tokenizer that these shards were made with: prepare the data again."
        )
    return tokenizer


def read_manifest(folder: Path) -> dict:
    """Read the manifest.

    Raises:
        ValueError: If it is missing, damaged or of another version, or its totals are wrong.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"it is of format {manifest['format']}, and this version reads {FORMAT}")
        if len(manifest["tokenizer"]["sha256"]) != 64:
            raise ValueError("it has no hash of the tokenizer")
        for split in SPLITS:
            if sum(tokens for _, tokens, _ in _shard_entries(manifest, split)) != manifest["splits"][split]["tokens"]:
                raise ValueError(f"the shards of {split} do not add up")
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MANIFEST}: its preparation was not finished; run prepare_data.py again."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): prepare the data again.") from error
    return manifest


def _shard_entries(manifest: dict, split: str) -> list[tuple[str, int, str]]:
    """File name, tokens and hash of each shard."""
    return [(entry["file"], entry["tokens"], entry["sha256"]) for entry in manifest["splits"][split]["shards"]]


def _open_shard(path: Path, tokens: int) -> np.memmap:
    try:
        ids = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise ValueError(f"shard {path} is missing: prepare the data again, or copy all of it.") from None
    except ValueError as error:
        raise ValueError(f"shard {path} is truncated or damaged ({error}): prepare the data again.") from error
    if ids.dtype != np.uint16 or ids.shape != (tokens,):
        raise ValueError(f"shard {path} holds {ids.size} ids of {ids.dtype}, not {tokens} of uint16.")
    return ids
