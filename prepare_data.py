"""Tokenize text into shards that training reads by memory map.

    python prepare_data.py --output_dir data/edu                                   # FineWeb-Edu, sample-10BT
    python prepare_data.py --output_dir data/mine --train_files texts              # a folder, or files
    python prepare_data.py --output_dir data/toy --train_files a.txt --tokenizer train --vocab_size 4096
    python prepare_data.py --output_dir /shared/edu --executor slurm --slurm_partition cpu --workers 64 --dry_run
    python prepare_data.py --output_dir data/edu --decontaminate hellaswag         # documents that hold test questions
    python prepare_data.py --output_dir data/mine --push_to_hub --hub_dataset_id owner/tokens
    python prepare_data.py --verify data/mine                                      # --quick: all but the hashes

The folder then holds train_*.npy and validation_*.npy (16-bit ids), the tokenizer, and manifest.json, which describes
them. Train on it with train_accelerate.py --shards FOLDER. A preparation that was interrupted, even by kill -9, resumes
when the same command is run again.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__" or Path(sys.argv[0]).stem == "gpt2repro-prepare":
    os.environ.setdefault("GPT2REPRO_LAZY", "1")  # here and in the workers: without the model, and so without torch

from modeling_gpt2repro.data.contamination import describe_contamination
from modeling_gpt2repro.data.prepare.arguments import PrepareArguments
from modeling_gpt2repro.data.prepare.assemble import assemble
from modeling_gpt2repro.data.prepare.local import tokenize_locally, train_tokenizer_on, watch_partitions
from modeling_gpt2repro.data.prepare.spec import PrepareSpec, make_prepare_spec, read_spec
from modeling_gpt2repro.data.prepare.token_cache import cached_partitions, unverified_partitions
from modeling_gpt2repro.data.prepare.workspace import LOGS, SLURM_JOBS, finish_job, is_prepared, start_job
from modeling_gpt2repro.data.shards.dataset import MANIFEST, TokenDataset, open_shards, read_manifest
from modeling_gpt2repro.data.shards.hub_shards import download_shards
from modeling_gpt2repro.data.shards.verify import verify_shards
from modeling_gpt2repro.data.sources.files import shorten
from modeling_gpt2repro.data.sources.hub_rows import is_hub_rows
from modeling_gpt2repro.data.sources.resolve import Source, hub_source, local_source
from modeling_gpt2repro.data.tokenizer import load_tokenizer, load_tokenizer_folder, write_tokenizer
from modeling_gpt2repro.evaluation.hellaswag.examples import load_hellaswag, strip_wikihow_tags
from modeling_gpt2repro.runtime.command_line import as_typed, exit_on_input_error, parse_command_line
from modeling_gpt2repro.runtime.progress import ProgressBar, escape_controls
from modeling_gpt2repro.storage.atomic import explain_disk_full
from modeling_gpt2repro.storage.hub_files import is_on_hub
from modeling_gpt2repro.storage.lock import FolderLock

if TYPE_CHECKING:  # importing transformers takes a second, and --help does without
    from transformers import PreTrainedTokenizerFast


def main(argv: list[str] | None = None):
    args = parse_command_line(PrepareArguments, argv, description=__doc__)
    if args.verify is not None:
        return verify(args.verify, args.quick)
    started = time.perf_counter()
    folder = Path(args.output_dir).absolute()
    if args.is_only_pushed:
        return push(args, folder)
    if args.push_to_hub and not args.dry_run:
        push(args, folder, check=True)  # before hours of work
    try:
        with exit_on_input_error(), explain_disk_full(folder), FolderLock(folder) as lock:
            if not args.dry_run:
                lock.acquire()  # of two preparations in one folder, each would delete what the other writes
            previous_spec = read_spec(folder)  # None unless this resumes an interrupted preparation
            benchmark = benchmark_options(args)
            source = open_source(args, previous_spec)
            for remark in source.remarks:
                print(remark, file=sys.stderr)
            tokenizer = open_tokenizer(args, source, previous_spec, folder)
            spec = make_prepare_spec(source, tokenizer, args.tokenizer, **args.plan_options(source), **benchmark)
            workers = args.number_of_workers(spec)
            if args.dry_run:
                return print_dry_run(args, spec, folder, workers)
            if not is_prepared(folder, spec):
                spec = start_job(folder, spec, resume=True)
                if previous_spec is not None and unverified_partitions(folder):
                    report_changed_files(spec.changed_files(previous_spec))
                if tokenizer.name_or_path != str(folder / "tokenizer"):  # else it was loaded from there
                    write_tokenizer(tokenizer, folder / "tokenizer")
                if args.executor == "slurm":
                    from modeling_gpt2repro.data.prepare.cluster import submit_to_slurm

                    (folder / SLURM_JOBS).touch()  # keeps other programs out until the last job has ended
                    lock.release()  # the last job takes it
                    submit_to_slurm(folder, workers, args.slurm_partition, args.slurm_time, args.sbatch_options)
                    print(f"submitted; logs are in {folder / LOGS}, and {folder / MANIFEST} is written last.")
                    return

                # Workers tokenize the partitions of the source (parquet row groups, or 16 MiB of a text file) into a
                # file each. End-of-text precedes every document: it tells the model that what came before is over. The
                # hash of a document's id decides whether it is held out for validation, so any worker decides alike.
                tokenize = tokenize_locally
                if args.executor == "ray":
                    from modeling_gpt2repro.data.prepare.cluster import tokenize_on_ray as tokenize
                with ProgressBar(spec.max_tokens, "tokenizing") as bar, watch_partitions(folder, spec, bar.show):
                    tokenize(folder, workers)

                # Then their ids are joined, in order, into shards: uint16, because GPT-2's 50,257 ids fit in 16 bits,
                # and of 100 M tokens, as in the lecture, so that FineWeb-Edu's 10 B become 100 files of 200 MB.
                with ProgressBar(spec.max_tokens, "writing shards") as bar:
                    assemble(folder, spec, bar.show)
            finish_job(folder)
            shards = open_shards(args.output_dir)
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to resume.", file=sys.stderr)
        raise SystemExit(130) from None
    report(shards, time.perf_counter() - started)
    if args.push_to_hub:
        push(args, folder)


def open_source(args: PrepareArguments, previous_spec: PrepareSpec | None) -> Source:
    """Open the local files if given, else the Hub dataset; a resumed preparation at the commit it was started with."""
    if args.train_files:
        return local_source(args.train_files, args.text_column, args.document_separator, args.skip_bad_lines)
    revision = args.dataset_revision
    if revision is None and previous_spec is not None and previous_spec.source.get("dataset") == args.dataset_name:
        revision = previous_spec.source["revision"]
    source = hub_source(args.dataset_name, args.dataset_config_name, args.dataset_split, revision, args.text_column)
    if args.skip_bad_lines and any(is_hub_rows(partition.path) for partition in source.partitions):
        raise ValueError(
            f"skip_bad_lines (True) is for files on disk and for parquet, and {args.dataset_name} is neither: "
            "download its files and give them as --train_files, or leave it out."
        )
    return source


def benchmark_options(args: PrepareArguments) -> dict:
    """Options of the spec for --decontaminate: of each example the context and the right ending, without tags.

    The wrong endings were generated for HellaSwag: a text that holds one holds the context, too.
    """
    if args.decontaminate is None:
        return {}
    examples = load_hellaswag(args.hellaswag)
    items = [" ".join(map(strip_wikihow_tags, (row.ctx, row.endings[row.label]))) for row in examples]
    decontamination = {
        "benchmark": args.decontaminate,
        "items_sha256": hashlib.sha256("\n".join(items).encode()).hexdigest(),
        "drop": args.drop_contaminated,
    }
    return {"decontamination": decontamination, "benchmark_items": items}


def open_tokenizer(
    args: PrepareArguments, source: Source, previous_spec: PrepareSpec | None, folder: Path
) -> PreTrainedTokenizerFast:
    """Load the tokenizer that is named, or train one on the source; a resumed preparation keeps the one it trained."""
    if args.tokenizer != "train":
        return load_tokenizer(args.tokenizer)
    if previous_spec is not None and previous_spec.tokenizer["name"] == "train" and cached_partitions(folder):
        tokenizer = load_tokenizer_folder(folder / "tokenizer")
        if len(tokenizer) == args.vocab_size:
            return tokenizer
    return train_tokenizer_on(source, args.vocab_size, skip_bad_lines=args.skip_bad_lines)


def report_changed_files(names: list[str]):
    """Print that what was made of these files is kept only where their text is unchanged."""
    print(
        f"changed or copied since this preparation was started: {shorten(names)}; what was made of them is kept where "
        "the text is still the same.",
        file=sys.stderr,
    )


def print_dry_run(args: PrepareArguments, spec: PrepareSpec, folder: Path, workers: int):
    """Print what would be done, and the scripts that Slurm would be given."""
    print(
        f"# {len(spec.partitions):,} partitions of about {spec.estimated_tokens:,} tokens or more to {folder}, "
        f"{spec.validation_share:.4%} of the documents for validation, by {workers} workers ({args.executor})"
    )
    if args.executor == "slurm":
        from modeling_gpt2repro.data.prepare.cluster import slurm_scripts

        for script in slurm_scripts(folder, workers, args.slurm_partition, args.slurm_time, args.sbatch_options):
            print(f"\n{script}")
        print("\n# and for each of them datatrove submits a job of one CPU that merges its statistics")


def verify(folder: str, quick: bool):
    """Check a prepared folder against its manifest; print every problem and exit with code 1 if there is one."""
    with exit_on_input_error():
        path = download_shards(folder) if is_on_hub(folder) else Path(folder)
        problems = verify_shards(path, quick)
    if problems:
        print("\n".join(map(escape_controls, problems)), file=sys.stderr)
        raise SystemExit(1)
    print(f"{folder} is what its {MANIFEST} says" + (" (contents not read)." if quick else "."))
    if contamination := describe_contamination(read_manifest(path)):
        print(f"{contamination}.")


def push(args: PrepareArguments, folder: Path, check: bool = False):
    """Push the prepared folder, or find out whether it could be; end the program if it cannot."""
    from modeling_gpt2repro.hub.push_shards import push_shards_with_patience  # seconds, which other uses do without

    def show(message: str):
        print(escape_controls(message), file=sys.stderr, flush=True)

    with FolderLock(folder) as lock:
        if not check:
            lock.acquire()
        to = args.hub_dataset_id, args.hub_private_repo, args.hub_wait_seconds
        code, message = push_shards_with_patience(folder, *to, show, check)
    if code == 0 and not check:
        print(message)
    elif code:
        show(message if check else f"{message} The shards are in {folder}: run the same command again to push them.")
        raise SystemExit(code)


def report(shards: TokenDataset, seconds: float):
    """Print the totals of each split, and the command that trains on them."""
    if num_files := shards.manifest.get("files_with_other_line_ends"):
        print(f"newlines   \\r\\n and \\r became \\n in {num_files:,} of the files")
    for split, totals in shards.manifest["splits"].items():
        print(
            f"{split:<10} {totals['tokens']:>16,} tokens {totals['documents']:>12,} documents "
            f"{len(totals['shards']):>5} shards"
        )
    if bad_lines := shards.manifest.get("bad_lines"):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in bad_lines["counts"].items())
        print(f"bad lines  {sum(bad_lines['counts'].values()):,} left out ({reasons}); the first: {bad_lines['first']}")
    if contamination := describe_contamination(shards.manifest):
        print(f"benchmark  {contamination}")
    tokenizer = shards.manifest["tokenizer"]
    print(f"tokenizer  {tokenizer['name']}, {tokenizer['vocab_size']:,} ids, sha256 {tokenizer['sha256'][:12]}")
    command = as_typed(f"train_accelerate.py --shards {shlex.quote(str(shards.folder))}")
    print(f"written to {shards.folder} in {seconds:.1f} s; train on it with {command}")


if __name__ == "__main__":
    main()
