"""Arguments of prepare_data.py: what to tokenize, how, where to write it, and where to run."""

import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from modeling_gpt2repro.data.contamination import BENCHMARKS
from modeling_gpt2repro.data.shards.dataset import MANIFEST, SPEC_FILE, read_manifest
from modeling_gpt2repro.data.shards.nanogpt_format import LAYOUTS
from modeling_gpt2repro.data.sources.files import raise_problems
from modeling_gpt2repro.data.sources.resolve import BUILT_IN_TEXTS, Source
from modeling_gpt2repro.data.sources.text import WHOLE_FILE, compile_separator
from modeling_gpt2repro.runtime.command_line import InputErrors, arg, check_limits

from .spec import PrepareSpec, default_validation_share
from .workspace import find_partial_output

EXECUTORS = ("local", "slurm", "ray")
WORKER_BYTES = 32 * 2**20  # of text: about what one process tokenizes in the seconds that another one takes to start

# What people type who know transformers' examples, datasets or build-nanogpt's fineweb.py.
FLAG_HINTS: dict[tuple[str, ...], str] = {
    ("dataset", "data", "repo_id"): "use --dataset_name for a Hub dataset, or --train_files for local files.",
    ("train_file", "input", "input_file", "files", "text_file"): "use --train_files.",
    ("config", "dataset_config", "subset"): "use --dataset_config_name.",
    ("split",): "use --dataset_split.",
    ("revision",): "use --dataset_revision.",
    ("text_key", "text_field"): "use --text_column.",
    ("tokenizer_name", "model"): "use --tokenizer.",
    ("out_dir", "output", "local_dir", "data_dir"): "use --output_dir.",
    ("shard_size",): "use --shard_tokens, in tokens.",
    ("num_proc", "num_workers", "nprocs", "jobs"): "use --workers.",
    ("drop",): "use --drop_contaminated.",
    ("val_size", "test_size", "val_ratio", "validation_split_percentage"): (
        "use --validation_share, a fraction between 0 and 1."
    ),
}


@dataclass
class PrepareArguments:
    """What to tokenize, how, where to write it, and where to run."""

    flag_hints: ClassVar[Mapping[tuple[str, ...], str]] = FLAG_HINTS

    train_files: list[str] | None = arg(
        default=None,
        help="Local files or folders; patterns such as 'texts/*.txt' are expanded. What can be read: .txt, .md, files "
        "without an extension, .jsonl, .json, .csv and .tsv, each also as .gz or .zst, and .parquet and .arrow. If not "
        "given, --dataset_name is read.",
        group="text (--train_files or --dataset_name)",
    )
    dataset_name: str = arg(default="HuggingFaceFW/fineweb-edu", help="Dataset on the Hub.")
    dataset_config_name: str | None = arg(
        default=None,
        help="Configuration of the dataset. If not given, sample-10BT for FineWeb-Edu, and the default one for others.",
    )
    dataset_split: str = arg(default="train", help="Split of the dataset.")
    dataset_revision: str | None = arg(
        default=None, help="Branch, tag or commit of the dataset. If not given, its main branch."
    )
    text_column: str = arg(default="text", help="Column or field that holds the text.")
    skip_bad_lines: bool = arg(
        default=False,
        help="Skip lines and rows that are not UTF-8, of .jsonl and .json also those that are not JSON objects or have "
        "no text, of .csv and .tsv those of another number of fields; manifest.json counts them. Otherwise the first "
        "one ends the preparation.",
    )

    document_separator: str | None = arg(
        default=None,
        help=r"What separates the documents of text files (.txt, .md, no extension): blank_line, file (each file is "
        r"one document), or a string such as '<|endoftext|>' or '\n---\n'. If not given, each file is one document, of "
        r"which pieces of about 2,000 characters are held out for validation.",
    )

    decontaminate: str | None = arg(
        default=None,
        choices=tuple(BENCHMARKS),
        help="Count the training documents that share 13 words in a row with an example of this benchmark. If not "
        "given, none are compared.",
    )
    drop_contaminated: bool = arg(default=False, help="With --decontaminate, leave these documents out.")
    hellaswag: str = arg(
        default="Rowan/hellaswag",
        help="HellaSwag's examples for --decontaminate: a Hub dataset, a local .jsonl file, or 'official', see "
        "train_accelerate.py.",
    )

    tokenizer: str = arg(
        default="gpt2",
        help="'gpt2' (encoded by tiktoken), a folder, a Hub id, or 'train', which trains one on --train_files.",
        group="tokenizer",
    )
    vocab_size: int = arg(default=4096, help="Vocabulary size for --tokenizer train.")

    output_dir: str = arg(
        default="data/edu", help="Folder for the shards, the tokenizer and manifest.json.", group="shards"
    )
    validation_share: float | None = arg(
        default=None,
        above=0,
        below=1,
        help="Fraction of the documents held out for validation. If not given, 0.05 of local files; 0.001 of a Hub "
        "dataset, or more where that is less than 10 million tokens, up to 0.05.",
    )
    max_tokens: int | None = arg(
        default=None,
        minimum=1,
        help="Stop after this many training tokens. May be written as 1e9. If not given, all of the text is read.",
    )
    shard_tokens: int = arg(default=100_000_000, minimum=1, help="Tokens per shard, at 2 bytes each.")
    layout: str = arg(
        default="plain",
        choices=LAYOUTS,
        help="Names of the shards. plain: {train,validation}_NNNNNN.npy. karpathy: edufineweb_{train,val}_NNNNNN.npy, "
        "as build-nanogpt reads them.",
    )

    executor: str = arg(
        default="local", choices=EXECUTORS, help="Where to run: on this machine, or on a cluster.", group="hardware"
    )
    workers: int | None = arg(
        default=None,
        minimum=1,
        help="Processes that read and tokenize. If not given, one per core, up to 8; fewer if there is little text.",
    )
    slurm_partition: str | None = arg(
        default=None, help="Slurm partition of the jobs. Required with --executor slurm, not given otherwise."
    )
    slurm_time: str = arg(default="10:00:00", help="Time limit of a Slurm job, as hours:minutes:seconds.")
    slurm_args: list[str] | None = arg(
        default=None, help="More options for sbatch, such as account=mine. If not given, there are none."
    )
    dry_run: bool = arg(
        default=False, help="Print what would be done, and write nothing. With slurm, print the job scripts."
    )

    push_to_hub: bool = arg(
        default=False,
        help="Push the shards, with a dataset card, when they are prepared; of a folder that is prepared already, do "
        "only that. --shards hf://OWNER/NAME then trains on them anywhere.",
        group="hub",
    )
    hub_dataset_id: str | None = arg(
        default=None,
        help="Dataset repository on the Hub: OWNER/NAME, or a name alone for one of your own. If not given, nothing is "
        "pushed.",
    )
    hub_private_repo: bool | None = arg(
        default=None, help="Make a new repository private. If not given, as its owner's settings say."
    )
    hub_wait_seconds: float = arg(default=300.0, minimum=0, help="How long to retry while the Hub is away.")

    verify: str | None = arg(
        default=None,
        help="Check this folder of shards against its manifest.json, and do nothing else. If not given, shards are "
        "prepared.",
        group="verification",
    )
    quick: bool = arg(
        default=False, help="With --verify, check names, sizes, sums and the tokenizer, but do not read the shards."
    )

    def __post_init__(self):
        if self.dataset_config_name is None and self.dataset_name == "HuggingFaceFW/fineweb-edu":
            self.dataset_config_name = "sample-10BT"
        errors = InputErrors(
            [
                *check_limits(self),
                *self._check_text(),
                *self._check_unused(),
                *self._check_cluster(),
                *self._check_hub(),
            ]
        )
        errors.capture(self._check_files)
        if self.document_separator not in (None, WHOLE_FILE):
            errors.capture(compile_separator, self.document_separator)
        if self.verify is None and not self.is_only_pushed:
            errors.capture(find_partial_output, Path(self.output_dir))
        errors.raise_if_any()

    @property
    def is_only_pushed(self) -> bool:
        """Whether the folder holds finished shards, which are to be pushed."""
        folder = Path(self.output_dir)
        return self.push_to_hub and (folder / MANIFEST).is_file() and not (folder / SPEC_FILE).exists()

    def _check_text(self) -> Iterator[str]:
        if self.tokenizer == "train" and not self.train_files:
            yield "--tokenizer train works on --train_files only, because it reads all of the text twice: give files."
        if self.dataset_name in BUILT_IN_TEXTS and not self.train_files:
            yield f"dataset_name ({self.dataset_name}) needs no preparation: give it to train_accelerate.py."

    def _check_files(self):
        raise_problems(
            [
                f"there is no file {pattern} for --train_files."
                for pattern in self.train_files or []
                if not any(map(os.path.exists, [pattern, *glob(pattern, recursive=True)]))
            ]
        )

    def _check_unused(self) -> Iterator[str]:
        for name, other, is_used in (
            ("quick", "--verify", self.verify is not None),
            ("hub_dataset_id", "--push_to_hub", self.push_to_hub),
            ("hub_private_repo", "--push_to_hub", self.push_to_hub),
            ("drop_contaminated", "--decontaminate", self.decontaminate is not None),
            ("hellaswag", "--decontaminate", self.decontaminate is not None),
            ("document_separator", "--train_files", bool(self.train_files)),
            ("vocab_size", "--tokenizer train", self.tokenizer == "train"),
            ("slurm_partition", "--executor slurm", self.executor == "slurm"),
            ("slurm_time", "--executor slurm", self.executor == "slurm"),
            ("slurm_args", "--executor slurm", self.executor == "slurm"),
        ):
            if not is_used and getattr(self, name) != getattr(type(self), name):
                yield f"{name} ({getattr(self, name)}) is for {other} only: add that, or leave it out."

    def _check_hub(self) -> Iterator[str]:
        if self.push_to_hub and self.hub_dataset_id is None:
            yield "--push_to_hub needs --hub_dataset_id OWNER/NAME."
        if self.push_to_hub and self.executor == "slurm":
            yield "--push_to_hub is for this machine: when Slurm's jobs have ended, give the same folder without slurm."
        if self.is_only_pushed and self.decontaminate is not None:
            counts = read_manifest(Path(self.output_dir)).get("contamination", {})
            if counts.get("drop") is not self.drop_contaminated:
                flags = "--decontaminate and --drop_contaminated"
                yield f"{self.output_dir} was prepared with other {flags}: leave them out to push it as it is."
        if self.hub_dataset_id is not None:
            try:
                validate_repo_id(self.hub_dataset_id)
            except HFValidationError as error:
                yield f"hub_dataset_id ({self.hub_dataset_id}) must be OWNER/NAME: {' '.join(str(error).split())}"

    def _check_cluster(self) -> Iterator[str]:
        for package in {"slurm": ("datatrove",), "ray": ("datatrove", "ray")}.get(self.executor, ()):
            if find_spec(package) is None:
                yield f"--executor {self.executor} needs the package {package}: pip install {package}."
        if self.executor == "slurm":
            if self.slurm_partition is None:
                yield "--executor slurm needs --slurm_partition."
            if shutil.which("sbatch") is None and not self.dry_run:
                yield "there is no sbatch here: run this where jobs are submitted, or print the jobs with --dry_run."
        for option in self.slurm_args or []:
            if "=" not in option:
                yield f"slurm_args ({option}) must be of the form option=value."

    def plan_options(self, source: Source) -> dict:
        """Options of the shards that the text and the tokenizer do not decide."""
        share = self.validation_share
        return {
            "validation_share": default_validation_share(source, self.max_tokens) if share is None else share,
            "max_tokens": self.max_tokens,
            "shard_tokens": self.shard_tokens,
            "layout": self.layout,
            "skip_bad_lines": self.skip_bad_lines,
        }

    def number_of_workers(self, spec: PrepareSpec) -> int:
        """Processes to start: at most one per partition, and by default none that would have too little to do."""
        text_bytes = sum(partition.text_bytes for partition in spec.partitions)
        useful = text_bytes // WORKER_BYTES if text_bytes else len(spec.partitions)
        requested = self.workers or min(8, os.cpu_count() or 1, useful)
        return max(1, min(requested, len(spec.partitions)))

    @property
    def sbatch_options(self) -> dict[str, str]:
        """`slurm_args` as a mapping: ['account=mine'] -> {'account': 'mine'}."""
        return dict(option.split("=", 1) for option in self.slurm_args or [])
