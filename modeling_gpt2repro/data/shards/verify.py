"""Verify a folder of shards against its manifest."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .dataset import MANIFEST, SPLITS, open_shard, open_tokenizer, read_manifest, shard_problems
from .nanogpt_format import SHARD_NAME

CHUNK_TOKENS = 2**22  # held in memory at a time


def verify_shards(folder: Path, quick: bool = False) -> list[str]:
    """List everything that is wrong with a folder that `prepare_data.py` wrote, one sentence each.

    Args:
        quick: Check names, sizes, totals and the tokenizer, but do not read the shards.

    Raises:
        ValueError: If it is not such a folder, or the manifest is damaged: then nothing else can be checked.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder} to verify.")
    manifest = read_manifest(folder)
    unreadable = shard_problems(folder, manifest)
    problems = [*unreadable.values(), *_other_problems(folder, manifest)]
    if not quick:
        entries = [entry for split in SPLITS for entry in manifest["splits"][split]["shards"]]
        readable = [entry for entry in entries if entry["file"] not in unreadable]
        problems += content_problems(folder, manifest, readable)
    return problems


def _other_problems(folder: Path, manifest: dict) -> Iterator[str]:
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


def content_problems(folder: Path, manifest: dict, entries: list[dict]) -> Iterator[str]:
    """Read these shards and yield what is wrong with their ids."""
    vocab_size = manifest["tokenizer"]["vocab_size"]
    for entry in entries:
        path = folder / entry["file"]
        digest = hashlib.sha256()
        documents = 0
        largest_id = 0
        try:
            offset = open_shard(path, entry["tokens"]).offset
        except ValueError as error:
            yield str(error)
            continue
        for ids in _chunks(path, offset):
            digest.update(ids)
            documents += int(np.count_nonzero(ids == manifest["end_of_text_id"]))
            largest_id = max(largest_id, int(ids.max()))
        if digest.hexdigest() != entry["sha256"]:
            yield f"shard {path} has other contents than when it was written (sha256 differs): prepare the data again."
        elif entry.get("documents", documents) != documents:
            yield f"shard {path} holds {documents} documents, not {entry['documents']}: prepare the data again."
        elif largest_id >= vocab_size:
            yield f"shard {path} has the id {largest_id}, which the tokenizer does not have: prepare the data again."


def _chunks(path: Path, offset: int) -> Iterator[np.ndarray]:
    """Yield the shard's ids in pieces; a memory map would count as memory of this process."""
    with open(path, "rb") as file:
        file.seek(offset)
        while data := file.read(2 * CHUNK_TOKENS):
            yield np.frombuffer(data, dtype="<u2")
