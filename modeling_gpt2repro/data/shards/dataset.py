"""Open prepared token shards: 16-bit ids in .npy files, and a manifest with their source, tokenizer and checksums."""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from modeling_gpt2repro.data.contamination import check_contamination
from modeling_gpt2repro.data.tokenizer import load_tokenizer, load_tokenizer_folder, tokenizer_sha256
from modeling_gpt2repro.storage.checksums import is_sha256
from modeling_gpt2repro.storage.hub_files import is_on_hub
from modeling_gpt2repro.storage.json_files import is_count, is_size, is_text, read_json_object, require, shown

from .nanogpt_format import SHARD_NAME, find_nanogpt_shards, nanogpt_manifest, open_ids
from .shard_file import ShardFile, allow_open_files

if TYPE_CHECKING:  # importing transformers takes a second, and --help does without
    from transformers import PreTrainedTokenizerFast

MANIFEST = "manifest.json"
SPEC_FILE = "plan.json"  # there while a preparation is unfinished, see prepare/spec.py
FORMAT = 1
MAX_MANIFEST_BYTES = 2**26  # of FineWeb's 15 T tokens in shards of 100 M, it has about 40 MB
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenDataset:
    """An opened folder of shards: the manifest, the tokenizer that made the ids, and each split's memory-mapped ids."""

    folder: Path
    manifest: dict
    tokenizer: PreTrainedTokenizerFast

    def shards(self, split: str) -> list[np.ndarray]:
        """Memory maps (n,) uint16 of the split's shards, in order; the disk is read only where they are indexed."""
        return [open_shard(self.folder / file, tokens) for file, tokens, _ in _shard_entries(self.manifest, split)]

    def shard_files(self, split: str) -> list[ShardFile]:
        """The same for training, which must outlive files that vanish: see `ShardFile`."""
        entries = _shard_entries(self.manifest, split)
        offsets = [open_shard(self.folder / file, tokens).offset for file, tokens, _ in entries]
        allow_open_files(len(entries))
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

    A folder of shards of build-nanogpt or llm.c, which have no manifest, is taken to hold GPT-2's ids. Of an address on
    the Hub, such as hf://owner/name, what is missing in the cache is downloaded first, and checked.

    Raises:
        ValueError: If it is not such a folder, a shard is missing or truncated, or the tokenizer is another one.
    """
    if is_on_hub(str(folder)):
        from .hub_shards import download_shards  # which imports this

        folder = download_shards(str(folder))
    folder = Path(folder)
    if not folder.is_dir():
        command = f"prepare_data.py --output_dir {shlex.quote(str(folder))}"
        raise ValueError(f"there is no folder {folder}: prepare it with {command}.")
    is_ours = any((folder / name).exists() for name in (MANIFEST, SPEC_FILE, "tokenizer"))
    if not is_ours and (shards := find_nanogpt_shards(folder)):
        return TokenDataset(folder, nanogpt_manifest(shards), load_tokenizer("gpt2"))
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
                open_shard(folder / file, tokens)
            except ValueError as error:
                problems[file] = str(error)
    return problems


def open_tokenizer(folder: Path, manifest: dict) -> PreTrainedTokenizerFast:
    """Load the tokenizer beside the shards.

    Raises:
        ValueError: If it does not load, or is not the manifest's.
    """
    tokenizer = load_tokenizer_folder(folder / "tokenizer")
    # The hash covers the other two, but a stranger's manifest may name a larger vocabulary than there is.
    found = tokenizer_sha256(tokenizer), len(tokenizer), tokenizer.eos_token_id
    if found != (manifest["tokenizer"]["sha256"], manifest["tokenizer"]["vocab_size"], manifest["end_of_text_id"]):
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
        manifest = read_json_object(path, max_bytes=MAX_MANIFEST_BYTES)
        _check_manifest(manifest)
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MANIFEST}: its preparation was not finished; run prepare_data.py again."
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): prepare the data again.") from error
    return manifest


def _check_manifest(manifest: dict):
    """Raise ValueError with the first entry that is not what readers rely on; optional ones may be missing."""
    version = manifest.get("format")
    require(version == FORMAT, f"it is of format {shown(version)}, and this version reads {FORMAT}")
    for name in ("source", "tokenizer", "splits"):
        require(type(manifest.get(name)) is dict, f"{name} is {shown(manifest.get(name))}")
    tokenizer = manifest["tokenizer"]
    require(is_sha256(tokenizer.get("sha256")), "it has no SHA-256 of the tokenizer")
    require(is_text(tokenizer.get("name")), f"the tokenizer's name is {shown(tokenizer.get('name'))}")
    length = manifest["source"].get("document_length", 1)
    require(is_count(length, minimum=1), f"document_length is {shown(length)}")
    size, end_of_text = tokenizer.get("vocab_size"), manifest.get("end_of_text_id")
    require(is_count(size, minimum=1), f"vocab_size is {shown(size)}")
    require(is_count(end_of_text) and end_of_text < size, f"end_of_text_id is {shown(end_of_text)}")
    if "contamination" in manifest:
        check_contamination(manifest["contamination"])
    files = set()
    for split in SPLITS:
        totals = manifest["splits"].get(split)
        require(type(totals) is dict and type(totals.get("shards")) is list, f"it has no shards of {split}")
        require(is_count(totals.get("documents", 0)), f"documents of {split} is {shown(totals.get('documents'))}")
        require(is_size(totals.get("text_bytes", 0)), f"text_bytes of {split} is {shown(totals.get('text_bytes'))}")
        for entry in totals["shards"]:
            require(type(entry) is dict, f"a shard of {split} is {shown(entry)}")
            file = entry.get("file")
            # A name, never a path: nothing outside of the folder is read.
            is_name = type(file) is str and SHARD_NAME.fullmatch(file) is not None
            require(is_name and file not in files, f"{shown(file)} is not the name of one more shard")
            files.add(file)
            for name, value in (("tokens", entry.get("tokens")), ("documents", entry.get("documents", 0))):
                require(is_count(value), f"{name} of {file} is {shown(value)}")
            require(is_sha256(entry.get("sha256")), f"it has no SHA-256 of {file}")
        tokens = sum(entry["tokens"] for entry in totals["shards"])
        require(totals.get("tokens") == tokens, f"the shards of {split} do not add up")
        if "units" in manifest:
            require("documents" in totals, f"it has no documents of {split}")


def _shard_entries(manifest: dict, split: str) -> list[tuple[str, int, str]]:
    """File name, tokens and hash of each shard."""
    return [(entry["file"], entry["tokens"], entry["sha256"]) for entry in manifest["splits"][split]["shards"]]


def open_shard(path: Path, tokens: int) -> np.memmap:
    """Memory-map the ids (tokens,) of a shard; raises ValueError if it is missing, truncated or foreign."""
    try:
        ids = open_ids(path)
    except FileNotFoundError:
        raise ValueError(f"shard {path} is missing: prepare the data again, or copy all of it.") from None
    except ValueError as error:
        raise ValueError(f"shard {path} is truncated or damaged ({error}): prepare the data again.") from error
    if ids.dtype != np.uint16 or ids.shape != (tokens,):
        raise ValueError(f"shard {path} holds {ids.size} ids of {ids.dtype}, not {tokens} of uint16.")
    return ids
