"""The arguments of a training run. Names are those of transformers' `TrainingArguments` where the meaning is the same;
horizons are in tokens, steps are derived."""

import os
from dataclasses import dataclass
from pathlib import Path

from transformers.hf_argparser import HfArg

from .presets import PRESETS
from .validate import validate_args


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
        problems = list(validate_args(self))
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
    def sequences_per_step(self) -> int:
        """Rows of an optimizer step over all processes."""
        return self.tokens_per_step // self.block_size

    @property
    def num_processes(self) -> int:
        """What the launcher said; 1 where nothing was launched."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of an optimizer step on each process; a stream may take more, see `stream.py`."""
        return -(-self.sequences_per_step // (self.per_device_train_batch_size * self.num_processes))
