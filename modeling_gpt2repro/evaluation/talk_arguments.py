"""Arguments of `python -m modeling_gpt2repro.evaluation.talk`, and their checks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from modeling_gpt2repro.runtime.command_line import InputErrors, arg, check_limits

from .load_model import best_device, device_problem, find_model, model_problem

SEEDS = 2**32  # torch's generator on the CPU reads 32 bits of a seed

# What people type who know train_accelerate.py or transformers.
FLAG_HINTS: dict[tuple[str, ...], str] = {
    ("model_name_or_path", "pretrained", "checkpoint", "ckpt", "run"): "give MODEL without a flag.",
    ("max_length", "length", "sample_tokens"): "use --max_new_tokens.",
    ("num_samples", "samples", "n"): "use --num_return_sequences.",
    ("do_sample", "greedy"): "use --temperature, of which 0 takes the most likely token.",
    ("sample_prompts", "prompts", "text", "start"): "use --prompt, or a file with a prompt on each line as stdin.",
    ("color", "colors", "probs", "logprobs"): "use --probabilities.",
    ("fp16", "bf16", "precision", "mixed_precision", "torch_dtype"): "use --dtype.",
}


@dataclass
class TalkArguments:
    """Which model continues which prompt, and how."""

    flag_hints: ClassVar[Mapping[tuple[str, ...], str]] = FLAG_HINTS

    model: str = arg(
        positional=True,
        help="Model to talk to: the folder of a run (its final model, or else its last checkpoint), the folder of any "
        "causal language model, or a model on the Hub.",
        group="model",
    )
    compare: str | None = arg(
        default=None, help="A second model, whose continuations are shown beside. If not given, there is none."
    )
    trust_remote_code: bool = arg(default=False, help="Let a model's repository run its own Python code.")
    chat: bool = arg(
        default=False,
        help="Hold one conversation: each prompt is a message, to which the model replies. The tokenizer must have a "
        "chat template, as that of a model fine-tuned by examples/chat.py. The oldest turns are left out once the "
        "conversation exceeds the context.",
    )

    prompt: str | None = arg(
        default=None,
        help="Text to continue. If not given, each line that is typed, or piped into stdin, is one.",
        group="text",
    )
    max_new_tokens: int = arg(default=200, minimum=1, help="Most tokens of a continuation; end-of-text may end it.")
    num_return_sequences: int = arg(default=1, minimum=1, help="Continuations of each prompt.")
    probabilities: bool = arg(
        default=False,
        help="Color each token by the model's own probability for it, before top-k and temperature. Without colors "
        "(NO_COLOR, a pipe) the number follows in parentheses.",
    )

    temperature: float = arg(
        default=1.0,
        minimum=0,
        below=float("inf"),
        help="What logits are divided by: less than 1 favors likely tokens, and 0 always takes the most likely one.",
        group="sampling",
    )
    top_k: int = arg(default=50, minimum=1, help="Sample from this many most likely tokens.")
    seed: int | None = arg(
        default=None,
        minimum=0,
        below=SEEDS,
        help="Seed of the first continuation; each further one has the next. If not given, a random one. It is printed "
        "below each text, and gives the same text again.",
    )

    dtype: str = arg(
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="Precision of the weights and the forward.",
        group="hardware",
    )
    device: str | None = arg(
        default=None,
        help="'cuda', 'cuda:1', 'mps' or 'cpu'. If not given, the first of cuda, mps and cpu that exists.",
    )

    def __post_init__(self):
        self.device = self.device or best_device()
        InputErrors([*check_limits(self), *self._check_inputs()]).raise_if_any()

    def _check_inputs(self) -> Iterator[str]:
        if self.model is None:
            yield "MODEL is missing: give the folder of a run or of a model, or the name of a model on the Hub."
        yield from filter(None, (model_problem(folder, flag) for flag, _, folder in self.models()))
        yield from filter(None, (device_problem(self.device),))
        if self.prompt == "":
            yield "--prompt is empty: give at least one character."
        if self.chat and self.compare is not None:
            yield "--chat holds a conversation with one model: leave out --compare, or --chat."
        if self.chat and self.num_return_sequences > 1:
            yield f"num_return_sequences ({self.num_return_sequences}) must be 1 with --chat: a turn has one reply."
        if self.temperature == 0 and self.num_return_sequences > 1:
            yield (
                f"num_return_sequences ({self.num_return_sequences}) must be 1 with --temperature 0, which gives "
                "the same text each time."
            )

    def models(self) -> Iterator[tuple[str, str, str]]:
        """Of each model the flag that it was given with, its name, and its folder or Hub id."""
        for flag, name in (("MODEL", self.model), ("--compare", self.compare)):
            if name is not None:
                yield flag, name, find_model(name)
