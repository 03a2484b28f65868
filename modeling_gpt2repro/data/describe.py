"""Look at prepared data before training on it: how much there is, how long documents are, what two of them say.

python -m modeling_gpt2repro.data.describe data/edu
python -m modeling_gpt2repro.data.describe data/edu --shard train_000007.npy
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.data.shards.dataset import SPLITS, TokenDataset, open_shards

PERCENTS = (0, 5, 25, 50, 75, 95, 100)
SHOWN_TOKENS = 120  # of each end of a long document: a few lines


@dataclass(frozen=True)
class ShardIndex:
    """A shard's name, its memory-mapped ids (n,) and the places of its end-of-text marks, one before each document."""

    name: str
    ids: np.ndarray
    places: np.ndarray

    @property
    def begins_inside(self) -> bool:
        """Whether its first tokens go on with a document of the shard before."""
        return not len(self.places) or self.places[0] > 0

    @property
    def first(self) -> np.ndarray:
        """Ids of its first document, as far as it lies here."""
        begin = 0 if self.begins_inside else 1
        return self.ids[begin : next((place for place in self.places[:2] if place >= begin), None)]

    @property
    def last(self) -> np.ndarray:
        """Ids of its last document, as far as it lies here."""
        return self.ids[self.places[-1] + 1 if len(self.places) else 0 :]


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="A folder that prepare_data.py wrote.")
    parser.add_argument("--shard", help="Show documents of this file; else of the first one.")
    args = parser.parse_args(argv)
    try:
        shards = open_shards(args.folder)
        marks = {split: find_marks(shards, split) for split in SPLITS}
        chosen = choose_shard(shards.folder, marks, args.shard)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{' '.join(str(error).split())}\n")
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack characters that documents have
    print("\n".join([*overview(shards, marks), "", *show_shard(*chosen, shards.tokenizer)]))


def find_marks(shards: TokenDataset, split: str) -> list[ShardIndex]:
    """Find the split's documents in one pass over its memory maps."""
    names = [entry["file"] for entry in shards.manifest["splits"][split]["shards"]]
    end_of_text = np.uint16(shards.tokenizer.eos_token_id)
    maps = [np.asarray(ids) for ids in shards.shards(split)]
    return [ShardIndex(name, ids, np.flatnonzero(ids == end_of_text)) for name, ids in zip(names, maps, strict=True)]


def document_lengths(marks: list[ShardIndex]) -> np.ndarray:
    """Tokens of each document (n,) without its end-of-text; one that goes on in the next shard is one."""
    starts = np.cumsum([0, *(len(shard.ids) for shard in marks)])
    places = [start + shard.places for start, shard in zip(starts, marks, strict=False)]
    return np.diff(np.concatenate([*places, starts[-1:]])) - 1


def choose_shard(folder: Path, marks: dict[str, list[ShardIndex]], name: str | None) -> tuple[ShardIndex, bool]:
    """The shard of this name, or the first one, and whether its last document goes on in the next.

    Raises:
        ValueError: If there is none of this name.
    """
    for shards in marks.values():
        for shard, following in zip(shards, [*shards[1:], None], strict=True):
            if name in (None, shard.name, Path(shard.name).stem):
                return shard, following is not None and following.begins_inside
    ends = [f"{shards[0].name} to {shards[-1].name}" for shards in marks.values() if shards]
    raise ValueError(f"{folder} has no shard {name!r}; it has {' and '.join(ends)}: give one of them as --shard.")


def overview(shards: TokenDataset, marks: dict[str, list[ShardIndex]]) -> list[str]:
    """Lines of a table, a column for each split."""
    lengths = {split: document_lengths(marks[split]) for split in marks}
    bytes_per_token = {split: shards.bytes_per_token(split) for split in marks}
    rows = {
        "tokens": [f"{sum(len(shard.ids) for shard in marks[split]):,}" for split in marks],
        "documents": [f"{len(lengths[split]):,}" for split in marks],
        "shards": [f"{len(marks[split]):,}" for split in marks],
        "bytes per token": [f"{ratio:.3f}" if ratio else "-" for ratio in bytes_per_token.values()],
    }
    for percent in PERCENTS:
        name = f"{percent} % have at most" if percent else "shortest document"
        rows[name] = [length_at(lengths[split], percent) for split in marks]
    vocabulary = shards.manifest["tokenizer"]
    lines = [f"{shards.folder}: tokenizer {vocabulary['name']}, {vocabulary['vocab_size']:,} ids", ""]
    lines += [f"{'':20}" + "".join(f"{split:>20}" for split in marks)]
    return lines + [f"{name:20}" + "".join(f"{value:>20}" for value in values) for name, values in rows.items()]


def length_at(lengths: np.ndarray, percent: int) -> str:
    """The smallest length (of some document) that so many percent of the documents do not exceed."""
    return f"{np.percentile(lengths, percent, method='inverted_cdf'):,} tokens" if len(lengths) else "-"


def show_shard(shard: ShardIndex, goes_on: bool, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Lines that say what stands first and last in a shard."""
    before = ["cut, it began in the shard before"] if shard.begins_inside else []
    after = ["cut, it goes on in the next shard"] if goes_on else []
    if len(shard.places) + shard.begins_inside < 2:
        documents = {"only": (shard.last, before + after)}
    else:
        documents = {"first": (shard.first, before), "last": (shard.last, after)}
    lines = [f"{shard.name}: {len(shard.ids):,} tokens, {len(shard.places):,} documents begin in it"]
    for which, (ids, cuts) in documents.items():
        lines += ["", f"--- {'; '.join([f'its {which} document, {len(ids):,} tokens', *cuts])}"]
        lines += [shortened(ids, tokenizer)]
    return lines


def shortened(ids: np.ndarray, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of ids (n,) without the middle of a long one; what a terminal would obey or hide is spelled out."""

    def spelled(part: np.ndarray) -> str:
        text = tokenizer.decode(part, clean_up_tokenization_spaces=False)
        return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)

    if len(ids) <= 2 * SHOWN_TOKENS:
        return spelled(ids)
    left_out = len(ids) - 2 * SHOWN_TOKENS
    return f"{spelled(ids[:SHOWN_TOKENS])}\n[... {left_out:,} tokens ...]\n{spelled(ids[-SHOWN_TOKENS:])}"


if __name__ == "__main__":
    main()
