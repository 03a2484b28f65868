"""Cache of tokenized partitions, one .npz file each: written by the workers, read when the shards are assembled.

Files are written atomically, so an interrupted preparation resumes with the partitions that have no file yet.
"""

import json
import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from modeling_gpt2repro.data.shards.nanogpt_format import check_npy_header
from modeling_gpt2repro.data.tokenize import TokenizedPartition
from modeling_gpt2repro.storage.atomic import atomic_write, fsync_dir, remove_abandoned
from modeling_gpt2repro.storage.json_files import is_count, parse_json, require, shown

CACHE_DIR = "units"  # the name on disk since the first release; it must stay, so that older preparations resume
UNVERIFIED_SUFFIX = ".unverified"
ERROR_SUFFIX = ".problem"
FILE_NAME = re.compile(r"([0-9]{1,18})-([0-9]{1,18})")  # before the suffix
# Of a damaged archive: also encrypted (RuntimeError) or compressed in an unknown way, by a flipped bit.
ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


def write_partition(folder: Path, number: int, partition: TokenizedPartition):
    """Write `units/NUMBER-TRAINTOKENS.npz`: with the count in the name, listing the folder is enough for progress."""
    (folder / CACHE_DIR).mkdir(exist_ok=True)
    about = json.dumps({name: value for name, value in vars(partition).items() if name != "ids"})
    with atomic_write(folder / CACHE_DIR / f"{number:07d}-{len(partition.ids['train'])}.npz") as file:
        np.savez(file, about=np.array(about), **partition.ids)


def read_partition_file(path: Path) -> TokenizedPartition:
    """Read what `write_partition` wrote.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        require(path.is_file(), "it is not a file")
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as member:
                    check_npy_header(member)
        with np.load(path) as arrays:  # without pickle, which is numpy's default
            about = parse_json(str(arrays["about"]))
            require(type(about) is dict and type(about.get("text_bytes")) is dict, "it has no text_bytes")
            partition = TokenizedPartition({split: arrays[split] for split in about["text_bytes"]}, **about)
        _check_partition(partition, path.name)
    except (*ZIP_ERRORS, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run the same command again.") from error
    return partition


def _check_partition(partition: TokenizedPartition, name: str):
    require(set(partition.ids) == {"train", "validation"}, f"it has the splits {shown(sorted(partition.ids))}")
    for ids in partition.ids.values():
        require(ids.dtype == np.uint16 and ids.ndim == 1, f"it holds an array {ids.shape} of {ids.dtype}")
    tokens = FILE_NAME.match(name)
    require(tokens is None or int(tokens[2]) == len(partition.ids["train"]), "it has other tokens than its name says")
    for counts in (partition.text_bytes, partition.skipped, partition.bad_lines):
        require(type(counts) is dict and all(map(is_count, counts.values())), f"it counts {shown(counts)}")
    for numbers in (partition.compared, *partition.contaminated):
        require(all(map(is_count, numbers)), f"it compared {shown(numbers)}")
    first = partition.first_bad_line
    require(first is None or (type(first) is list and len(first) == 2), f"first_bad_line is {shown(first)}")
    require(type(partition.source_sha256) is str, f"source_sha256 is {shown(partition.source_sha256)}")


def finished_partitions(folder: Path, numbers: list[int] | None = None) -> dict[int, tuple[int, Path]]:
    """Map the cache number of each finished partition to its training tokens and its file.

    Args:
        numbers: `PrepareSpec.numbers`; if given, the keys are the indices of partitions in the spec instead.
    """
    finished = _partition_files(folder, ".npz")
    if numbers is None:
        return finished
    return {index: finished[number] for index, number in enumerate(numbers) if number in finished}


def unverified_partitions(folder: Path) -> dict[int, tuple[int, Path]]:
    """Like `finished_partitions`, for those that count as finished only if their text is still the same."""
    return _partition_files(folder, f".npz{UNVERIFIED_SUFFIX}")


def cached_partitions(folder: Path) -> dict[int, tuple[int, Path]]:
    """Finished and unverified partitions: what a resumed preparation may keep."""
    return {**finished_partitions(folder), **unverified_partitions(folder)}


def mark_unverified(folder: Path, numbers: Iterable[int]):
    """Rename finished partitions so that the workers compare them with their text before they are used."""
    finished = finished_partitions(folder)
    for _, path in [finished[number] for number in numbers if number in finished]:
        os.replace(path, path.with_name(path.name + UNVERIFIED_SUFFIX))
    fsync_dir(folder / CACHE_DIR)


def mark_verified(path: Path):
    """Undo `mark_unverified`."""
    os.replace(path, path.with_name(path.name.removesuffix(UNVERIFIED_SUFFIX)))


def _partition_files(folder: Path, suffix: str) -> dict[int, tuple[int, Path]]:
    found = {}
    if (folder / CACHE_DIR).is_dir():
        for entry in os.scandir(folder / CACHE_DIR):
            # A file of another name is not ours, such as a copy that somebody made.
            if (name := FILE_NAME.match(entry.name)) and entry.name[name.end() :] == suffix:
                found[int(name[1])] = (int(name[2]), Path(entry.path))
    return found


def write_error(folder: Path, number: int, message: str):
    """Record a worker's error beside its partition: Ray and Slurm do not pass exceptions on."""
    with suppress(OSError):  # a full disk
        (folder / CACHE_DIR).mkdir(exist_ok=True)
        (folder / CACHE_DIR / f"{number:07d}{ERROR_SUFFIX}").write_text(message, encoding="utf-8")


def read_errors(folder: Path) -> list[str]:
    """Return the messages that `write_error` recorded."""
    return [
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted((folder / CACHE_DIR).glob(f"*{ERROR_SUFFIX}"))
    ]


def clear_unfinished_partitions(folder: Path, numbers: list[int]):
    """Delete temporary files of killed workers, recorded errors, and partitions with other numbers."""
    cached = cached_partitions(folder)
    for _, path in [cached[number] for number in cached.keys() - set(numbers)]:
        path.unlink()
    remove_abandoned(folder / CACHE_DIR)
    for path in (folder / CACHE_DIR).glob(f"*{ERROR_SUFFIX}"):
        path.unlink(missing_ok=True)


def required_partitions(
    finished: dict[int, tuple[int, Path]], num_partitions: int, max_tokens: int | None
) -> list[int] | None:
    """Indices of the partitions that the shards are made of, from 0 on; None while one of them is missing.

    With 900, 800 and 700 training tokens in the first three of ten partitions, max_tokens 1,500 needs [0, 1].
    """
    tokens = 0
    required = []
    for index in range(num_partitions):
        if max_tokens is not None and tokens >= max_tokens:
            break
        if index not in finished:
            return None
        tokens += finished[index][0]
        required.append(index)
    return required
