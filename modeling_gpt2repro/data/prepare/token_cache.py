"""What became of a unit, as a file: handed from the worker that tokenized it to the one who writes the shards.

A file that is there is whole, so a preparation that was cut off goes on with the units that have none.
"""

import json
import os
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from modeling_gpt2repro.storage.atomic import PARTIAL, atomic_write

UNITS = "units"
PROBLEM = ".problem"


@dataclass
class TokenizedPartition:
    """What became of one unit.

    Args:
        ids: Per split, (n,) uint16.
        text_bytes: Per split, UTF-8 bytes of text.
        skipped: How many documents were left out, by reason; None where nobody counted.
    """

    ids: dict[str, np.ndarray]
    text_bytes: dict[str, int]
    skipped: dict[str, int] | None = None


def write_partition(folder: Path, number: int, unit: TokenizedPartition):
    """Write the unit's file; its name tells the training tokens, so that a listing of the folder tells them all."""
    (folder / UNITS).mkdir(exist_ok=True)
    about = json.dumps({"text_bytes": unit.text_bytes, "skipped": unit.skipped})
    with atomic_write(folder / UNITS / f"{number:07d}-{len(unit.ids['train'])}.npz") as file:
        np.savez(file, about=np.array(about), **unit.ids)


def read_partition_file(path: Path) -> TokenizedPartition:
    """Read what `write_partition` wrote.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        with np.load(path) as arrays:
            about = json.loads(str(arrays["about"]))
            ids = {split: arrays[split] for split in about["text_bytes"]}
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): delete it and run the same command again.") from error
    return TokenizedPartition(ids, **about)


def finished_partitions(folder: Path) -> dict[int, tuple[int, Path]]:
    """Number -> training tokens and file, of the units that are finished."""
    finished = {}
    if (folder / UNITS).is_dir():
        for entry in os.scandir(folder / UNITS):
            if entry.name.endswith(".npz"):
                number, tokens = entry.name.removesuffix(".npz").split("-")
                finished[int(number)] = (int(tokens), Path(entry.path))
    return finished


def write_error(folder: Path, number: int, sentence: str) -> ValueError:
    """The error to raise, noted where whoever waits for the units finds it: not every executor hands it on."""
    with suppress(OSError):  # a full disk
        (folder / UNITS).mkdir(exist_ok=True)
        (folder / UNITS / f"{number:07d}{PROBLEM}").write_text(sentence, encoding="utf-8")
    return ValueError(sentence)


def read_errors(folder: Path) -> list[str]:
    """What `write_error` noted."""
    return [path.read_text(encoding="utf-8") for path in sorted((folder / UNITS).glob(f"*{PROBLEM}"))]


def clear_unfinished_partitions(folder: Path):
    """Remove what workers left that were killed or had a problem."""
    for path in (folder / UNITS).iterdir():
        if PARTIAL.fullmatch(path.name) or path.name.endswith(PROBLEM):
            path.unlink(missing_ok=True)


def required_partitions(finished: dict[int, tuple[int, Path]], units: int, max_tokens: int | None) -> list[int] | None:
    """Numbers of the units that the shards are made of, from the first one on; None while one of them is missing."""
    tokens, needed = 0, []
    for number in range(units):
        if max_tokens is not None and tokens >= max_tokens:
            break
        if number not in finished:
            return None
        tokens += finished[number][0]
        needed.append(number)
    return needed
