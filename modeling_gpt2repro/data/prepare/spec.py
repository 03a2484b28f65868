"""Specification of a preparation, written to plan.json before it starts: only the same one may resume it."""

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.data.shards.dataset import SPEC_FILE
from modeling_gpt2repro.data.sources.documents import Partition
from modeling_gpt2repro.data.sources.resolve import Source
from modeling_gpt2repro.data.tokenizer import save_tokenizer
from modeling_gpt2repro.storage.atomic import write_json

# Shares of the documents that are held out by default.
HUB_SHARE = 0.001
LOCAL_SHARE = 0.05
MAX_SHARE = 0.05
VALIDATION_TOKENS = 10_000_000  # about one evaluation of the lecture: 20 batches of 2**19 tokens
# English has some 4.5 bytes per GPT-2 token; rounded up, so that estimates of tokens are rather too low.
BYTES_PER_TOKEN = 5


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
    # For each local file [name, bytes, modification time in ns]: a file that changed is another source.
    files: list[list] | None = None

    @property
    def estimated_tokens(self) -> int:
        """By the bytes of text; 0 if they are unknown."""
        return sum(partition.text_bytes for partition in self.partitions) // BYTES_PER_TOKEN

    def differences(self, other: "PrepareSpec") -> list[str]:
        """Names of the fields that differ; the folder that local files are in does not count."""
        mine = _comparable(self)
        others = _comparable(other)
        return [name for name in mine if mine[name] != others[name]]


def make_prepare_spec(
    source: Source, tokenizer: PreTrainedTokenizerFast, tokenizer_name: str, validation_share: float, **options
) -> PrepareSpec:
    """Build the spec of a source and a tokenizer; `options` are max_tokens, shard_tokens and layout."""
    partitions = []
    files = {}
    for partition in source.partitions:
        if os.path.isfile(partition.path):
            path = os.path.abspath(partition.path)  # workers and later runs may have another working directory
            if path not in files:
                stat = os.stat(path)
                files[path] = [os.path.basename(path), stat.st_size, stat.st_mtime_ns]
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
    fields = asdict(spec)
    fields["units"] = fields.pop("partitions")  # its key on disk since the first release
    write_json(folder / SPEC_FILE, fields)


def read_spec(folder: Path) -> PrepareSpec | None:
    """Read the spec of the preparation in `folder`; None if there is none.

    Raises:
        ValueError: If another version wrote it.
    """
    path = folder / SPEC_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        fields["partitions"] = [Partition(**partition) for partition in fields.pop("units")]
        return PrepareSpec(**fields)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not of this version ({error}): delete {folder} to start again.") from error


def _comparable(spec: PrepareSpec) -> dict:
    partitions = [(part.name, part.stop, part.text_column, part.text_bytes) for part in spec.partitions]
    return {**asdict(spec), "partitions": partitions}
