"""Shards that the lecture's own script made, which have no manifest: GPT-2's tokens, by convention."""

import hashlib
from pathlib import Path

import numpy as np

from modeling_gpt2repro.data.tokenizer import GPT2_SHA256

from .layouts import KARPATHY_SPLITS

END_OF_TEXT_ID = 50256  # GPT-2's, and the last of its ids
# Read from both ends of a shard to tell it from others: all of it would take minutes.
SAMPLE_TOKENS = 2**18


def lecture_files(folder: Path, split: str) -> list[Path]:
    """edufineweb_val_000000.npy and its like, in their order."""
    return sorted(folder.glob(f"edufineweb_{KARPATHY_SPLITS[split]}_*.npy"))


def lecture_manifest(folder: Path) -> dict:
    """What a manifest of these shards would say; their hashes are those of their names, lengths and ends.

    Raises:
        ValueError: If a split is missing, a shard is truncated, or the ids cannot be GPT-2's.
    """
    splits = {}
    for split, word in KARPATHY_SPLITS.items():
        entries = [_entry(path) for path in lecture_files(folder, split)]
        if not entries:
            raise ValueError(f"{folder} has no edufineweb_{word}_*.npy: copy the shards whole.")
        splits[split] = {"tokens": sum(entry["tokens"] for entry in entries), "shards": entries}
    return {
        "format": 1,
        "source": {"files": "edufineweb_*.npy, without a manifest"},
        "tokenizer": {"name": "gpt2", "vocab_size": END_OF_TEXT_ID + 1, "sha256": GPT2_SHA256},
        "end_of_text_id": END_OF_TEXT_ID,
        "layout": "karpathy",
        "splits": splits,
    }


def _entry(path: Path) -> dict:
    try:
        ids = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise ValueError(f"shard {path} is truncated or damaged ({error}): copy it again.") from error
    if ids.dtype != np.uint16 or ids.ndim != 1 or not len(ids):
        raise ValueError(f"shard {path} holds an array {ids.shape} of {ids.dtype}, not a row of uint16.")
    sample = np.concatenate([ids[:SAMPLE_TOKENS], ids[-SAMPLE_TOKENS:]])
    if sample.max() > END_OF_TEXT_ID:
        raise ValueError(f"shard {path} has the id {sample.max()}, which GPT-2 has not: prepare_data.py makes others.")
    told = f"{path.name}:{len(ids)}:".encode()
    return {"file": path.name, "tokens": len(ids), "sha256": hashlib.sha256(told + sample.tobytes()).hexdigest()}
