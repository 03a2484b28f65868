"""What does not fit in the arguments of a training run: every problem a sentence, before anything is read."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate.tracking import LoggerType, get_available_trackers
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .checkpoints import HUB_NAME
from .presets import PRESETS

if TYPE_CHECKING:
    from .arguments import TrainArguments

RUN_RECORD = "run.json"
HUB_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")


def validate_args(args: "TrainArguments") -> Iterator[str]:
    """All that does not fit, a sentence each: what was given, what is allowed, what to do."""
    yield from range_problems(args)
    yield from size_problems(args)
    yield from data_problems(args)
    yield from output_dir_problems(args)
    yield from hub_problems(args)
    yield from tracker_problems(args)
    if args.price_per_hour is not None and not args.preflight:
        yield f"price_per_hour ({args.price_per_hour:g}) is for --preflight's cost: add --preflight."
    if args.document_mask and args.attn_implementation.startswith("flash"):
        yield (
            f"attn_implementation ({args.attn_implementation}) waits for the device in each micro-batch to keep "
            "documents apart, and breaks the compiled step into pieces: with --document_mask, take sdpa."
        )
    resume = args.resume_from_checkpoint
    if resume not in (None, "latest") and not Path(resume).is_dir() and not HUB_NAME.fullmatch(resume):
        yield f"there is no checkpoint folder {resume}: give 'latest', a step-... folder, or owner/name@revision."


def range_problems(args: "TrainArguments") -> Iterator[str]:
    """Values that can never be."""
    if args.preset not in PRESETS:
        yield f"there is no preset {args.preset!r}; there are {', '.join(PRESETS)}."
    positive = ("n_layer", "n_head", "n_embd", "block_size", "train_tokens", "tokens_per_step", "eval_tokens")
    positive += ("per_device_train_batch_size", "learning_rate", "max_grad_norm", "logging_steps")
    positive += ("price_per_hour", "per_device_eval_batch_size", "tokenizer_vocab_size", "max_skipped")
    for name in positive:
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            yield f"{name} ({getattr(args, name)}) must be greater than 0."
    not_negative = ("warmup_tokens", "weight_decay", "adam_epsilon", "eval_steps", "save_steps", "save_total_limit")
    not_negative += ("keep_every", "num_samples", "sample_tokens", "seed")
    for name in not_negative:
        if getattr(args, name) is not None and getattr(args, name) < 0:
            yield f"{name} ({getattr(args, name)}) must not be negative."
    for name in ("adam_beta1", "adam_beta2", "final_learning_rate_ratio", "validation_share"):
        if not 0 <= getattr(args, name) < 1:
            yield f"{name} ({getattr(args, name)}) must be at least 0 and less than 1."


def size_problems(args: "TrainArguments") -> Iterator[str]:
    """Sizes that do not divide each other."""
    if args.n_head > 0 and args.n_embd % args.n_head:
        yield f"n_embd ({args.n_embd}) must be a multiple of n_head ({args.n_head})."
    if min(args.block_size, args.tokens_per_step) > 0:
        if args.tokens_per_step % args.block_size:
            nearest = max(1, round(args.tokens_per_step / args.block_size)) * args.block_size
            yield (
                f"tokens_per_step ({args.tokens_per_step}) must be a multiple of block_size ({args.block_size}): "
                f"try {nearest}."
            )
        if 0 < args.train_tokens < args.tokens_per_step:
            yield f"train_tokens ({args.train_tokens}) must be at least one step ({args.tokens_per_step})."


def data_problems(args: "TrainArguments") -> Iterator[str]:
    """Data that are not there, or named twice."""
    if args.shards is not None and not Path(args.shards).is_dir():
        yield f"there is no folder {args.shards}: prepare it with prepare_data.py --output_dir {args.shards}."
    if args.mix is not None and args.shards is not None:
        yield f"shards ({args.shards}) and mix ({args.mix}) exclude each other: give one."
    may_be_on_hub = "/" in args.hellaswag and not args.hellaswag.endswith(".jsonl")
    if not (args.hellaswag in ("official", "none") or may_be_on_hub or Path(args.hellaswag).is_file()):
        yield (
            f"there is no file {args.hellaswag} for --hellaswag: give a jsonl, a Hub dataset owner/name, "
            "'official', or 'none'."
        )
    prepared = args.shards is not None or args.mix is not None
    if args.tokenizer is not None and (prepared or args.dataset_name == "python-prose"):
        yield f"tokenizer ({args.tokenizer}) must be left out: shards and python-prose bring their own."


def tracker_problems(args: "TrainArguments") -> Iterator[str]:
    """Trackers that there are none of, or that are not installed."""
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if args.report_to not in ("none", *LoggerType.list()):
        yield f"report_to ({args.report_to}) must be 'none' or one of {', '.join(LoggerType.list())}."
    elif args.report_to not in ("none", "all", *trackers):
        yield f"report_to ({args.report_to}) is not installed: pip install it, or say 'none'."


def hub_problems(args: "TrainArguments") -> Iterator[str]:
    """Where to push, and how often."""
    if args.hub_strategy not in HUB_STRATEGIES:
        yield f"hub_strategy ({args.hub_strategy}) must be one of {', '.join(HUB_STRATEGIES)}."
    if not args.push_to_hub and args.hub_model_id is not None:
        yield f"hub_model_id ({args.hub_model_id}) says where to push to, but nothing is pushed: add --push_to_hub."
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_repository)
        except HFValidationError:
            yield (
                f"{args.hub_repository!r} cannot be the name of a repository on the Hub: give --hub_model_id "
                "owner/name, of letters, digits and -_. between them."
            )


def output_dir_problems(args: "TrainArguments") -> Iterator[str]:
    """A folder that holds something else."""
    output_dir, resume = Path(args.output_dir), args.resume_from_checkpoint
    resumes_here = resume == "latest" or (resume and Path(resume).resolve().parent == output_dir.resolve())
    if output_dir.exists() and not output_dir.is_dir():
        yield f"output_dir ({output_dir}) is a file: give a folder."
    elif (output_dir / RUN_RECORD).exists() and not resumes_here:
        yield (
            f"output_dir ({output_dir}) holds another run: go on with it by --resume_from_checkpoint latest, "
            "or give another --output_dir."
        )
    elif not (output_dir / RUN_RECORD).exists() and (strange := sorted(output_dir.glob("model"))):
        yield f"{strange[0]} is not of a run, and the result would take its place: give another --output_dir."
