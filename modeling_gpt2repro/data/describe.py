"""Look at prepared data before training on it: how much there is, how long documents are, what two of them say.

python -m modeling_gpt2repro.data.describe data/edu
python -m modeling_gpt2repro.data.describe data/edu --shard train_000007.npy
python -m modeling_gpt2repro.data.describe hf://owner/name      # downloaded and checked first
"""

import argparse
import sys
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.data.contamination import describe_contamination
from modeling_gpt2repro.data.shards.dataset import SPLITS, TokenDataset, open_shards
from modeling_gpt2repro.runtime.command_line import exit_on_input_error
from modeling_gpt2repro.runtime.progress import escape_controls

PERCENTILES = (0, 5, 25, 50, 75, 95, 100)
SHOWN_TOKENS = 120  # at each end of a long document: a few lines


@dataclass(frozen=True)
class ShardIndex:
    """Where documents begin in a shard."""

    name: str  # the shard's file name
    ids: np.ndarray  # its memory-mapped ids, (n,)
    starts: np.ndarray  # positions of its end-of-text ids, one before each document, (m,)

    @property
    def begins_inside(self) -> bool:
        """Whether its first tokens continue a document of the shard before."""
        return not len(self.starts) or self.starts[0] > 0

    @property
    def first(self) -> np.ndarray:
        """Ids of its first document, as far as it is in this shard."""
        begin = 0 if self.begins_inside else 1
        end = next((start for start in self.starts[:2] if start >= begin), None)
        return self.ids[begin:end]

    @property
    def last(self) -> np.ndarray:
        """Ids of its last document, as far as it is in this shard."""
        return self.ids[self.starts[-1] + 1 if len(self.starts) else 0 :]


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="A folder that prepare_data.py wrote, or hf://OWNER/NAME[@REVISION] on the Hub.")
    parser.add_argument("--shard", help="Show documents of this file; by default of the first one.")
    args = parser.parse_args(argv)
    with exit_on_input_error():
        dataset = open_shards(args.folder)
        indexes = {split: index_shards(dataset, split) for split in SPLITS}
        shard, is_cut = find_shard(dataset.folder, indexes, args.shard)
    sys.stdout.reconfigure(errors="backslashreplace")  # documents may have characters that the terminal lacks
    print("\n".join([*format_overview(dataset, indexes), "", *format_shard(shard, is_cut, dataset.tokenizer)]))


def index_shards(dataset: TokenDataset, split: str) -> list[ShardIndex]:
    """Find where the split's documents begin, in one pass over its memory maps; padding is left out."""
    names = [entry["file"] for entry in dataset.manifest["splits"][split]["shards"]]
    end_of_text = np.uint16(dataset.tokenizer.eos_token_id)
    maps = [np.asarray(ids) for ids in dataset.shards(split)]
    if length := dataset.manifest["source"].get("document_length"):
        if uneven := [name for name, ids in zip(names, maps, strict=True) if len(ids) % length]:
            raise ValueError(f"shard {dataset.folder / uneven[0]} does not hold whole documents of {length} tokens.")
        maps = [without_padding(ids.reshape(-1, length), end_of_text) for ids in maps]
    return [ShardIndex(name, ids, np.flatnonzero(ids == end_of_text)) for name, ids in zip(names, maps, strict=True)]


def without_padding(documents: np.ndarray, end_of_text: np.uint16) -> np.ndarray:
    """Padded documents (n, T), see `pad_document`, as other shards have them: an end-of-text before each, (m,)."""
    ends = (documents == end_of_text).argmax(axis=1)
    kept = documents[np.arange(documents.shape[1]) <= ends[:, None]]  # each with its end-of-text after it
    return np.concatenate([[end_of_text], kept[:-1]])


def document_lengths(shards: list[ShardIndex]) -> np.ndarray:
    """Tokens of each document without its end-of-text, (n,); a document that lies in two shards is counted as one."""
    offsets = np.cumsum([0, *(len(shard.ids) for shard in shards)])
    starts = [offset + shard.starts for offset, shard in zip(offsets, shards, strict=False)]
    return np.diff(np.concatenate([*starts, offsets[-1:]])) - 1


def find_shard(folder: Path, indexes: dict[str, list[ShardIndex]], name: str | None) -> tuple[ShardIndex, bool]:
    """The shard of this name, or the first one, and whether its last document continues in the next.

    Raises:
        ValueError: If there is none of this name.
    """
    for shards in indexes.values():
        for shard, following in zip_longest(shards, shards[1:]):
            if name in (None, shard.name, Path(shard.name).stem):
                return shard, following is not None and following.begins_inside
    ranges = [f"{shards[0].name} to {shards[-1].name}" for shards in indexes.values() if shards]
    raise ValueError(f"{folder} has no shard {name!r}; it has {' and '.join(ranges)}: give one of them as --shard.")


def format_overview(dataset: TokenDataset, indexes: dict[str, list[ShardIndex]]) -> list[str]:
    """Lines of a table, a column for each split."""
    lengths = {split: document_lengths(shards) for split, shards in indexes.items()}
    bytes_per_token = [dataset.bytes_per_token(split) for split in indexes]
    rows = {
        "tokens": [f"{dataset.manifest['splits'][split]['tokens']:,}" for split in indexes],
        "documents": [f"{len(lengths[split]):,}" for split in indexes],
        "shards": [f"{len(shards):,}" for shards in indexes.values()],
        "bytes per token": [f"{ratio:.3f}" if ratio else "-" for ratio in bytes_per_token],
    }
    for percent in PERCENTILES:
        name = f"{percent} % have at most" if percent else "shortest document"
        rows[name] = [format_percentile(lengths[split], percent) for split in indexes]
    tokenizer = dataset.manifest["tokenizer"]
    name = escape_controls(tokenizer["name"])
    lines = [f"{dataset.folder}: tokenizer {name}, {tokenizer['vocab_size']:,} ids", ""]
    if contamination := describe_contamination(dataset.manifest):
        lines[1:1] = [contamination]
    lines.append(f"{'':20}" + "".join(f"{split:>20}" for split in indexes))
    return lines + [f"{name:20}" + "".join(f"{value:>20}" for value in values) for name, values in rows.items()]


def format_percentile(lengths: np.ndarray, percent: int) -> str:
    """The least length that so many percent of the documents do not exceed."""
    if not len(lengths):
        return "-"
    # inverted_cdf gives the length of some document, instead of a number between two of them.
    return f"{np.percentile(lengths, percent, method='inverted_cdf'):,} tokens"


def format_shard(shard: ShardIndex, is_cut: bool, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Lines with the first and the last document of a shard.

    Args:
        is_cut: Whether the last one continues in the next shard.
    """
    before = ["cut, it began in the shard before"] if shard.begins_inside else []
    after = ["cut, it continues in the next shard"] if is_cut else []
    if len(shard.starts) + shard.begins_inside < 2:
        documents = {"only": (shard.last, before + after)}
    else:
        documents = {"first": (shard.first, before), "last": (shard.last, after)}
    lines = [f"{shard.name}: {len(shard.ids):,} tokens, {len(shard.starts):,} documents begin in it"]
    for which, (ids, cuts) in documents.items():
        title = "; ".join([f"its {which} document, {len(ids):,} tokens", *cuts])
        lines += ["", f"--- {title}", excerpt(ids, tokenizer)]
    return lines


def excerpt(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of ids (n,), a long one without its middle; control characters are escaped, or a terminal obeys them."""

    def escaped(part: np.ndarray) -> str:
        text = tokenizer.decode(part, clean_up_tokenization_spaces=False)
        return escape_controls(text, kept="\n\t")

    if len(ids) <= 2 * SHOWN_TOKENS:
        return escaped(ids)
    left_out = len(ids) - 2 * SHOWN_TOKENS
    return f"{escaped(ids[:SHOWN_TOKENS])}\n[... {left_out:,} tokens ...]\n{escaped(ids[-SHOWN_TOKENS:])}"


if __name__ == "__main__":
    main()
