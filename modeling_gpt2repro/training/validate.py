"""Checks of a training run's arguments before anything is read: limits, sizes, data, output folder, Hub, tracker."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.tracking import LoggerType, get_available_trackers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from modeling_gpt2repro.runs.folder import RUN_CONFIG_FILE
from modeling_gpt2repro.runs.read import read_run
from modeling_gpt2repro.runtime.command_line import check_limits
from modeling_gpt2repro.storage.hub_files import is_on_hub

from .checkpoints import HUB_NAME

if TYPE_CHECKING:
    from .arguments import TrainArguments

HUB_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")


def validate_args(args: "TrainArguments") -> Iterator[str]:
    """Yield every error, a sentence each: what was given, what is allowed, what to do."""
    yield from check_limits(args)
    yield from check_sizes(args)
    yield from check_data(args)
    yield from check_output_dir(args)
    yield from check_resume(args)
    yield from check_certify(args)
    yield from check_hub(args)
    yield from check_tracker(args)
    if args.price_per_hour is not None and not args.preflight:
        yield f"price_per_hour ({args.price_per_hour:g}) is for --preflight's cost: add --preflight."
    if args.document_mask and args.attn_implementation.startswith("flash"):
        yield (
            f"attn_implementation ({args.attn_implementation}) waits for the device in each micro-batch to keep "
            "documents apart, and breaks the compiled step into pieces: with --document_mask, use sdpa."
        )


def check_sizes(args: "TrainArguments") -> Iterator[str]:
    """Sizes of which one must be a multiple of another, or no smaller."""
    if args.n_head and args.n_embd and args.n_embd % args.n_head:
        yield f"n_embd ({args.n_embd}) must be a multiple of n_head ({args.n_head})."
    if args.block_size is not None and args.block_size > 0 and args.tokens_per_step % args.block_size:
        nearest = max(1, round(args.tokens_per_step / args.block_size)) * args.block_size
        yield (
            f"tokens_per_step ({args.tokens_per_step}) must be a multiple of block_size ({args.block_size}): "
            f"try {nearest}."
        )
    if args.train_tokens is not None and 0 < args.train_tokens < args.tokens_per_step:
        given = f"train_tokens ({args.train_tokens})"
        if args.num_train_epochs is not None:
            given = f"num_train_epochs ({args.num_train_epochs:g}, which is {args.train_tokens} tokens)"
        yield f"{given} must be at least one step: give more, or fewer --tokens_per_step than {args.tokens_per_step}."
    yield from check_schedule(args)


def check_schedule(args: "TrainArguments") -> Iterator[str]:
    """A cool-down that the schedule has not, or that leaves no room for the warm-up."""
    if args.cooldown_tokens is None:
        return
    if args.lr_scheduler_type != "wsd":
        yield (
            f"cooldown_tokens ({args.cooldown_tokens}) is for --lr_scheduler_type wsd, not "
            f"{args.lr_scheduler_type}: leave it out, or give wsd."
        )
    elif args.train_tokens is not None and args.cooldown_tokens + (args.warmup_tokens or 0) > args.train_tokens:
        yield (
            f"cooldown_tokens ({args.cooldown_tokens}) and warmup_tokens ({args.warmup_tokens or 0}) must not be more "
            f"than train_tokens ({args.train_tokens}) together: give less of one."
        )


def check_data(args: "TrainArguments") -> Iterator[str]:
    """Data that does not exist, is given twice, or has no known size although epochs are asked for."""
    if args.shards is not None and not is_on_hub(args.shards) and not Path(args.shards).is_dir():
        command = f"prepare_data.py --output_dir {shlex.quote(args.shards)}"
        yield f"there is no folder {args.shards}: prepare it with {command}."
    if args.mix is not None and args.shards is not None:
        yield f"shards ({args.shards}) and mix ({args.mix}) exclude each other: give one."
    may_be_on_hub = "/" in args.hellaswag and not args.hellaswag.endswith(".jsonl")
    if not (args.hellaswag in ("official", "none") or may_be_on_hub or Path(args.hellaswag).is_file()):
        yield (
            f"there is no file {args.hellaswag} for --hellaswag: give a .jsonl file, a Hub dataset owner/name, "
            "official, or none."
        )
    prepared = args.shards is not None or args.mix is not None
    if args.num_train_epochs is not None and args.train_tokens is not None:
        yield (
            f"num_train_epochs ({args.num_train_epochs:g}) and train_tokens ({args.train_tokens}) exclude each other: "
            "give one."
        )
    if args.num_train_epochs is not None and not prepared and args.built_in_text is None:
        yield (
            f"num_train_epochs ({args.num_train_epochs:g}) needs data of a known size, which a stream is not: prepare "
            "it with prepare_data.py and give --shards, or give --train_tokens."
        )
    if args.tokenizer is not None and (prepared or args.built_in_text is not None):
        yield f"tokenizer ({args.tokenizer}) must be left out: shards, stories and python-prose have their own."


def check_output_dir(args: "TrainArguments") -> Iterator[str]:
    """A folder that holds something that the run would replace."""
    output_dir = Path(args.output_dir)
    is_run = (output_dir / RUN_CONFIG_FILE).exists()
    resume = args.resume_from_checkpoint
    folder = resume and os.path.dirname(os.path.realpath(resume))  # unlike `resolve`, it takes a loop of links
    resumes_here = resume == "latest" or (folder and folder == os.path.realpath(output_dir))
    if output_dir.exists() and not output_dir.is_dir():
        yield f"output_dir ({output_dir}) is a file: give a folder."
    elif is_run and not resumes_here:
        yield (
            f"output_dir ({output_dir}) holds another run: resume it with --resume_from_checkpoint latest, or give "
            "another --output_dir."
        )
    elif not is_run and (output_dir / "model").exists():
        yield (
            f"{output_dir / 'model'} does not belong to a run, and the final model would replace it: give another "
            "--output_dir."
        )


def check_resume(args: "TrainArguments") -> Iterator[str]:
    """A checkpoint that is neither a folder nor a name on the Hub."""
    resume = args.resume_from_checkpoint
    if resume not in (None, "latest") and not Path(resume).is_dir() and not HUB_NAME.fullmatch(resume):
        yield f"there is no checkpoint folder {resume}: give latest, a step-... folder, or owner/name@revision."


def check_certify(args: "TrainArguments") -> Iterator[str]:
    """A folder that holds no run whose steps could be taken again."""
    if args.certify is None:
        return
    if args.preflight:
        yield f"certify ({args.certify}) and preflight exclude each other: give one."
    try:
        run = read_run(Path(args.output_dir))
        if not run.config:
            yield f"{run.folder} is not a run: it has no {RUN_CONFIG_FILE}; give the --output_dir of a training."
        elif not any("loss" in record for record in run.records):
            yield f"{run.folder} has no step to certify yet: train first."
    except (OSError, ValueError) as error:
        yield str(error)


def check_hub(args: "TrainArguments") -> Iterator[str]:
    """A repository name that the Hub would refuse, or that nothing is pushed to."""
    if not args.push_to_hub and args.hub_model_id is not None:
        yield f"hub_model_id ({args.hub_model_id}) names where to push, but nothing is pushed: add --push_to_hub."
    if not args.push_to_hub and args.stock_twin:
        yield "stock_twin is a second repository, but nothing is pushed: add --push_to_hub."
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_repository)
        except HFValidationError:
            yield (
                f"{args.hub_repository!r} cannot be the name of a repository on the Hub: give --hub_model_id "
                "owner/name, of letters and digits, with single - _ or . between them."
            )


def check_tracker(args: "TrainArguments") -> Iterator[str]:
    """A tracker that accelerate does not know, or that is not installed."""
    known = LoggerType.list()
    installed = [str(tracker) for tracker in get_available_trackers()]
    if args.report_to not in ("none", *known):
        yield f"report_to ({args.report_to}) must be none or one of {', '.join(known)}."
    elif args.report_to not in ("none", "all", *installed):
        yield f"report_to ({args.report_to}) is not installed: install it with pip, or use none."
