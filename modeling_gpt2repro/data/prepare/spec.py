"""What a preparation will do, written down before it begins: one that was cut off goes on with the same, or not."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from modeling_gpt2repro.data.sources.documents import Partition
from modeling_gpt2repro.data.sources.resolve import Source
from modeling_gpt2repro.storage.atomic import atomic_write

PLAN = "plan.json"
# Of what is held out by default.
HUB_SHARE, LOCAL_SHARE, LARGEST_SHARE = 0.001, 0.05, 0.05
VALIDATION_TOKENS = 10_000_000
# English is some 4.5 bytes a GPT-2 token; more, so that the tokens are rather more than what was reckoned.
BYTES_PER_TOKEN = 5


@dataclass(frozen=True)
class PrepareSpec:
    """All that decides what the shards will hold.

    Args:
        source: `Source.description`.
        units: To be read, in this order.
        tokenizer: Its name, vocab_size and sha256.
        files: Of local files, [name, bytes, time of the last change in ns]: a file that changed is another one.
    """

    source: dict
    units: list[Partition]
    tokenizer: dict
    end_of_text_id: int
    validation_share: float
    max_tokens: int | None = None
    shard_tokens: int = 100_000_000
    layout: str = "plain"
    files: list[list] | None = None

    def source_to_read(self) -> Source:
        """The units, to be read by a process that knows nothing but the plan."""
        return Source(self.units, self.source)

    def differences(self, other: "PrepareSpec") -> list[str]:
        """Names of what is not the same; where the files lie does not count."""
        mine, others = (_comparable(plan) for plan in (self, other))
        return [name for name in mine if mine[name] != others[name]]


def make_spec(source: Source, tokenizer: dict, end_of_text_id: int, validation_share: float, **options) -> PrepareSpec:
    """A plan whose files are found from any folder."""
    units, files = [], {}
    for unit in source.partitions:
        if os.path.isfile(unit.path):
            path = os.path.abspath(unit.path)
            if path not in files:
                stat = os.stat(path)
                files[path] = [os.path.basename(path), stat.st_size, stat.st_mtime_ns]
            unit = replace(unit, path=path)
        units.append(unit)
    description = json.loads(json.dumps(source.description))  # as it will be read back
    return PrepareSpec(
        description, units, tokenizer, end_of_text_id, validation_share, files=list(files.values()), **options
    )


def default_validation_share(source: Source, max_tokens: int | None = None) -> float:
    """The part of a source that is held out where nobody says: 0.05 of local files; of a Hub dataset 0.001, or more
    where that would be less than 10 M tokens, as far as its bytes tell, but never more than 0.05.
    """
    if "dataset" not in source.description:
        return LOCAL_SHARE
    tokens = source.text_bytes // BYTES_PER_TOKEN
    if max_tokens is not None:
        tokens = min(tokens, max_tokens) if tokens else max_tokens
    if not tokens:
        return HUB_SHARE
    return round(min(LARGEST_SHARE, max(HUB_SHARE, VALIDATION_TOKENS / tokens)), 6)


def write_spec(folder: Path, plan: PrepareSpec):
    """Write it where `read_spec` finds it."""
    with atomic_write(folder / PLAN) as file:
        file.write(json.dumps(asdict(plan)).encode())


def read_spec(folder: Path) -> PrepareSpec | None:
    """The plan of the preparation in `folder`, None where there is none.

    Raises:
        ValueError: If it is of another version.
    """
    try:
        fields = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        return PrepareSpec(**{**fields, "units": [Partition(**unit) for unit in fields["units"]]})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / PLAN} is not of this version ({error}): delete {folder} to begin anew.") from error


def _comparable(plan: PrepareSpec) -> dict:
    fields = asdict(plan)
    units = [(unit.name, unit.stop, unit.text_column, unit.text_bytes) for unit in plan.units]
    return {**fields, "units": units}
