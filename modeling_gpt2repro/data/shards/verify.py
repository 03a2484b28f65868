"""Proof that a folder of shards is what its manifest says."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .dataset import MANIFEST, SPLITS, open_tokenizer, read_manifest, shard_problems
from .layouts import SHARD_NAME

CHUNK_TOKENS = 2**22  # held in memory at a time


def verify_shards(folder: Path, quick: bool = False) -> list[str]:
    """Everything that is wrong with a folder that `prepare_data.py` wrote, a sentence each.

    Args:
        quick: Sizes and names, the tokenizer and the sums, but not the contents of the shards.

    Raises:
        ValueError: If it is not such a folder, or the manifest is damaged: then nothing else can be told.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} to verify.")
    manifest = read_manifest(folder)
    by_shard = shard_problems(folder, manifest)
    problems = [*by_shard.values(), *_problems_of_the_rest(folder, manifest)]
    if not quick:
        entries = [entry for split in SPLITS for entry in manifest["splits"][split]["shards"]]
        problems += _problems_of_contents(folder, manifest, [e for e in entries if e["file"] not in by_shard])
    return problems


def _problems_of_the_rest(folder: Path, manifest: dict) -> Iterator[str]:
    try:
        open_tokenizer(folder, manifest)
    except ValueError as error:
        yield str(error)
    named = set()
    for split in SPLITS:
        totals = manifest["splits"][split]
        named |= {entry["file"] for entry in totals["shards"]}
        documents = sum(entry.get("documents", 0) for entry in totals["shards"])
        if "units" in manifest and documents != totals["documents"]:
            yield (
                f"{folder / MANIFEST} is damaged: the shards of {split} hold {documents} documents, not "
                f"{totals['documents']}."
            )
    for path in sorted(folder.glob("*.npy")):
        if SHARD_NAME.fullmatch(path.name) and path.name not in named:
            yield f"shard {path} is not in the manifest: delete it."


def _problems_of_contents(folder: Path, manifest: dict, entries: list[dict]) -> Iterator[str]:
    end_of_text, vocab_size = manifest["end_of_text_id"], manifest["tokenizer"]["vocab_size"]
    for entry in entries:
        path = folder / entry["file"]
        digest, documents, largest = hashlib.sha256(), 0, 0
        for ids in _chunks(path):
            digest.update(ids)
            documents += int(np.count_nonzero(ids == end_of_text))
            largest = max(largest, int(ids.max()))
        if digest.hexdigest() != entry["sha256"]:
            yield f"shard {path} has other contents than when it was written (sha256 differs): prepare the data again."
        elif entry.get("documents", documents) != documents:
            yield f"shard {path} holds {documents} documents, not {entry['documents']}: prepare the data again."
        elif largest >= vocab_size:
            yield f"shard {path} has the id {largest}, which the tokenizer has not: prepare the data again."


def _chunks(path: Path) -> Iterator[np.ndarray]:
    """The shard's ids, read in pieces: a memory map would count as this process's memory."""
    with open(path, "rb") as file:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
        while data := file.read(2 * CHUNK_TOKENS):
            yield np.frombuffer(data, dtype="<u2")
