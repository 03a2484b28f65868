"""The flags of `python -m modeling_gpt2repro.evaluation.validation`, and their checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from .load_model import best_device, device_problem, model_problem, output_problem


@dataclass
class ValidationArguments:
    """Raises a ValueError on what can be told without reading data or model, every problem on a line of its own."""

    model: str = HfArg(default="openai-community/gpt2", help="A model folder, or a model on the Hub.")
    shards: str = HfArg(default="data/edu", help="Folder that prepare_data.py wrote, or of the lecture's shards.")
    eval_tokens: int = HfArg(
        default=10_485_760, help="Tokens of the validation split, counted by its own tokenizer; less if it is smaller."
    )
    block_size: int | None = HfArg(
        default=None, help="Tokens a row: all that a token is predicted from; the model's context, at most 1024."
    )
    per_device_eval_batch_size: int = HfArg(
        default=4, help="Rows of one forward. The logits of 4 x 1024 tokens take 0.8 GB in float32, twice."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(
        default="float32", help="Of the weights and the forward; log-probabilities are float32 in any case."
    )
    device: str | None = HfArg(
        default=None,
        help="cuda, cuda:1, mps or cpu; the first of these there is, if not given, and each process's own of several.",
    )
    output: str | None = HfArg(default=None, help="Write the results to this JSON file.")
    trust_remote_code: bool = HfArg(default=False, help="Let the model's repository run its own Python code.")

    def __post_init__(self):
        problems = [model_problem(self.model)]
        if not Path(self.shards).is_dir():
            problems.append(
                f"--shards: there is no folder {self.shards}: prepare it with prepare_data.py --output_dir "
                f"{self.shards}."
            )
        for name in ("eval_tokens", "block_size", "per_device_eval_batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"--{name} ({getattr(self, name)}) must be at least 1.")
        if self.output is not None:
            problems.append(output_problem(self.output))
        self.device = self.device or best_device()
        problems.append(device_problem(self.device))
        if problems := [problem for problem in problems if problem]:
            raise ValueError("\n".join(problems))
