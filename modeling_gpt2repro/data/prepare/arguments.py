"""The arguments of prepare_data.py: what to tokenize, how, where to, and where it is done."""

import os
import shutil
from dataclasses import dataclass
from glob import glob
from importlib.util import find_spec
from pathlib import Path

from transformers.hf_argparser import HfArg

from modeling_gpt2repro.data.shards.nanogpt_format import LAYOUTS
from modeling_gpt2repro.data.sources.resolve import Source

from .spec import PrepareSpec, default_validation_share
from .workspace import find_partial_output

EXECUTORS = ("local", "slurm", "ray")
# Text that is tokenized in the seconds that a process takes to start.
WORKER_BYTES = 32 * 2**20


@dataclass
class PrepareArguments:
    """What to tokenize, how, and where to.

    Raises:
        ValueError: On values that do not fit, every problem on a line of its own.
    """

    output_dir: str = HfArg(default="data/edu", help="Folder for shards, tokenizer and manifest.")
    train_files: list[str] | None = HfArg(default=None, help="Local .txt, .jsonl or .parquet files instead of the Hub.")
    dataset_name: str = HfArg(default="HuggingFaceFW/fineweb-edu", help="Hub dataset.")
    dataset_config_name: str | None = HfArg(default=None, help="Its config; sample-10BT for FineWeb-Edu.")
    dataset_split: str = HfArg(default="train", help="Its split.")
    dataset_revision: str | None = HfArg(default=None, help="Its branch, tag or commit.")
    text_column: str = HfArg(default="text", help="Column or field that holds the text.")
    tokenizer: str = HfArg(default="gpt2", help="'gpt2' (by tiktoken), a folder, a Hub id, or 'train'.")
    vocab_size: int = HfArg(default=4096, help="Vocabulary of a tokenizer that is trained.")
    validation_share: float | None = HfArg(
        default=None,
        help="Part of the documents held out; by default 0.05 of local files, and of a Hub dataset 0.001, or more "
        "where that is less than 10 M tokens.",
    )
    max_tokens: int | None = HfArg(default=None, help="Stop after so many training tokens; 1e9 is understood.")
    shard_tokens: int = HfArg(default=100_000_000, help="Tokens a shard, 2 bytes each.")
    layout: str = HfArg(default="plain", help="plain, or karpathy: edufineweb_{val,train}_NNNNNN.npy.")
    workers: int | None = HfArg(
        default=None, help="Processes that read and tokenize; by default one a core, up to 8, where there is much text."
    )
    executor: str = HfArg(default="local", help="Where they run: local, or on a cluster by slurm or ray.")
    slurm_partition: str | None = HfArg(default=None, help="Slurm's partition.")
    slurm_time: str = HfArg(default="10:00:00", help="Slurm's time limit of a job.")
    slurm_args: list[str] | None = HfArg(default=None, help="More of sbatch's options, such as account=mine.")
    dry_run: bool = HfArg(default=False, help="Only say what would be done; with slurm, print the jobs' scripts.")
    verify: str | None = HfArg(default=None, help="Check this folder of shards against its manifest, nothing else.")
    quick: bool = HfArg(default=False, help="With --verify, leave out the contents.")

    def __post_init__(self):
        if self.dataset_config_name is None and self.dataset_name == "HuggingFaceFW/fineweb-edu":
            self.dataset_config_name = "sample-10BT"
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))

    def _problems(self):
        for name in ("shard_tokens", "workers", "max_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                yield f"{name} ({getattr(self, name)}) must be at least 1."
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            yield f"validation_share ({self.validation_share}) must be greater than 0 and less than 1."
        if self.tokenizer == "train" and not self.train_files:
            yield "--tokenizer train works on --train_files only: it reads all of the text twice."
        for pattern in self.train_files or []:
            if not any(map(os.path.isfile, [pattern, *glob(pattern, recursive=True)])):
                yield f"there is no file {pattern} for --train_files."
        for name, allowed in (("layout", LAYOUTS), ("executor", EXECUTORS)):
            if getattr(self, name) not in allowed:
                yield f"{name} ({getattr(self, name)}) must be one of {', '.join(allowed)}."
        yield from self._problems_of_unused_flags()
        yield from self._problems_of_clusters()
        if self.verify is None:
            try:
                find_partial_output(Path(self.output_dir))
            except ValueError as error:
                yield str(error)

    def _problems_of_unused_flags(self):
        for name, other, is_there in (
            ("quick", "--verify", self.verify is not None),
            ("vocab_size", "--tokenizer train", self.tokenizer == "train"),
            ("slurm_partition", "--executor slurm", self.executor == "slurm"),
            ("slurm_time", "--executor slurm", self.executor == "slurm"),
            ("slurm_args", "--executor slurm", self.executor == "slurm"),
        ):
            if not is_there and getattr(self, name) != getattr(type(self), name):
                yield f"{name} ({getattr(self, name)}) is for {other} only: add that, or leave it out."

    def _problems_of_clusters(self):
        if self.executor == "ray" and find_spec("ray") is None:
            yield "--executor ray needs the package ray: pip install ray."
        if self.executor == "slurm":
            if self.slurm_partition is None:
                yield "--executor slurm needs --slurm_partition."
            if shutil.which("sbatch") is None and not self.dry_run:
                yield "there is no sbatch here: run it where jobs are submitted, or look at them with --dry_run."
        for option in self.slurm_args or []:
            if "=" not in option:
                yield f"slurm_args ({option}) must be of the form option=value."

    def plan_options(self, source: Source) -> dict:
        """What decides the shards beside text and tokenizer."""
        share = self.validation_share
        return {
            "validation_share": default_validation_share(source, self.max_tokens) if share is None else share,
            "max_tokens": self.max_tokens,
            "shard_tokens": self.shard_tokens,
            "layout": self.layout,
        }

    def number_of_workers(self, plan: PrepareSpec) -> int:
        """As many as asked for, but not more than units; a process is not started for what is done before it has."""
        text_bytes = sum(unit.text_bytes for unit in plan.partitions)
        worthwhile = text_bytes // WORKER_BYTES if text_bytes else len(plan.partitions)
        wanted = self.workers or min(8, os.cpu_count() or 1, worthwhile)
        return max(1, min(wanted, len(plan.partitions)))

    @property
    def sbatch_options(self) -> dict[str, str]:
        """`slurm_args` by name."""
        return dict(option.split("=", 1) for option in self.slurm_args or [])
