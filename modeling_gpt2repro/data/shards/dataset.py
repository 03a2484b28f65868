"""Token shards: 16-bit ids in .npy files, beside a manifest that says what they are and proves that they are whole."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.data.prepare.spec import PLAN
from modeling_gpt2repro.data.tokenizer import load_tokenizer, load_tokenizer_folder, tokenizer_sha256

from .nanogpt_format import lecture_files, lecture_manifest

MANIFEST = "manifest.json"
FORMAT = 1
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TokenDataset:
    """An opened folder of shards: the manifest, the tokenizer that made the ids, and each split's memory-mapped ids."""

    folder: Path
    manifest: dict
    tokenizer: PreTrainedTokenizerFast

    def shards(self, split: str) -> list[np.ndarray]:
        """Memory maps of the split's shards, uint16, in order; nothing is read until it is used."""
        return [_open_shard(self.folder / file, tokens) for file, tokens, _ in _listed(self.manifest, split)]

    @property
    def fingerprint(self) -> str:
        """One hash of all shards' hashes and the tokenizer's: equal ones mean the same ids in the same order."""
        parts = [self.manifest["tokenizer"]["sha256"]]
        parts += [sha256 for split in SPLITS for _, _, sha256 in _listed(self.manifest, split)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def bytes_per_token(self, split: str) -> float | None:
        """UTF-8 bytes of text a token of the split stands for; None where the manifest does not tell."""
        totals = self.manifest["splits"][split]
        return totals["text_bytes"] / totals["tokens"] if totals.get("text_bytes") and totals["tokens"] else None


def open_shards(folder: str | Path) -> TokenDataset:
    """Open a folder that `prepare_data.py` wrote; sizes are checked, contents are not read.

    A folder of the lecture's shards without a manifest, made by other tools, is taken for GPT-2's tokens.

    Raises:
        ValueError: If it is no such folder, a shard is missing or truncated, or its tokenizer is not the manifest's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: prepare it with prepare_data.py --output_dir {folder}.")
    if lecture_files(folder, "train") and not any((folder / name).exists() for name in (MANIFEST, PLAN, "tokenizer")):
        return TokenDataset(folder, lecture_manifest(folder), load_tokenizer("gpt2"))
    manifest = read_manifest(folder)
    if problems := shard_problems(folder, manifest):
        raise ValueError(next(iter(problems.values())))
    return TokenDataset(folder, manifest, open_tokenizer(folder, manifest))


def shard_problems(folder: Path, manifest: dict) -> dict[str, str]:
    """File name -> what is wrong with a shard that the manifest names, as far as it is seen without reading it."""
    problems = {}
    for split in SPLITS:
        for file, tokens, _ in _listed(manifest, split):
            try:
                _open_shard(folder / file, tokens)
            except ValueError as error:
                problems[file] = str(error)
    return problems


def open_tokenizer(folder: Path, manifest: dict) -> PreTrainedTokenizerFast:
    """The tokenizer beside the shards.

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
    """The manifest.

    Raises:
        ValueError: If it is missing, damaged or of another version, or its sums are wrong.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"it is of format {manifest['format']}, and this version reads {FORMAT}")
        if len(manifest["tokenizer"]["sha256"]) != 64:
            raise ValueError("it has no hash of the tokenizer")
        for split in SPLITS:
            if sum(tokens for _, tokens, _ in _listed(manifest, split)) != manifest["splits"][split]["tokens"]:
                raise ValueError(f"the shards of {split} do not add up")
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {MANIFEST}: its preparation was not finished; run prepare_data.py again."
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): prepare the data again.") from error
    return manifest


def _listed(manifest: dict, split: str) -> list[tuple[str, int, str]]:
    """File name, tokens and hash of each shard."""
    return [(entry["file"], entry["tokens"], entry["sha256"]) for entry in manifest["splits"][split]["shards"]]


def _open_shard(path: Path, tokens: int) -> np.ndarray:
    try:
        ids = np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise ValueError(f"shard {path} is missing: prepare the data again, or copy it whole.") from None
    except ValueError as error:
        raise ValueError(f"shard {path} is truncated or damaged ({error}): prepare the data again.") from error
    if ids.dtype != np.uint16 or ids.shape != (tokens,):
        raise ValueError(f"shard {path} holds {ids.size} ids of {ids.dtype}, not {tokens} of uint16.")
    return ids
