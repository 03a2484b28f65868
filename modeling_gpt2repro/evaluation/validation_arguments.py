"""Arguments of `python -m modeling_gpt2repro.evaluation.validation`, and their checks."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from modeling_gpt2repro.runtime.command_line import InputErrors, arg, check_limits
from modeling_gpt2repro.storage.hub_files import is_on_hub

from .load_model import best_device, device_problem, model_problem, output_problem

# What people type who know train_accelerate.py or transformers.
FLAG_HINTS: dict[tuple[str, ...], str] = {
    ("model_name_or_path", "pretrained", "checkpoint", "init_from"): "use --model.",
    ("data", "dataset", "dataset_name", "data_dir"): "prepare it with prepare_data.py and give --shards FOLDER.",
    ("batch_size", "eval_batch_size"): "use --per_device_eval_batch_size.",
    ("context_length", "max_length", "seq_len"): "use --block_size.",
    ("eval_iters", "max_tokens"): "use --eval_tokens.",
    ("fp16", "half"): "use --dtype float16.",
    ("bf16",): "use --dtype bfloat16.",
    ("precision", "mixed_precision", "torch_dtype"): "use --dtype.",
    ("output_dir", "output_file", "out_dir"): "use --output, a .json file.",
    ("num_processes", "multi_gpu"): (
        "the number of processes is chosen at launch: accelerate launch --num_processes 8 -m "
        "modeling_gpt2repro.evaluation.validation ..."
    ),
}


@dataclass
class ValidationArguments:
    """Which model to score on which shards."""

    flag_hints: ClassVar[Mapping[tuple[str, ...], str]] = FLAG_HINTS

    model: str = arg(
        default="openai-community/gpt2", help="Model to score: a folder, or a model on the Hub.", group="model"
    )
    trust_remote_code: bool = arg(default=False, help="Let the model's repository run its own Python code.")

    shards: str = arg(
        default="data/edu",
        help="Folder of token shards, or hf://OWNER/NAME[@REVISION] on the Hub: what prepare_data.py wrote, or the "
        "shards of build-nanogpt or llm.c.",
        group="data",
    )
    eval_tokens: int = arg(
        default=10_485_760,
        minimum=1,
        help="Tokens of the validation split to score, counted by the shards' tokenizer. Fewer if the split is "
        "smaller.",
    )
    block_size: int | None = arg(
        default=None,
        minimum=1,
        help="Tokens per sequence, the longest context of a prediction. If not given, the model's context, but at most "
        "1024.",
    )

    output: str | None = arg(
        default=None, help="JSON file for the results. If not given, they are only printed.", group="results"
    )

    per_device_eval_batch_size: int = arg(
        default=4,
        minimum=1,
        help="Sequences in one forward on one device. GPT-2's logits of 4 sequences of 1024 tokens take 0.8 GB in "
        "float32, and are held twice.",
        group="hardware",
    )
    dtype: str = arg(
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="Precision of the weights and the forward. Log-probabilities are always computed in float32.",
    )
    device: str | None = arg(
        default=None,
        help="'cuda', 'cuda:1', 'mps' or 'cpu'. If not given, the first of cuda, mps and cpu that exists; with several "
        "processes, one device each.",
    )

    def __post_init__(self):
        self.device = self.device or best_device()
        InputErrors([*check_limits(self), *self._check_inputs()]).raise_if_any()

    def _check_inputs(self) -> Iterator[str]:
        yield from filter(None, (model_problem(self.model), device_problem(self.device)))
        if not is_on_hub(self.shards) and not Path(self.shards).is_dir():
            yield (
                f"--shards: there is no folder {self.shards}: prepare it with prepare_data.py --output_dir "
                f"{self.shards}."
            )
        if self.output is not None:
            yield from filter(None, (output_problem(self.output),))
