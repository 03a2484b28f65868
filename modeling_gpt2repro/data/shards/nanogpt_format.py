"""File names of shards, ours and the lecture's, and the shards of build-nanogpt and llm.c, which have no manifest."""

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
SHARD_NAME = re.compile(r"(?:(?:train|validation)|edufineweb_(?:train|val))_\d{6,12}\.npy", re.ASCII)
# What build-nanogpt's fineweb.py writes, and llm.c's scripts: fineweb_train_000001.bin, tiny_shakespeare_val.bin.
NANOGPT_NAME = re.compile(
    r"(edufineweb)_(train|val)_\d{6,12}(\.npy)|([\w-]{1,100})_(train|val)(?:_\d{6,12})?(\.bin)", re.ASCII
)
LLMC_HEADER_BYTES = 1024  # 256 integers of 32 bits, of which three are used; llm.c, dev/data/data_common.py
LLMC_MAGIC = 20240520
LLMC_GPT2 = 1  # version: GPT-2's ids, of 16 bits; 7 are Llama 3's

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


def find_nanogpt_shards(folder: Path) -> dict[str, list[Path]]:
    """List the shards of build-nanogpt or llm.c in a folder, by split, in their order; {} if there are none.

    Raises:
        ValueError: If they are of more than one dataset, or a split is missing.
    """
    kinds, found = set(), {}
    for path in sorted(folder.iterdir()):
        if match := NANOGPT_NAME.fullmatch(path.name):
            name, split, suffix = filter(None, match.groups())
            kinds.add((name, suffix))
            found.setdefault(split, []).append(path)
    if len(kinds) > 1:
        names = ", ".join(f"{name}_*{suffix}" for name, suffix in sorted(kinds))
        raise ValueError(f"{folder} holds shards of several datasets ({names}): put each into a folder of its own.")
    for name, suffix in kinds:
        for word in KARPATHY_SPLITS.values():
            if word not in found:
                raise ValueError(f"{folder} has no {name}_{word}_*{suffix}: copy all of the shards.")
    return {split: found[word] for split, word in KARPATHY_SPLITS.items()} if found else {}


def nanogpt_manifest(shards: dict[str, list[Path]]) -> dict:
    """Build the manifest that these shards would have; their hashes are of their names, lengths and both ends.

    Raises:
        ValueError: If a shard is truncated, or the ids cannot be GPT-2's.
    """
    splits = {}
    for split, paths in shards.items():
        entries = [_manifest_entry(path) for path in paths]
        splits[split] = {"tokens": sum(entry["tokens"] for entry in entries), "shards": entries}
    name, _, suffix = filter(None, NANOGPT_NAME.fullmatch(paths[0].name).groups())
    return {
        "format": 1,
        "source": {"files": f"{name}_*{suffix}, without a manifest"},
        "tokenizer": {"name": "gpt2", "vocab_size": END_OF_TEXT_ID + 1, "sha256": GPT2_SHA256},
        "end_of_text_id": END_OF_TEXT_ID,
        "layout": "karpathy",
        "splits": splits,
    }


def open_ids(path: Path) -> np.memmap:
    """Memory-map the ids of a shard, .npy or llm.c's .bin; its `offset` is where they begin in the file.

    Raises:
        FileNotFoundError: If it is missing.
        ValueError: If it is not such a file, or not of the length that its header says.
    """
    return open_llmc(path) if path.suffix == ".bin" else open_npy(path)


def open_llmc(path: Path) -> np.memmap:
    """Memory-map a shard of llm.c; errors as `open_ids`."""
    if path.exists() and not path.is_file():
        raise ValueError("it is not a file")
    header = np.fromfile(path, dtype="<i4", count=3)
    require(len(header) == 3 and header[0] == LLMC_MAGIC, "it has no header of llm.c")
    require(header[1] == LLMC_GPT2, f"it is of version {header[1]}, and version {LLMC_GPT2} has GPT-2's ids")
    size = path.stat().st_size
    require(size == LLMC_HEADER_BYTES + 2 * int(header[2]), f"its {size:,} bytes are not {header[2]:,} ids")
    if not header[2]:
        raise ValueError("it is empty")  # which cannot be mapped
    return np.memmap(path, dtype="<u2", mode="r", offset=LLMC_HEADER_BYTES)


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
        array = np.lib.format.open_memmap(path, mode="r")
        more = path.stat().st_size - array.offset - array.nbytes
        require(not more, f"it has {more:,} bytes after its last id")
        return array
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
        ids = open_ids(path)
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
