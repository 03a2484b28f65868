"""Files on disk: which ones --train_files names, their kind by file name, and their bytes, decompressed."""

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from modeling_gpt2repro.data.shards.dataset import MANIFEST, SPEC_FILE
from modeling_gpt2repro.storage.lock import LOCK_FILE

TEXT_KINDS = (".txt", ".md", "")
TABLE_KINDS = (".json", ".csv", ".tsv", ".arrow")
FILE_KINDS = (*TEXT_KINDS, ".jsonl", ".parquet", *TABLE_KINDS)
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NOT_COMPRESSED = (".parquet", ".arrow")  # these compress what is in them

# What `Dataset.save_to_disk` writes beside its .arrow files.
DATASETS_METADATA = ("state.json", "dataset_info.json", "dataset_dict.json")
SNIFFED_BYTES = 2**13
MAX_SPEC_BYTES = 2**26  # a manifest.json of another program may be a data set
PREPARED = "written by this program"
SHOWN = 3  # of names or problems, where there are many


def file_kind(path: str) -> str:
    """The extension that names the kind of file, in lower case: "b.txt" and "A.TXT.gz" -> ".txt", "LICENSE" -> "".

    Raises:
        ValueError: If such files cannot be read.
    """
    stem, extension = os.path.splitext(os.path.basename(path).lower())
    if extension in COMPRESSIONS:
        extension = os.path.splitext(stem)[1]
        if extension not in NOT_COMPRESSED and extension in FILE_KINDS:
            return extension
    elif extension in FILE_KINDS:
        return extension
    raise ValueError(
        f"{path} is not of a kind that can be read: {', '.join(filter(None, FILE_KINDS))}, text without an extension, "
        f"and all but {' and '.join(NOT_COMPRESSED)} also as {' or '.join(COMPRESSIONS)}."
    )


def is_compressed(path: str) -> bool:
    """Whether `open_bytes` decompresses it; such a file can only be read from its beginning."""
    return os.path.splitext(path.lower())[1] in COMPRESSIONS


@contextmanager
def open_bytes(path: str) -> Iterator[BinaryIO]:
    """Open a file, decompressed as a stream if its name says that it is compressed.

    Raises:
        ValueError: While it is read, if it is compressed and damaged or cut off.
    """
    if not is_compressed(path):
        with open(path, "rb") as file:
            yield file
        return
    compression = COMPRESSIONS[os.path.splitext(path.lower())[1]]
    try:
        with io.BufferedReader(pa.input_stream(path, compression=compression), buffer_size=2**20) as file:
            yield file
    except OSError as error:
        if error.errno is not None:
            raise  # the disk, not what is in the file
        raise ValueError(f"{path} is not a whole {compression} file ({' '.join(str(error).split())}).") from error


def find_files(patterns: list[str]) -> tuple[dict[str, str], list[str]]:
    """Expand files, folders, and patterns such as `*.txt`, each in sorted order; every file is taken once.

    A folder stands for all files in it and below it that are not hidden, not empty and of a kind that can be read,
    without folders of prepared shards and of runs: the output may be below the input.

    Returns:
        Path -> "" or, if several files have the same name, the path relative to the folder that holds them all; and a
        list of sentences on what is not read.

    Raises:
        ValueError: If there is nothing to read in a folder.
        OSError: If a folder cannot be listed.
    """
    paths: dict[str, str] = {}  # absolute path -> path as it was given: two patterns may match the same file
    left_out: dict[str, list[str]] = {}
    for pattern in patterns:
        # A name such as n[1].txt is no pattern where there is such a file. A pattern without a match is kept as a path,
        # so that it is reported as a missing file.
        for match in [pattern] if os.path.lexists(pattern) else sorted(glob(pattern, recursive=True)) or [pattern]:
            if (folder := _prepared_folder(match, pattern)) is not None:
                prepared = left_out.setdefault(PREPARED, [])
                prepared += [folder] if folder not in prepared else []
                continue
            for path in _files_below(match, left_out) if os.path.isdir(match) else [match]:
                paths.setdefault(os.path.abspath(path), path)
    if not paths:
        raise ValueError(f"there is no text in {shorten(patterns)}, but what this program wrote: give other files.")
    first_paths: dict[object, str] = {}
    links = [path for path in paths.values() if first_paths.setdefault(_identity(path), path) != path]
    if links:
        left_out["linked to a file that is read already"] = links
    not_read = [f"not read, {len(found):,} {reason}: {shorten(found)}" for reason, found in left_out.items()]
    return _with_names(list(first_paths.values())), not_read


def file_state(path: str) -> list:
    """[name, bytes, modification time in ns, status change time in ns]: equal ones mean an equal file.

    No program can set the last one.
    """
    stat = os.stat(path)
    return [os.path.basename(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]


def shorten(names: list[str]) -> str:
    """The first of the names, and how many more there are."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def raise_problems(problems: list[str]):
    """Raise a ValueError with the problems, one a line; if they are many, one sentence with the first of them."""
    if len(problems) > SHOWN:
        first = "; ".join(problem.rstrip(".") for problem in problems[:SHOWN])
        raise ValueError(f"{len(problems):,} files cannot be read: {first}; and {len(problems) - SHOWN:,} more.")
    if problems:
        raise ValueError("\n".join(problems))


def _files_below(folder: str, left_out: dict[str, list[str]]) -> list[str]:
    """Paths of the files to read, sorted; the others are added to `left_out`, by reason."""

    def raise_error(error: OSError):
        raise error  # os.walk would leave out what it cannot list

    found = []
    visited = set()
    for parent, folders, files in os.walk(folder, onerror=raise_error, followlinks=True):
        if (real_path := os.path.realpath(parent)) in visited:
            folders.clear()  # a link to a folder above it would never end
            continue
        visited.add(real_path)
        for name in files + [name for name in folders if name.startswith(".")]:
            path = os.path.join(parent, name)
            if reason := _reason_to_leave_out(path):
                left_out.setdefault(reason, []).append(path)
            else:
                found.append(path)
        folders[:] = [name for name in folders if not name.startswith(".")]
        if prepared := [name for name in folders if _is_prepared(os.path.join(parent, name))]:
            left_out.setdefault(PREPARED, []).extend(os.path.join(parent, name) for name in prepared)
            folders[:] = [name for name in folders if name not in prepared]
    if not found:
        raise ValueError(f"there is no file in {folder} that can be read.")
    return sorted(found)


def _prepared_folder(match: str, pattern: str) -> str | None:
    """The folder of prepared shards or of a run that a match is or is in, below the folder that the pattern names."""
    named = os.path.dirname(re.split(r"[*?[]", pattern)[0]) if match != pattern else os.path.dirname(pattern)
    while len(match) > len(named):
        if _is_prepared(match):
            return match
        match = os.path.dirname(match)
    return None


def _is_prepared(folder: str) -> bool:
    """Whether it holds shards or a run, or will."""
    if os.path.isfile(os.path.join(folder, LOCK_FILE)):
        return True
    for name in (MANIFEST, SPEC_FILE):
        with suppress(OSError), open(os.path.join(folder, name), "rb") as file:
            if b'"end_of_text_id"' in file.read(MAX_SPEC_BYTES):  # other programs have files of these names, too
                return True
    return False


def _reason_to_leave_out(path: str) -> str | None:
    name = os.path.basename(path)
    if name.startswith("."):
        return "hidden"
    try:
        kind = file_kind(path)
    except ValueError:
        return "of other kinds"
    if name in DATASETS_METADATA or not os.path.isfile(path):
        return "of other kinds"
    with open(path, "rb") as file:
        start = file.read(SNIFFED_BYTES)
    if not start:
        return "empty"
    # Many programs and data files have no extension, either; a NUL byte marks them as binary, as for grep and git.
    return "of other kinds" if kind == "" and not is_compressed(path) and b"\0" in start else None


def _identity(path: str) -> object:
    """Equal for a file and what links to it, by symbolic and by hard links."""
    try:
        stat = os.stat(path)
    except OSError:
        return path  # reported as a missing file later
    # Some file systems have no inode numbers.
    return (stat.st_dev, stat.st_ino) if stat.st_ino else os.path.realpath(path)


def _with_names(paths: list[str]) -> dict[str, str]:
    """Path -> "" or, if several files have the same name, the path relative to the folder that holds them all."""
    same_name: dict[str, list[str]] = {}
    for path in paths:
        same_name.setdefault(os.path.basename(path), []).append(path)
    names = dict.fromkeys(paths, "")
    for others in same_name.values():
        if len(others) > 1:
            try:
                folder = os.path.commonpath(map(os.path.abspath, others))
                names |= {path: Path(os.path.relpath(path, folder)).as_posix() for path in others}
            except ValueError:  # they are on several of Windows' drives
                names |= {path: Path(os.path.abspath(path)).as_posix() for path in others}
    return names
