"""The arguments of a training run. Names are those of transformers' `TrainingArguments` where the meaning is the same;
horizons are in tokens, steps are derived."""

import os
from dataclasses import dataclass
from pathlib import Path

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.hf_argparser import HfArg

from .checkpoints import HUB_NAME
from .presets import PRESETS

RUN_RECORD = "run.json"
HUB_STRATEGIES = ("end", "every_save", "checkpoint", "all_checkpoints")


@dataclass
class TrainArguments:
    """Defaults are GPT-2 124M on 10 B tokens of FineWeb-Edu, as in the lecture; numbers without a source are its own.

    Raises:
        ValueError: On values that do not fit, every problem on a line of its own.
    """

    preset: str = HfArg(default="gpt2-124m", help=f"Defaults to start from: {', '.join(PRESETS)}.")
    output_dir: str = HfArg(default="runs/gpt2-124m", help="Where checkpoints, logs, plot and the final model go.")
    resume_from_checkpoint: str | None = HfArg(
        default=None,
        help="'latest' (a fresh start where there is none yet), a step-... folder, or owner/name@revision on the Hub.",
    )

    shards: str | None = HfArg(default=None, help="Folder written by prepare_data.py; without it, data is streamed.")
    mix: str | None = HfArg(
        default=None, help="Several such folders with their shares, 'data/a:0.7,data/b:0.3', instead of --shards."
    )
    dataset_name: str = HfArg(
        default="HuggingFaceFW/fineweb-edu",
        help="Hub dataset to stream, or python-prose: the text that Python carries.",
    )
    dataset_config_name: str | None = HfArg(default=None, help="Its config; sample-10BT for FineWeb-Edu.")
    dataset_revision: str | None = HfArg(default=None, help="Branch, tag or commit of that dataset.")
    text_column: str = HfArg(default="text", help="Column that holds the text.")
    tokenizer: str | None = HfArg(
        default=None, help="'gpt2' (the default), a folder or a Hub id; shards and python-prose bring their own."
    )
    tokenizer_vocab_size: int = HfArg(default=4096, help="Vocabulary of a tokenizer that is trained.")
    validation_share: float = HfArg(default=0.001, help="Part of the data held out where no shards are given.")
    document_mask: bool = HfArg(
        default=False, help="Attention does not cross documents, whose positions start again; GPT-2 has no such mask."
    )

    init_from: str | None = HfArg(
        default=None, help="Weights to start from instead of fresh ones: a folder or Hub id, ours or stock GPT-2."
    )
    n_layer: int = HfArg(default=12, help="Blocks.")
    n_head: int = HfArg(default=12, help="Attention heads.")
    n_embd: int = HfArg(default=768, help="Width.")
    block_size: int = HfArg(default=1024, help="Context: tokens a row.")
    attn_implementation: str = HfArg(default="sdpa", help="eager, sdpa, flash_attention_2, ...")

    train_tokens: int = HfArg(default=10_000_000_000, help="Tokens to train on; 10e9 is understood.")
    tokens_per_step: int = HfArg(default=2**19, help="Tokens an optimizer step, over all processes.")
    per_device_train_batch_size: int = HfArg(default=32, help="Rows of one forward on one device: what fits.")
    learning_rate: float = HfArg(default=6e-4, help="Peak, reached after warm-up.")
    final_learning_rate_ratio: float = HfArg(default=0.1, help="Share of the peak at the end of the cosine.")
    warmup_tokens: int = HfArg(default=375_000_000, help="Linear warm-up (GPT-3, appendix B).")
    weight_decay: float = HfArg(default=0.1, help="On matrices and embeddings.")
    adam_beta1: float = HfArg(default=0.9, help="AdamW, GPT-3 appendix B.")
    adam_beta2: float = HfArg(default=0.95, help="AdamW, GPT-3 appendix B.")
    adam_epsilon: float = HfArg(default=1e-8, help="AdamW, GPT-3 appendix B.")
    max_grad_norm: float = HfArg(default=1.0, help="Gradients are scaled down to this norm.")
    skip_outliers: bool = HfArg(
        default=False,
        help="Skip steps whose loss or gradient norm is far above the last 128; NaN and infinity always are.",
    )
    max_skipped: int = HfArg(default=10, help="Skipped steps in a row after which the run stops.")
    seed: int = HfArg(default=1337, help="Of the weights, the order of the data and the samples.")
    torch_compile: bool | None = HfArg(default=None, help="Compile the training step; by default on CUDA only.")
    deterministic: bool | None = HfArg(
        default=None, help="The same bits each time; by default on the CPU only, as it can cost time on a GPU."
    )

    preflight: bool = HfArg(
        default=False, help="Check everything, take ten steps, say what the whole run will take, and leave."
    )
    price_per_hour: float | None = HfArg(default=None, help="Of all machines together, for the preflight's cost.")
    find_batch_size: bool = HfArg(
        default=False, help="Find the largest per_device_train_batch_size that fits, and take it."
    )

    logging_steps: int = HfArg(
        default=10, help="Steps between looks at the numbers, for each of which the device is waited for."
    )
    eval_steps: int = HfArg(default=250, help="Steps between evaluations; 0: at the start and the end only.")
    eval_tokens: int = HfArg(default=10_485_760, help="Validation tokens, the same on any number of processes.")
    per_device_eval_batch_size: int | None = HfArg(
        default=None, help="Rows of one validation forward. By default as in training."
    )
    hellaswag: str = HfArg(default="Rowan/hellaswag", help="A Hub dataset, a local jsonl, 'official', or 'none'.")
    sample_prompts: list[str] = HfArg(
        default_factory=lambda: ["Hello, I'm a language model,"], help="What samples go on from; each in quotes."
    )
    num_samples: int = HfArg(default=4, help="Samples of each prompt an evaluation; 0 for none.")
    sample_tokens: int = HfArg(default=32, help="New tokens a sample.")
    save_steps: int = HfArg(default=1000, help="Steps between checkpoints; 0: at the end only.")
    save_total_limit: int | None = HfArg(default=3, help="Checkpoints kept; 0 keeps all.")
    keep_every: int = HfArg(default=0, help="Also keep every checkpoint whose step is a multiple of this; 0: none.")
    report_to: str = HfArg(
        default="none", help="A tracker beside metrics.jsonl: tensorboard, wandb, trackio, ..., or 'all' there are."
    )

    push_to_hub: bool = HfArg(
        default=False, help="Push the model to the Hub, with the token of `hf auth login` or HF_TOKEN."
    )
    hub_model_id: str | None = HfArg(
        default=None, help="owner/name on the Hub, or the name of one of yours; the name of output_dir by default."
    )
    hub_strategy: str = HfArg(
        default="every_save",
        help="What is pushed before the final model. 'end': nothing. 'every_save': each checkpoint's model. "
        "'checkpoint': also the newest one with its training state, to go on from, on a branch last-checkpoint. "
        "'all_checkpoints': also each checkpoint's model, on a branch of its own.",
    )
    hub_private_repo: bool | None = HfArg(
        default=None, help="Make a new repository private; by default as its owner has set it."
    )

    def __post_init__(self):
        if self.dataset_config_name is None and self.dataset_name == "HuggingFaceFW/fineweb-edu":
            self.dataset_config_name = "sample-10BT"
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def total_steps(self) -> int:
        """Whole optimizer steps in `train_tokens`: 19,073 by default."""
        return self.train_tokens // self.tokens_per_step

    @property
    def warmup_steps(self) -> int:
        """Whole optimizer steps in `warmup_tokens`: 715 by default."""
        return self.warmup_tokens // self.tokens_per_step

    @property
    def hub_repository(self) -> str | None:
        """Where the model is pushed to; None where it is not."""
        return (self.hub_model_id or Path(self.output_dir).resolve().name) if self.push_to_hub else None

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all processes."""
        return self.tokens_per_step // self.block_size

    @property
    def num_processes(self) -> int:
        """What the launcher said; 1 where nothing was launched."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of an optimizer step on each process; a stream may take more, see `stream.py`."""
        return -(-self.rows_per_step // (self.per_device_train_batch_size * self.num_processes))

    def _problems(self):
        if self.preset not in PRESETS:
            yield f"there is no preset {self.preset!r}; there are {', '.join(PRESETS)}."
        positive = ("n_layer", "n_head", "n_embd", "block_size", "train_tokens", "tokens_per_step", "eval_tokens")
        positive += ("per_device_train_batch_size", "learning_rate", "max_grad_norm", "logging_steps")
        positive += ("price_per_hour", "per_device_eval_batch_size", "tokenizer_vocab_size", "max_skipped")
        for name in positive:
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                yield f"{name} ({getattr(self, name)}) must be greater than 0."
        not_negative = (
            "warmup_tokens",
            "weight_decay",
            "eval_steps",
            "num_samples",
            "sample_tokens",
            "save_steps",
            "seed",
        )
        not_negative += ("save_total_limit", "keep_every", "adam_epsilon")
        for name in not_negative:
            if getattr(self, name) is not None and getattr(self, name) < 0:
                yield f"{name} ({getattr(self, name)}) must not be negative."
        for name in ("adam_beta1", "adam_beta2", "final_learning_rate_ratio", "validation_share"):
            if not 0 <= getattr(self, name) < 1:
                yield f"{name} ({getattr(self, name)}) must be at least 0 and less than 1."
        if self.n_head > 0 and self.n_embd % self.n_head:
            yield f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})."
        if min(self.block_size, self.tokens_per_step) > 0:
            if self.tokens_per_step % self.block_size:
                nearest = max(1, round(self.tokens_per_step / self.block_size)) * self.block_size
                yield (
                    f"tokens_per_step ({self.tokens_per_step}) must be a multiple of block_size ({self.block_size}): "
                    f"try {nearest}."
                )
            if 0 < self.train_tokens < self.tokens_per_step:
                yield f"train_tokens ({self.train_tokens}) must be at least one step ({self.tokens_per_step})."
        if self.price_per_hour is not None and not self.preflight:
            yield f"price_per_hour ({self.price_per_hour:g}) is for --preflight's cost: add --preflight."
        if self.document_mask and self.attn_implementation.startswith("flash"):
            yield (
                f"attn_implementation ({self.attn_implementation}) waits for the device in each micro-batch to keep "
                "documents apart, and breaks the compiled step into pieces: with --document_mask, take sdpa."
            )
        if self.shards is not None and not Path(self.shards).is_dir():
            yield f"there is no folder {self.shards}: prepare it with prepare_data.py --output_dir {self.shards}."
        if self.mix is not None and self.shards is not None:
            yield f"shards ({self.shards}) and mix ({self.mix}) exclude each other: give one."
        may_be_on_hub = "/" in self.hellaswag and not self.hellaswag.endswith(".jsonl")
        if not (self.hellaswag in ("official", "none") or may_be_on_hub or Path(self.hellaswag).is_file()):
            yield (
                f"there is no file {self.hellaswag} for --hellaswag: give a jsonl, a Hub dataset owner/name, "
                "'official', or 'none'."
            )
        prepared = self.shards is not None or self.mix is not None
        if self.tokenizer is not None and (prepared or self.dataset_name == "python-prose"):
            yield f"tokenizer ({self.tokenizer}) must be left out: shards and python-prose bring their own."
        yield from self._output_dir_problems()
        yield from self._hub_problems()
        trackers = [str(tracker) for tracker in get_available_trackers()]
        if self.report_to not in ("none", *LoggerType.list()):
            yield f"report_to ({self.report_to}) must be 'none' or one of {', '.join(LoggerType.list())}."
        elif self.report_to not in ("none", "all", *trackers):
            yield f"report_to ({self.report_to}) is not installed: pip install it, or say 'none'."
        resume = self.resume_from_checkpoint
        if resume not in (None, "latest") and not Path(resume).is_dir() and not HUB_NAME.fullmatch(resume):
            yield (f"there is no checkpoint folder {resume}: give 'latest', a step-... folder, or owner/name@revision.")

    def _hub_problems(self):
        if self.hub_strategy not in HUB_STRATEGIES:
            yield f"hub_strategy ({self.hub_strategy}) must be one of {', '.join(HUB_STRATEGIES)}."
        if not self.push_to_hub and self.hub_model_id is not None:
            yield f"hub_model_id ({self.hub_model_id}) says where to push to, but nothing is pushed: add --push_to_hub."
        if self.push_to_hub:
            try:
                validate_repo_id(self.hub_repository)
            except HFValidationError:
                yield (
                    f"{self.hub_repository!r} cannot be the name of a repository on the Hub: give --hub_model_id "
                    "owner/name, of letters, digits and -_. between them."
                )

    def _output_dir_problems(self):
        output_dir, resume = Path(self.output_dir), self.resume_from_checkpoint
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
