"""Arguments of a training run. A name is that of transformers' `TrainingArguments` where the meaning is the same.

Lengths are given in tokens, so that they mean the same at every batch size; numbers of steps are derived from them.
"""

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modeling_gpt2repro.data.sources.resolve import BUILT_IN_TEXTS, PYTHON_PROSE, STORIES
from modeling_gpt2repro.runs.read import read_run
from modeling_gpt2repro.runtime.command_line import InputErrors, arg

from .flag_hints import FLAG_HINTS
from .optimization import OPTIMIZERS, SCHEDULE, SCHEDULES
from .presets import FINE_TUNING, PRESETS
from .recipes import GPT2_SMALL, RECIPES, describe_recipe, recipe_defaults
from .validate import HUB_STRATEGIES, check_sizes, validate_args

# For a run whose length follows from its data: a warm-up near the 4 % of the full run and of the quickstart,
# and a validation curve of ten points.
WARMUP_SHARE = 0.05
EVALUATIONS = 10
COOLDOWN_SHARE = 0.2  # enough to reach the loss of a cosine of the same length (Hägele et al. 2024, arXiv:2405.18392)
# What a small model is good at is what it was trained on.
SAMPLE_PROMPTS = {
    STORIES: "A story of Mila and Tom, Mrs. Plum, a fox, a bell and some honey.",
    PYTHON_PROSE: "This module provides",
}
DEFAULT_PROMPT = "Hello, I'm a language model,"  # the lecture's


def arguments_to_certify(values: Mapping) -> dict:
    """The arguments of the run in `output_dir`, if it is to be certified, as they were when it was last resumed.

    Without what an evaluation and a push need, since there is none. Lengths are those that the run derived.

    Args:
        values: Name -> value so far of all flags, with the `certify` and `output_dir` that were chosen.
    """
    if values["certify"] is None:
        return {}
    saved = {}
    with suppress(OSError, ValueError):  # reported by `check_certify`
        saved = read_run(Path(values["output_dir"])).config.get("arguments", {})
    others = {"resume_from_checkpoint": "latest", "attn_implementation": "auto", "hellaswag": "none"}
    others |= {"report_to": "none", "find_batch_size": False, "preflight": False}
    others |= {"push_to_hub": False, "stock_twin": False}
    others |= dict.fromkeys(("certify", "price_per_hour", "num_train_epochs", "hub_model_id"))
    return {name: value for name, value in (saved | others).items() if name in values and name != "output_dir"}


@dataclass
class TrainArguments:
    """Defaults are GPT-2 124M on 10 B tokens of FineWeb-Edu, as in the lecture."""

    flag_hints: ClassVar[Mapping[tuple[str, ...], str]] = FLAG_HINTS
    # Flags -> the defaults of other flags that follow from their values; they override a preset, and the later ones the
    # earlier.
    defaults_from: ClassVar[Mapping[tuple[str, ...], Callable[[Mapping], Mapping]]] = {
        ("recipe",): recipe_defaults,
        ("certify", "output_dir"): arguments_to_certify,
    }
    # Flag -> the defaults of other flags where it is given; they override a recipe. None: derived once data or model
    # are open.
    defaults_with: ClassVar[Mapping[str, Mapping[str, float | None]]] = {
        "init_from": FINE_TUNING,
        "num_train_epochs": {"train_tokens": None, "warmup_tokens": None},
        "train_tokens": {"num_train_epochs": None},
    }

    preset: str = arg(
        default="gpt2-124m",
        choices=PRESETS,
        help="Set of defaults to start from; other flags override it. `--preset NAME --help` shows its values.",
        group="run",
    )
    output_dir: str = arg(
        default="runs/gpt2-124m", help="Folder for checkpoints, metrics.jsonl, the loss plot and the final model."
    )
    seed: int = arg(default=1337, minimum=0, help="Seed of initial weights, data order and samples.")
    logging_steps: int = arg(
        default=10,
        minimum=1,
        help="Optimizer steps between lines of the log; a terminal shows a progress bar instead. Each line reads the "
        "metrics, which waits for the device. metrics.jsonl has every step.",
    )
    report_to: str = arg(
        default="none",
        help="Tracker to log to, besides metrics.jsonl: 'tensorboard', 'wandb', 'trackio', ..., 'all' (every "
        "installed one) or 'none'.",
    )
    preflight: bool = arg(
        default=False, help="Check all inputs, time ten steps, print what the whole run will take, and exit."
    )
    certify: int | None = arg(
        default=None,
        minimum=1,
        help="Take this many random steps of the run in output_dir again, compare them with its log and checkpoints, "
        "write a certificate into its model folder, and exit. All other flags that are not given are taken from the "
        "run. If not given, output_dir is trained.",
    )
    price_per_hour: float | None = arg(
        default=None,
        above=0,
        help="Price of one hour of all machines together, for --preflight, in any currency. If not given, no cost is "
        "printed.",
    )

    n_layer: int | None = arg(default=12, minimum=1, help="Number of transformer blocks.", group="model")
    n_head: int | None = arg(default=12, minimum=1, help="Attention heads per block. Must divide n_embd.")
    n_embd: int | None = arg(default=768, minimum=1, help="Width of the embeddings and of every block.")
    block_size: int | None = arg(default=1024, minimum=1, help="Context length in tokens.")
    initializer_range: float | None = arg(
        default=0.02,
        above=0,
        help="Standard deviation of the weights at initialization. 0.02 is that of GPT-2; a narrow model learns faster "
        "with more, 0.02 * sqrt(768 / n_embd).",
    )
    init_from: str | None = arg(
        default=None,
        help="Model to fine-tune: a folder or a Hub id, of this project or of transformers' GPT-2. Shape and context "
        "are taken from it, and these defaults replace the others: 3 epochs, 8,192 tokens_per_step, learning rate "
        "5e-5, warm-up over a twentieth of the training, an evaluation every tenth of it, a checkpoint every half. If "
        "not given, weights are random.",
    )
    attn_implementation: str = arg(
        default="auto",
        choices=("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
        help="Attention implementation. auto: that of the checkpoint, else the fastest that was measured on such a "
        "device (python -m benchmarks.attention measures), else sdpa. Kernels of other names on the Hub, code to "
        "download and run, are not accepted.",
    )
    document_mask: bool = arg(
        default=False,
        help="Keep attention inside a document, and number positions from each document's start. GPT-2 does neither.",
    )

    shards: str | None = arg(
        default=None,
        help="Folder of token shards, or hf://OWNER/NAME[@REVISION] on the Hub: what prepare_data.py wrote, or the "
        "shards of build-nanogpt or llm.c. If not given, --mix or --dataset_name is used.",
        group="data (--shards, or --mix, or --dataset_name)",
    )
    mix: str | None = arg(
        default=None,
        help="Several folders of shards, each with its share of the training tokens: data/a:0.7,data/b:0.3. If not "
        "given, --shards or --dataset_name is used.",
    )
    dataset_name: str = arg(
        default="HuggingFaceFW/fineweb-edu",
        help="Hub dataset to stream and tokenize while training; or one for which nothing is downloaded: 'stories', "
        "generated ones, or 'python-prose', the documentation that comes with Python.",
    )
    dataset_config_name: str | None = arg(
        default=None,
        help="Configuration of the dataset. If not given, sample-10BT for FineWeb-Edu, and the default one for others.",
    )
    dataset_revision: str | None = arg(
        default=None, help="Branch, tag or commit of the dataset. If not given, its main branch."
    )
    text_column: str = arg(default="text", help="Column of the dataset that holds the text.")
    tokenizer: str | None = arg(
        default=None,
        help="Tokenizer of a streamed dataset: 'gpt2', a folder or a Hub id. If not given, 'gpt2'. Shards, "
        "stories and python-prose have their own.",
    )
    tokenizer_vocab_size: int = arg(
        default=4096, minimum=1, help="Vocabulary size of the tokenizer that is trained on stories or python-prose."
    )
    overfit_one_batch: bool = arg(
        default=False,
        help="Train every step on the sequences of the first step: a test of the whole loop, whose loss must fall to "
        "nearly 0, while the validation loss stays high.",
    )
    validation_share: float = arg(
        default=0.001,
        minimum=0,
        below=1,
        help="Fraction of the dataset held out for validation. Shards have a validation split of their own.",
    )

    recipe: str = arg(
        default="lecture",
        choices=RECIPES,
        help="Defaults of optimizer, learning rate, warm-up and schedule. lecture: those of the preset. fast-adamw: 3 "
        "x its rate, a short warm-up, then a line to 0; predicted to reach the lecture's loss at 124M with 0.65 x its "
        "tokens. muon: the same with Muon; predicted to need 0.42 x. For the sources see training/recipes.py.",
        group="optimization (lengths in tokens; steps = tokens / tokens_per_step)",
    )
    train_tokens: int | None = arg(
        default=10_000_000_000,
        minimum=1,
        help="Tokens to train on. May be written as 10e9.",
    )
    num_train_epochs: float | None = arg(
        default=None,
        above=0,
        help="Passes over the training data of --shards, --mix, stories or python-prose, instead of --train_tokens. "
        "One pass over a mix is as many tokens as its folders hold together. If not given, --train_tokens decides.",
    )
    tokens_per_step: int = arg(
        default=2**19,
        minimum=1,
        help="Tokens per optimizer step, over all processes: the batch size that the learning rate goes with. "
        "Micro-batches are accumulated until a step has them.",
    )
    learning_rate: float = arg(default=6e-4, above=0, help="Peak learning rate, reached after warm-up.")
    warmup_tokens: int | None = arg(
        default=375_000_000,
        minimum=0,
        help="Tokens of linear warm-up. The default is GPT-3's (appendix B); with --num_train_epochs or --init_from, a "
        "twentieth of the training.",
    )
    lr_scheduler_type: str = arg(
        default="cosine",
        choices=SCHEDULES,
        help="Learning rate after warm-up. cosine: the lecture's. linear: a line. wsd (warmup-stable-decay): constant, "
        "then a line over the last cooldown_tokens. constant: to the end.",
    )
    cooldown_tokens: int | None = arg(
        default=None,
        minimum=1,
        help="Tokens of decay at the end of wsd. If not given, a fifth of the training.",
    )
    final_learning_rate_ratio: float | None = arg(
        default=None,
        minimum=0,
        below=1,
        help="Learning rate at the end of the decay, as a fraction of the peak. If not given, 0.1 for cosine (GPT-3, "
        "appendix B), else 0.",
    )
    optimizer: str = arg(
        default="adamw",
        choices=OPTIMIZERS,
        help="adamw; or muon, which orthogonalizes the updates of the matrices in the blocks and leaves the rest to "
        "AdamW, all with the same learning rate.",
    )
    weight_decay: float = arg(
        default=0.1, minimum=0, help="Weight decay, on matrices and embeddings; not on biases and LayerNorm."
    )
    adam_beta1: float = arg(default=0.9, minimum=0, below=1, help="AdamW's beta1 (GPT-3, appendix B).")
    adam_beta2: float = arg(default=0.95, minimum=0, below=1, help="AdamW's beta2 (GPT-3, appendix B).")
    adam_epsilon: float = arg(default=1e-8, minimum=0, help="AdamW's epsilon (GPT-3, appendix B).")
    max_grad_norm: float = arg(default=1.0, above=0, help="Gradients are clipped to this global norm.")
    skip_outliers: bool = arg(
        default=False,
        help="Skip the update of a step whose loss or gradient norm is far above those of the last 128 steps. NaN and "
        "infinity are always skipped.",
    )
    max_skipped: int = arg(default=10, minimum=1, help="Stop the run after this many skipped steps in a row.")

    eval_steps: int | None = arg(
        default=250,
        minimum=0,
        help="Optimizer steps between evaluations; 0: only at the start and at the end. With --init_from or the preset "
        "own-text, a tenth of the run.",
        group="evaluation",
    )
    eval_tokens: int = arg(
        default=10_485_760,
        minimum=1,
        help="Tokens of the validation loss. They are the same ones on any number of processes.",
    )
    hellaswag: str = arg(
        default="Rowan/hellaswag",
        help="HellaSwag examples: a Hub dataset, a local .jsonl file, 'official' (the original file, which can no "
        "longer be downloaded and must be in the cache), or 'none'.",
    )
    sample_prompts: list[str] | None = arg(
        default=None,
        help="Prompts for sampled text, each in quotes. If not given, a title for stories, 'This module provides' "
        "for python-prose, and the lecture's \"Hello, I'm a language model,\" for other data.",
    )
    num_samples: int = arg(default=4, minimum=0, help="Samples per prompt at each evaluation; 0: none.")
    sample_tokens: int = arg(default=32, minimum=0, help="New tokens per sample.")

    resume_from_checkpoint: str | None = arg(
        default=None,
        help="Checkpoint to resume from: 'latest' of output_dir (a fresh start where there is none yet), a step-... "
        "folder, or owner/name@revision on the Hub. If not given, the run starts at step 0.",
        group="checkpoints",
    )
    save_steps: int | None = arg(
        default=1000,
        minimum=0,
        help="Optimizer steps between checkpoints; 0: only at the end. With --init_from or the preset own-text, half "
        "of the run.",
    )
    save_total_limit: int | None = arg(
        default=3, minimum=0, help="Number of checkpoints to keep, the newest ones; 0: all."
    )
    keep_every: int = arg(
        default=0, minimum=0, help="Also keep every checkpoint whose step is a multiple of this; 0: none."
    )

    push_to_hub: bool = arg(
        default=False,
        help="Push the model to the Hub, with the token of `hf auth login` or HF_TOKEN.",
        group="hub",
    )
    hub_model_id: str | None = arg(
        default=None,
        help="Repository to push to: owner/name, or name for one of yours. If not given, the name of output_dir.",
    )
    hub_strategy: str = arg(
        default="every_save",
        choices=HUB_STRATEGIES,
        help="What to push before the final model. end: nothing. every_save: the model of each checkpoint. checkpoint: "
        "also the newest training state, to resume from, on the branch last-checkpoint. all_checkpoints: also the "
        "model of each checkpoint on a branch of its own.",
    )
    stock_twin: bool = arg(
        default=False,
        help="Push the final model as plain GPT-2, too, to a second repository whose name ends in -gpt2.",
    )
    hub_private_repo: bool | None = arg(
        default=None, help="Make a new repository private. If not given, the owner's setting on the Hub decides."
    )
    hub_wait_seconds: float = arg(
        default=300.0,
        minimum=0,
        help="How long a push waits for a Hub that is away; at the end of the run, all pushes together. Afterwards the "
        "run ends with exit code 3 and the command that pushes later. A slow upload is not interrupted.",
    )

    per_device_train_batch_size: int = arg(
        default=32,
        minimum=1,
        help="Sequences of block_size tokens in one forward on one device (a micro-batch). Limited by memory.",
        group="hardware (processes and precision belong to accelerate launch)",
    )
    per_device_eval_batch_size: int | None = arg(
        default=None,
        minimum=1,
        help="Sequences in one validation forward on one device. If not given, per_device_train_batch_size.",
    )
    find_batch_size: bool = arg(
        default=False, help="Find the largest per_device_train_batch_size that fits into memory, and use it."
    )
    torch_compile: bool | None = arg(
        default=None,
        help="Compile the training step with torch.compile, where it works. If not given, on CUDA and XPU only.",
    )
    deterministic: bool | None = arg(
        default=None,
        help="Give bitwise equal results each time. If not given, on the CPU only, since it can cost time on a GPU.",
    )

    def __post_init__(self):
        if self.dataset_config_name is None and self.dataset_name == "HuggingFaceFW/fineweb-edu":
            self.dataset_config_name = "sample-10BT"
        if self.final_learning_rate_ratio is None:
            self.final_learning_rate_ratio = 0.1 if self.lr_scheduler_type == "cosine" else 0.0
        if self.sample_prompts is None:
            self.sample_prompts = [SAMPLE_PROMPTS.get(self.built_in_text, DEFAULT_PROMPT)]
        InputErrors(validate_args(self)).raise_if_any()
        if self.train_tokens is not None:
            self.set_lengths()

    def set_lengths(self, tokens_per_epoch: int | None = None):
        """Derive what is still None: the tokens of `num_train_epochs`, warm-up, steps between evaluations and saves.

        Args:
            tokens_per_epoch: Training tokens of the data; needed if `train_tokens` is None.

        Raises:
            ValueError: If the epochs are less than one step.
        """
        if self.train_tokens is None:
            self.train_tokens = int(self.num_train_epochs * tokens_per_epoch)
            InputErrors(check_sizes(self)).raise_if_any()
        if self.lr_scheduler_type == "wsd" and self.cooldown_tokens is None:
            self.cooldown_tokens = int(COOLDOWN_SHARE * self.train_tokens)
        if self.warmup_tokens is None:
            self.warmup_tokens = int(WARMUP_SHARE * self.train_tokens)
        if self.eval_steps is None:
            self.eval_steps = -(-self.total_steps // EVALUATIONS)  # rounded up
        if self.save_steps is None:
            self.save_steps = -(-self.total_steps // 2)

    @property
    def built_in_text(self) -> str | None:
        """The one of BUILT_IN_TEXTS that the run trains on; None if it trains on other data."""
        is_other = self.shards is not None or self.mix is not None or self.dataset_name not in BUILT_IN_TEXTS
        return None if is_other else self.dataset_name

    @property
    def is_trial(self) -> bool:
        """Whether nothing is to be written that belongs to the run."""
        return self.preflight or self.certify is not None

    @property
    def total_steps(self) -> int:
        """Whole optimizer steps in `train_tokens`: 19,073 by default."""
        return self.train_tokens // self.tokens_per_step

    @property
    def warmup_steps(self) -> int:
        """Whole optimizer steps in `warmup_tokens`: 715 by default."""
        return self.warmup_tokens // self.tokens_per_step

    @property
    def schedule(self) -> dict:
        """The arguments that decide the learning rate, see `scheduled_learning_rate`."""
        return {name: getattr(self, name) for name in SCHEDULE}

    @property
    def recipe_summary(self) -> str:
        """The recipe, its source, and what to expect of it."""
        shape = {name: getattr(self, name) for name in GPT2_SMALL}
        return describe_recipe(self.recipe, self.preset, shape, fine_tuned=self.init_from is not None)

    @property
    def hub_repository(self) -> str | None:
        """Repository that the model is pushed to; None without `push_to_hub`."""
        return (self.hub_model_id or Path(self.output_dir).resolve().name) if self.push_to_hub else None

    @property
    def sequences_per_step(self) -> int:
        """Sequences of `block_size` tokens per optimizer step, over all processes: 512 by default."""
        return self.tokens_per_step // self.block_size

    @property
    def num_processes(self) -> int:
        """Number of processes that the launcher started; 1 without a launcher."""
        return int(os.environ.get("WORLD_SIZE", "1"))
