"""Specification of a preparation, written to plan.json before it starts: only the same one may resume it."""

from __future__ import annotations

import itertools
import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from modeling_gpt2repro.data.shards.dataset import SPEC_FILE
from modeling_gpt2repro.data.shards.nanogpt_format import LAYOUTS
from modeling_gpt2repro.data.sources.documents import Partition
from modeling_gpt2repro.data.sources.files import file_state
from modeling_gpt2repro.data.sources.resolve import Source
from modeling_gpt2repro.data.tokenizer import save_tokenizer
from modeling_gpt2repro.storage.atomic import write_json
from modeling_gpt2repro.storage.json_files import is_count, is_size, read_json_object, require, shown

if TYPE_CHECKING:  # importing transformers takes a second, and --help does without
    from transformers import PreTrainedTokenizerFast

# Shares of the documents that are held out by default.
HUB_SHARE = 0.001
LOCAL_SHARE = 0.05
MAX_SHARE = 0.05
VALIDATION_TOKENS = 10_000_000  # about one evaluation of the lecture: 20 batches of 2**19 tokens
# English has some 4.5 bytes per GPT-2 token; rounded up, so that estimates of tokens are rather too low.
BYTES_PER_TOKEN = 5
MAX_SPEC_BYTES = 2**30  # of all of FineWeb, it has a few hundred MB
DECONTAMINATION = {"benchmark", "items_sha256", "drop"}
# Key of plan.json -> whether a value fits; the dataclasses say which must be there.
SPEC_CHECKS = {
    "units": lambda value: type(value) is list and all(type(unit) is dict for unit in value),
    "source": lambda value: type(value) is dict,
    "tokenizer": lambda value: type(value) is dict,
    "end_of_text_id": is_count,
    "validation_share": is_size,
    "max_tokens": lambda value: value is None or is_count(value),
    "shard_tokens": lambda value: is_count(value, minimum=1),
    "layout": lambda value: value in LAYOUTS,
    "skip_bad_lines": lambda value: type(value) is bool,
    "decontamination": lambda value: type(value) is dict and value.keys() in (set(), DECONTAMINATION),
    "benchmark_items": lambda value: type(value) is list and all(type(item) is str for item in value),
    "files": lambda value: value is None or (type(value) is list and all(map(_is_file_state, value))),
    "cache_numbers": lambda value: value is None or (type(value) is list and all(map(is_count, value))),
}
UNIT_CHECKS = {
    **dict.fromkeys(("path", "text_column", "file"), lambda value: type(value) is str),
    **dict.fromkeys(("start", "stop", "text_bytes", "first_row"), is_count),
    "stop_row": lambda value: value is None or is_count(value),
}


@dataclass(frozen=True)
class PrepareSpec:
    """Everything that decides the content of the shards."""

    source: dict  # `Source.description`
    partitions: list[Partition]  # to be read in this order
    tokenizer: dict  # its name, vocab_size and sha256
    end_of_text_id: int
    validation_share: float
    max_tokens: int | None = None
    shard_tokens: int = 100_000_000
    layout: str = "plain"
    skip_bad_lines: bool = False
    # Of --decontaminate: its name, a hash of its items, and whether contaminated documents are dropped; {} without it.
    decontamination: dict = field(default_factory=dict)
    benchmark_items: list[str] = field(default_factory=list)  # their texts, for workers on any machine
    # For each local file its `file_state`. (The first releases wrote all but its last value.)
    files: list[list] | None = None
    # The number of each partition's file in the cache, see `resume_from`; None if it is the partition's index.
    cache_numbers: list[int] | None = None

    @property
    def estimated_tokens(self) -> int:
        """By the bytes of text; 0 if they are unknown."""
        return sum(partition.text_bytes for partition in self.partitions) // BYTES_PER_TOKEN

    @property
    def numbers(self) -> list[int]:
        """The number of each partition's file in the cache."""
        return list(range(len(self.partitions))) if self.cache_numbers is None else self.cache_numbers

    def differences(self, other: PrepareSpec) -> list[str]:
        """Names of the fields that differ, except the text itself, which `resume_from` compares.

        A resumed preparation may turn `skip_bad_lines` on, because what is finished has no bad lines.
        """
        others = ("partitions", "files", "cache_numbers", "benchmark_items")  # of the last there is a hash
        options = [field.name for field in fields(self) if field.name not in others]
        different = [name for name in options if getattr(self, name) != getattr(other, name)]
        return [name for name in different if name != "skip_bad_lines" or other.skip_bad_lines]

    def changed_files(self, previous: PrepareSpec) -> list[str]:
        """Names of the local files that were written, copied or added since `previous`."""
        before = previous._file_states()
        states = self._file_states()
        # The first releases wrote less of a state, so only as much of it is compared.
        return [file[0] for file, state in states.items() if before.get(file) != state[: len(before.get(file, []))]]

    def with_present_files(self) -> PrepareSpec:
        """This spec, with its local files as they are now; one that is missing now counts as unchanged."""
        paths = dict.fromkeys(partition.path for partition in self.partitions)
        files = [
            file_state(path) if os.path.isfile(path) else state
            for path, state in zip(paths, self.files or [], strict=False)
        ]
        return replace(self, files=files)

    def resume_from(self, previous: PrepareSpec, unused_number: int) -> tuple[PrepareSpec, list[int]]:
        """This spec, with the cache numbers of `previous` for partitions that both have, and new ones for the others.

        So a partition keeps its file in the cache even if another file has more or fewer partitions now.

        Args:
            unused_number: The first cache number that was never used.

        Returns:
            The spec, and the cache numbers of the partitions that it keeps although their file may have changed.
        """
        old_numbers = dict(zip(previous._partition_keys(), previous.numbers, strict=True))
        new_numbers = itertools.count(unused_number)
        changed = set(self.changed_files(previous))
        numbers = []
        unverified = []
        for key, partition in zip(self._partition_keys(), self.partitions, strict=True):
            numbers.append(old_numbers[key] if key in old_numbers else next(new_numbers))
            if key in old_numbers and os.path.basename(partition.path) in changed:
                unverified.append(numbers[-1])
        is_plain = numbers == list(range(len(numbers)))
        return replace(self, cache_numbers=None if is_plain else numbers), unverified

    def _file_states(self) -> dict[tuple[str, int], list]:
        files = self.files or []
        return dict(zip(_unique_names([state[0] for state in files]), files, strict=True))

    def _partition_keys(self) -> list[tuple]:
        """For each partition, which part of which file it is, whatever folder the file is in."""
        paths = list(dict.fromkeys(partition.path for partition in self.partitions))
        names = dict(zip(paths, _unique_names(map(os.path.basename, paths)), strict=True))
        keys = []
        for partition in self.partitions:
            part = {name: value for name, value in asdict(partition).items() if name not in ("path", "text_bytes")}
            keys.append((names[partition.path], *part.values()))
        return keys


def make_prepare_spec(
    source: Source, tokenizer: PreTrainedTokenizerFast, tokenizer_name: str, validation_share: float, **options
) -> PrepareSpec:
    """Build the spec of a source and a tokenizer; `options` are the fields of the spec that have defaults."""
    partitions = []
    files = {}
    for partition in source.partitions:
        if os.path.isfile(partition.path):
            path = os.path.abspath(partition.path)  # workers and later runs may have another working directory
            if path not in files:
                files[path] = source.file_states.get(partition.path) or file_state(path)
            partition = replace(partition, path=path)
        partitions.append(partition)
    with TemporaryDirectory() as folder:
        sha256 = save_tokenizer(tokenizer, Path(folder))  # the hash of what a reader will load
    return PrepareSpec(
        source=json.loads(json.dumps(source.description)),  # as it will be read back
        partitions=partitions,
        tokenizer={"name": tokenizer_name, "vocab_size": len(tokenizer), "sha256": sha256},
        end_of_text_id=tokenizer.eos_token_id,
        validation_share=validation_share,
        files=list(files.values()),
        **options,
    )


def default_validation_share(source: Source, max_tokens: int | None = None) -> float:
    """Share of a source that is held out by default: 0.05 of local files; of a Hub dataset 0.001, or as much as gives
    10 M tokens (estimated from its bytes), but never more than 0.05.
    """
    if "dataset" not in source.description:
        return LOCAL_SHARE
    tokens = source.text_bytes // BYTES_PER_TOKEN
    if max_tokens is not None:
        tokens = min(tokens, max_tokens) if tokens else max_tokens
    if not tokens:
        return HUB_SHARE
    return round(min(MAX_SHARE, max(HUB_SHARE, VALIDATION_TOKENS / tokens)), 6)


def write_spec(folder: Path, spec: PrepareSpec):
    """Write the spec where `read_spec` finds it."""
    values = asdict(spec)
    values["units"] = values.pop("partitions")  # its key on disk since the first release
    write_json(folder / SPEC_FILE, values)


def read_spec_of_job(folder: Path) -> PrepareSpec:
    """`read_spec` for what works on a preparation that was started.

    Raises:
        ValueError: If there is none (any more), or see `read_spec`.
    """
    spec = read_spec(folder)
    if spec is None:
        raise ValueError(
            f"{folder} holds no unfinished preparation ({SPEC_FILE} is not there): another program has finished or "
            "deleted it."
        )
    return spec


def read_spec(folder: Path) -> PrepareSpec | None:
    """Read the spec of the preparation in `folder`; None if there is none.

    Raises:
        ValueError: If another version wrote it.
    """
    path = folder / SPEC_FILE
    try:
        if not folder.is_dir():
            return None
        values = read_json_object(path, max_bytes=MAX_SPEC_BYTES)
        _check_spec(values)
        values["partitions"] = [Partition(**partition) for partition in values.pop("units")]
        return PrepareSpec(**values)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:  # TypeError: a field that is missing, or of another version
        raise ValueError(f"{path} is not of this version ({error}): delete {folder} to start again.") from error


def _check_spec(values: dict):
    """Raise ValueError with the first value of a plan.json that this version does not write."""
    require("units" in values, "it has no units")
    _check_values(values, SPEC_CHECKS)
    for unit in values["units"]:
        _check_values(unit, UNIT_CHECKS, of=" of a unit")
    numbers = values.get("cache_numbers")
    is_one_each = numbers is None or len(values["units"]) == len(numbers) == len(set(numbers))
    require(is_one_each, "cache_numbers is not one for each unit")


def _check_values(values: dict, checks: dict[str, Callable[[object], bool]], of: str = ""):
    for name, value in values.items():
        require(name in checks, f"it has {shown(name)}")
        require(checks[name](value), f"{name}{of} is {shown(value)}")


def _is_file_state(state: object) -> bool:
    return type(state) is list and len(state) > 0 and type(state[0]) is str


def _unique_names(names: Iterable[str]) -> list[tuple[str, int]]:
    """["a", "b", "a"] -> [("a", 0), ("b", 0), ("a", 1)]: several folders may have a file of the same name."""
    numbers = defaultdict(itertools.count)
    return [(name, next(numbers[name])) for name in names]
