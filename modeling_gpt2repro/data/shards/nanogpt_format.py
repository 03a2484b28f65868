"""File names of shards, ours and the lecture's, and the lecture's own shards, which have no manifest."""

import hashlib
import re
from pathlib import Path
from typing import BinaryIO

import numpy as np

from modeling_gpt2repro.data.tokenizer import GPT2_SHA256
from modeling_gpt2repro.storage.json_files import require

# plain: train_000000.npy. karpathy: what build-nanogpt's fineweb.py writes and its train_gpt2.py finds by name.
LAYOUTS = ("plain", "karpathy")
KARPATHY_SPLITS = {"train": "train", "validation": "val"}
SHARD_NAME = re.compile(r"(?:(?:train|validation)|edufineweb_(?:train|val))_\d{6,}\.npy")

END_OF_TEXT_ID = 50256  # GPT-2's, and the largest of its ids
# As numpy writes it: the type, the order of two dimensions, and the shape.
NPY_HEADER = re.compile(rb"\{'descr': '[\w<>|=]+', 'fortran_order': \w+, 'shape': \((\d{1,15}, ?)*\d{0,15}\), \}\s*")
# Read from both ends of a shard to tell it from others: reading all of it would take minutes.
SAMPLE_TOKENS = 2**18


def shard_name(layout: str, split: str, index: int) -> str:
    """File name of the `index`-th shard of a split, from 0 on.

    karpathy: edufineweb_val_000000.npy, then edufineweb_train_000001.npy and on: both splits share one numbering.
    """
    if layout == "karpathy":
        return f"edufineweb_{KARPATHY_SPLITS[split]}_{index + (split == 'train'):06d}.npy"
    return f"{split}_{index:06d}.npy"


def shard_length(layout: str, split: str, shard_tokens: int) -> int | None:
    """Tokens after which a shard ends; None if the split is a single shard, as the lecture's validation is."""
    return None if layout == "karpathy" and split == "validation" else shard_tokens


def find_nanogpt_shards(folder: Path, split: str) -> list[Path]:
    """List edufineweb_val_000000.npy and the like in their order."""
    return sorted(folder.glob(f"edufineweb_{KARPATHY_SPLITS[split]}_*.npy"))


def nanogpt_manifest(folder: Path) -> dict:
    """Build the manifest that these shards would have; their hashes are of their names, lengths and both ends.

    Raises:
        ValueError: If a split is missing, a shard is truncated, or the ids cannot be GPT-2's.
    """
    splits = {}
    for split, word in KARPATHY_SPLITS.items():
        entries = [_manifest_entry(path) for path in find_nanogpt_shards(folder, split)]
        if not entries:
            raise ValueError(f"{folder} has no edufineweb_{word}_*.npy: copy all of the shards.")
        splits[split] = {"tokens": sum(entry["tokens"] for entry in entries), "shards": entries}
    return {
        "format": 1,
        "source": {"files": "edufineweb_*.npy, without a manifest"},
        "tokenizer": {"name": "gpt2", "vocab_size": END_OF_TEXT_ID + 1, "sha256": GPT2_SHA256},
        "end_of_text_id": END_OF_TEXT_ID,
        "layout": "karpathy",
        "splits": splits,
    }


def open_npy(path: Path) -> np.ndarray:
    """Memory-map an array; arrays of Python objects, which only pickle can read, are refused.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is not such a file, or shorter than its header says.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer forever
        raise ValueError("it is not a file")
    try:
        with open(path, "rb") as file:
            check_npy_header(file)
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError:
        raise
    except (OSError, OverflowError) as error:  # the second of a shape whose sizes multiply to more than 64 bits
        raise ValueError(getattr(error, "strerror", None) or str(error)) from error


def check_npy_header(file: BinaryIO):
    """Raise ValueError unless the file begins as numpy writes an array.

    numpy parses the header as a Python expression, with every error that one can have.
    """
    version, _ = np.lib.format.read_magic(file)
    length = int.from_bytes(file.read(2 if version == 1 else 4), "little")
    header = file.read(min(length, 2**16))
    require(len(header) == length and NPY_HEADER.fullmatch(header) is not None, "it has no header of an array")


def _manifest_entry(path: Path) -> dict:
    try:
        ids = open_npy(path)
    except ValueError as error:
        raise ValueError(f"shard {path} is truncated or damaged ({error}): copy it again.") from error
    if ids.dtype != np.uint16 or ids.ndim != 1 or not len(ids):
        raise ValueError(f"shard {path} holds an array {ids.shape} of {ids.dtype}, not (n,) of uint16.")
    sample = np.concatenate([ids[:SAMPLE_TOKENS], ids[-SAMPLE_TOKENS:]])
    if sample.max() > END_OF_TEXT_ID:
        raise ValueError(
            f"shard {path} has the id {sample.max()}, which GPT-2 does not have: use prepare_data.py for other "
            "tokenizers."
        )
    header = f"{path.name}:{len(ids)}:".encode()
    return {"file": path.name, "tokens": len(ids), "sha256": hashlib.sha256(header + sample.tobytes()).hexdigest()}
