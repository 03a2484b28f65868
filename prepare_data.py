"""Turn text into token shards that training reads by memory map.

    python prepare_data.py --output_dir data/fineweb-edu-10B                       # FineWeb-Edu, sample-10BT
    python prepare_data.py --output_dir data/mine --train_files 'texts/*.txt'      # .txt, .jsonl, .parquet
    python prepare_data.py --output_dir data/toy --train_files a.txt --tokenizer train --vocab_size 4096

The folder then holds train_*.npy and validation_*.npy (16-bit ids, end-of-text before each document), the tokenizer,
and manifest.json, which says what they are. Train on it with train_accelerate.py --shards FOLDER.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm
from transformers.hf_argparser import HfArg

from modeling_gpt2repro.data.prepare import prepare_shards
from modeling_gpt2repro.data.shard_writer import find_remains
from modeling_gpt2repro.data.shards import PreparedShards
from modeling_gpt2repro.data.sources import Source, hub_source, local_source
from modeling_gpt2repro.data.tokenizer import load_tokenizer, train_tokenizer
from modeling_gpt2repro.training.command_line import bad_input_exits, parse_command_line


@dataclass
class PrepareArguments:
    """What to tokenize, how, and where to.

    Raises:
        ValueError: On values that do not fit, every problem on a line of its own.
    """

    output_dir: str = HfArg(default="data/fineweb-edu-10B", help="Folder for shards, tokenizer and manifest.")
    train_files: list[str] | None = HfArg(default=None, help="Local .txt, .jsonl or .parquet files instead of the Hub.")
    dataset_name: str = HfArg(default="HuggingFaceFW/fineweb-edu", help="Hub dataset.")
    dataset_config_name: str | None = HfArg(default=None, help="Its config; sample-10BT for FineWeb-Edu.")
    dataset_split: str = HfArg(default="train", help="Its split.")
    dataset_revision: str | None = HfArg(default=None, help="Its branch, tag or commit.")
    text_column: str = HfArg(default="text", help="Column or field that holds the text.")
    tokenizer: str = HfArg(default="gpt2", help="'gpt2' (by tiktoken), a folder, a Hub id, or 'train'.")
    vocab_size: int = HfArg(default=4096, help="Vocabulary of a tokenizer that is trained.")
    validation_share: float | None = HfArg(
        default=None, help="Part of the documents held out: 0.001 of a Hub dataset, 0.05 of local files."
    )
    max_tokens: int | None = HfArg(default=None, help="Stop after so many training tokens; 1e9 is understood.")
    shard_tokens: int = HfArg(default=100_000_000, help="Tokens a shard, 2 bytes each.")
    workers: int = HfArg(default=min(8, os.cpu_count() or 1), help="Threads that read and tokenize.")

    def __post_init__(self):
        if self.dataset_config_name is None and self.dataset_name == "HuggingFaceFW/fineweb-edu":
            self.dataset_config_name = "sample-10BT"
        if self.validation_share is None:
            self.validation_share = 0.05 if self.train_files else 0.001
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))

    def _problems(self):
        for name in ("shard_tokens", "workers", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield f"{name} ({getattr(self, name)}) must be at least 1."
        if not 0 < self.validation_share < 1:
            yield f"validation_share ({self.validation_share}) must be greater than 0 and less than 1."
        if self.tokenizer == "train" and not self.train_files:
            yield "--tokenizer train works on --train_files only: it reads all of the text twice."
        for pattern in self.train_files or []:
            if not any(character in pattern for character in "*?[") and not Path(pattern).is_file():
                yield f"there is no file {pattern} for --train_files."
        try:
            find_remains(Path(self.output_dir))
        except ValueError as error:
            yield str(error)


def main(argv: list[str] | None = None):
    """Prepare one folder, with a progress bar and a report."""
    args = parse_command_line(PrepareArguments, argv, description=__doc__)
    with bad_input_exits():
        source = open_source(args)
        tokenizer = open_tokenizer(args, source)
        started = time.perf_counter()
        with ProgressBar(args.max_tokens) as bar:
            shards = prepare_shards(
                source,
                tokenizer,
                args.tokenizer,
                args.output_dir,
                args.validation_share,
                args.max_tokens,
                args.shard_tokens,
                args.workers,
                bar.show,
            )
    report(shards, time.perf_counter() - started)


def open_source(args: PrepareArguments) -> Source:
    """Local files where they are given, else the Hub's."""
    if args.train_files:
        return local_source(args.train_files, args.text_column)
    return hub_source(
        args.dataset_name, args.dataset_config_name, args.dataset_split, args.dataset_revision, args.text_column
    )


def open_tokenizer(args: PrepareArguments, source: Source):
    """The tokenizer that is named, or one trained on the source."""
    if args.tokenizer == "train":
        texts = (document.text for unit in source.units for document in source.read(unit))
        return train_tokenizer(texts, args.vocab_size)
    return load_tokenizer(args.tokenizer)


class ProgressBar:
    """Training tokens so far, their rate and the time left, which is known by units or by `max_tokens`."""

    def __init__(self, max_tokens: int | None):
        self.max_tokens = max_tokens
        self.bar = tqdm(total=max_tokens, unit="token", unit_scale=True, dynamic_ncols=True, file=sys.stderr)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.bar.close()

    def show(self, units: int, total_units: int, tokens: int):
        """Called after each unit; the total is projected from the units where no limit is given."""
        if self.max_tokens is None:
            self.bar.total = tokens * total_units // units
        self.bar.set_postfix_str(f"{units:,} of {total_units:,} units", refresh=False)
        self.bar.update(tokens - self.bar.n)


def report(shards: PreparedShards, seconds: float):
    """Say what there is now, and the command that trains on it."""
    for split, totals in shards.manifest["splits"].items():
        print(
            f"{split:<10} {totals['tokens']:>16,} tokens {totals['documents']:>12,} documents "
            f"{len(totals['shards']):>5} shards"
        )
    vocabulary = shards.manifest["tokenizer"]
    print(f"tokenizer  {vocabulary['name']}, {vocabulary['vocab_size']:,} ids, sha256 {vocabulary['sha256'][:12]}")
    print(
        f"written to {shards.folder} in {seconds:.1f} s; train on it with train_accelerate.py --shards {shards.folder}"
    )


if __name__ == "__main__":
    main()
