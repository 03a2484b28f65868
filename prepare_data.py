"""Turn text into token shards that training reads by memory map.

    python prepare_data.py --output_dir data/edu                                   # FineWeb-Edu, sample-10BT
    python prepare_data.py --output_dir data/mine --train_files 'texts/*.txt'      # .txt, .jsonl, .parquet
    python prepare_data.py --output_dir data/toy --train_files a.txt --tokenizer train --vocab_size 4096
    python prepare_data.py --output_dir /shared/edu --executor slurm --slurm_partition cpu --workers 64 --dry_run
    python prepare_data.py --verify data/mine                                      # --quick: all but the hashes

The folder then holds train_*.npy and validation_*.npy (16-bit ids, end-of-text before each document), the tokenizer,
and manifest.json, which says what they are. Train on it with train_accelerate.py --shards FOLDER. A preparation that
was cut off, however hard, goes on when the same command is given again.
"""

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("GPT2REPRO_LAZY", "1")  # here and in the workers: without the model, and so without torch

from modeling_gpt2repro.data.prepare.arguments import PrepareArguments
from modeling_gpt2repro.data.prepare.spec import BYTES_PER_TOKEN, PrepareSpec, read_spec
from modeling_gpt2repro.data.prepare.token_cache import finished_partitions
from modeling_gpt2repro.data.prepare.workspace import finish_job, is_prepared, start_job
from modeling_gpt2repro.data.shards.dataset import MANIFEST, TokenDataset, open_shards
from modeling_gpt2repro.data.shards.verify import verify_shards
from modeling_gpt2repro.data.sources.resolve import Source, hub_source, local_source
from modeling_gpt2repro.data.tokenize import make_prepare_spec
from modeling_gpt2repro.data.tokenizer import load_tokenizer, load_tokenizer_folder, save_tokenizer, train_tokenizer
from modeling_gpt2repro.runtime.command_line import exit_on_input_error, parse_command_line
from modeling_gpt2repro.runtime.progress import ProgressBar
from modeling_gpt2repro.storage.atomic import explain_disk_full


def main(argv: list[str] | None = None):
    """Prepare one folder, with a progress bar and a report, or verify one."""
    args = parse_command_line(PrepareArguments, argv, description=__doc__)
    if args.verify is not None:
        return verify(Path(args.verify), args.quick)
    folder, started = Path(args.output_dir).absolute(), time.perf_counter()
    try:
        with exit_on_input_error(), explain_disk_full(folder):
            begun = read_spec(folder)
            source = open_source(args, begun)
            tokenizer = open_tokenizer(args, source, begun, folder)
            plan = make_prepare_spec(source, tokenizer, args.tokenizer, **args.plan_options(source))
            if args.dry_run:
                return tell(args, plan, folder)
            if not is_prepared(folder, plan):
                start_job(folder, plan, resume=True)
                save_tokenizer(tokenizer, folder / "tokenizer")
                if args.executor == "slurm":
                    return submit(args, plan, folder)
                make_shards(args, plan, folder)
            finish_job(folder)
            shards = open_shards(args.output_dir)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
    report(shards, time.perf_counter() - started)


def make_shards(args: PrepareArguments, plan: PrepareSpec, folder: Path):
    """Tokenize the units that are not finished yet, on this machine or on Ray's, and write the shards."""
    from modeling_gpt2repro.data.prepare.executors import local_executor, ray_executor, run_and_watch
    from modeling_gpt2repro.data.prepare.tokenize_units import assemble

    workers = args.number_of_workers(plan)
    executor = {"local": local_executor, "ray": ray_executor}[args.executor](folder, workers)
    with ProgressBar(plan.max_tokens, "tokenizing") as bar:
        run_and_watch(executor, folder, plan, bar.show)
    with ProgressBar(plan.max_tokens, "writing shards") as bar:
        assemble(folder, plan, bar.show)


def submit(args: PrepareArguments, plan: PrepareSpec, folder: Path):
    """Hand the jobs to Slurm; the last of them writes the manifest."""
    from modeling_gpt2repro.data.prepare.executors import slurm_executor

    options = (args.number_of_workers(plan), args.slurm_partition, args.slurm_time, args.sbatch_options)
    slurm_executor(folder, *options).run()
    print(f"submitted; the shards are whole when {folder / MANIFEST} is there, and logs are in {folder / 'logs'}.")


def tell(args: PrepareArguments, plan: PrepareSpec, folder: Path):
    """What would be done; Slurm's scripts word by word."""
    tokens = sum(unit.text_bytes for unit in plan.units) // BYTES_PER_TOKEN
    print(
        f"# {len(plan.units):,} units of some {tokens:,} tokens or more to {folder}, {plan.validation_share:.4%} of "
        f"the documents for validation, by {args.number_of_workers(plan)} workers ({args.executor})"
    )
    if args.executor == "slurm":
        from modeling_gpt2repro.data.prepare.executors import slurm_scripts

        options = (args.number_of_workers(plan), args.slurm_partition, args.slurm_time, args.sbatch_options)
        for script in slurm_scripts(folder, *options):
            print(f"\n{script}")


def verify(folder: Path, quick: bool):
    """Say that a folder is what its manifest says, or what is not; exit code 1 where something is not."""
    with exit_on_input_error():
        problems = verify_shards(folder, quick)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        raise SystemExit(1)
    print(f"{folder} is what its {MANIFEST} says" + (" (contents not read)." if quick else "."))


def open_source(args: PrepareArguments, begun: PrepareSpec | None = None) -> Source:
    """Local files where they are given, else the Hub's, at the commit that was begun with."""
    if args.train_files:
        return local_source(args.train_files, args.text_column)
    revision = args.dataset_revision
    if revision is None and begun is not None and begun.source.get("dataset") == args.dataset_name:
        revision = begun.source["revision"]
    return hub_source(args.dataset_name, args.dataset_config_name, args.dataset_split, revision, args.text_column)


def open_tokenizer(
    args: PrepareArguments, source: Source, begun: PrepareSpec | None = None, folder: Path | None = None
):
    """The tokenizer that is named, or one trained on the source, once."""
    if args.tokenizer != "train":
        return load_tokenizer(args.tokenizer)
    if begun and begun.tokenizer["name"] == "train" and finished_partitions(folder):
        tokenizer = load_tokenizer_folder(folder / "tokenizer")
        if len(tokenizer) == args.vocab_size:
            return tokenizer
    texts = (document.text for unit in source.partitions for document in source.read(unit))
    return train_tokenizer(texts, args.vocab_size)


def report(shards: TokenDataset, seconds: float):
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
