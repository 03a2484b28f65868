"""Every flag of eval_hellaswag.py, and what can be told about it before anything is read."""

import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from transformers.hf_argparser import HfArg

from modeling_gpt2repro.evaluation.load_model import best_device, device_problem, model_problem, output_problem

from .examples import PROTOCOLS, check_hellaswag_source
from .official import HUB_DATASET

RESULTS_FOLDER = Path("runs") / "hellaswag"
OF_A_COMPARISON = ("compare", "protocol", "output")  # the other flags are of a scoring


@dataclass
class EvalHellaSwagArguments:
    model: str = HfArg(default="openai-community/gpt2", help="A model folder, or a model on the Hub.")
    data: str = HfArg(
        default=HUB_DATASET,
        help="A dataset on the Hub; a local jsonl in HellaSwag's schema; or 'official', the original file.",
    )
    protocol: Literal["completion", "lm-eval", "both"] = HfArg(
        default="both", help="completion: as build-nanogpt scores; lm-eval: as lm-evaluation-harness does."
    )
    limit: int | None = HfArg(
        default=None, help="Score the first so many rows only: a quick look, not an estimate of the whole."
    )
    batch_tokens: int | None = HfArg(
        default=None,
        help="Tokens in a batch, padding included; if not given, 512 on a CPU, elsewhere 16384 or as many "
        "as have 2 GB of logits (GPT-2: 9,948). Lower it where memory runs out.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(
        default="float32", help="Of the weights and the forward; log-probabilities are float32 in any case."
    )
    device: str | None = HfArg(
        default=None, help="cuda, cuda:1, mps or cpu; the first of these there is, if not given."
    )
    output: str | None = HfArg(
        default=None,
        help="The JSON file for the numbers; what the model said to each row goes beside it, into a .jsonl. If not "
        "given, a file in runs/hellaswag/ that is named after the model and what else is not the default.",
    )
    compare: list[str] | None = HfArg(
        default=None,
        help="Two .jsonl files of results, A and B: their difference row by row, B minus A. Scores nothing.",
    )
    trust_remote_code: bool = HfArg(default=False, help="Let the model's repository run its own Python code.")

    def __post_init__(self):
        """Everything that can be told without reading the data or the model; raises one problem a line."""
        problems = self._comparison_problems() if self.compare is not None else self._scoring_problems()
        if self.output is not None:
            problems += filter(None, (output_problem(self.output),))
            if self.output.endswith(".jsonl"):
                problems.append(
                    f"--output {self.output}: let it end in .json; what the model says to each row goes beside it."
                )
            if self.compare is None and self.rows_file.resolve() == Path(self.data).resolve():
                problems.append(
                    f"--output {self.output}: what the model says to each row would replace the data ({self.data}): "
                    "give another name."
                )
            if self.compare is not None and self.rows_file.resolve() in [Path(path).resolve() for path in self.compare]:
                problems.append(
                    f"--output {self.output}: the comparison would replace the numbers that go with {self.rows_file}: "
                    "give another name."
                )
        if problems:
            raise ValueError("\n".join(problems))

    def _comparison_problems(self) -> list[str]:
        problems = []
        if len(self.compare) != 2:
            problems.append(f"--compare takes two .jsonl files of results, not {len(self.compare)}.")
        problems += [f"--compare: there is no file {path}." for path in self.compare if not os.path.isfile(path)]
        given = [f"--{f.name}" for f in fields(self) if getattr(self, f.name) != f.default]
        unused = [flag for flag in given if flag[2:] not in OF_A_COMPARISON]
        if unused:
            problems.append(f"--compare reads what was scored before: leave out {', '.join(unused)}.")
        return problems

    def _scoring_problems(self) -> list[str]:
        problems = []
        try:
            check_hellaswag_source(self.data)
        except (OSError, ValueError) as error:
            problems.append(f"--data: {error}")
        for name in ("limit", "batch_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"--{name} ({getattr(self, name)}) must be at least 1.")
        self.device = self.device or best_device()
        problems += filter(None, (model_problem(self.model), device_problem(self.device)))
        if ":" in self.device and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            problems.append(f"--device {self.device} is one device for several processes: leave its number out.")
        if self.output is None:
            there = next(folder for folder in self.report_file.absolute().parents if folder.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                problems.append(f"{RESULTS_FOLDER} cannot be made in {there}: say with --output where results may go.")
        return problems

    @property
    def protocols(self) -> tuple[str, ...]:
        """Those asked for."""
        return PROTOCOLS if self.protocol == "both" else (self.protocol,)

    @property
    def report_file(self) -> Path:
        """Where the numbers go: other arguments, another file, so that a quick look replaces no whole evaluation."""
        if self.output is not None:
            return Path(self.output)
        default = {f.name: f.default for f in fields(self)}
        parts = [self.model, *(getattr(self, n) for n in ("protocol", "dtype") if getattr(self, n) != default[n])]
        parts += [Path(self.data).stem if os.path.isfile(self.data) else self.data] if self.data != HUB_DATASET else []
        parts += [f"first-{self.limit}"] if self.limit else []
        name = "_".join(re.sub(r"[^\w.-]+", "--", part).strip("-.") for part in parts)
        return RESULTS_FOLDER / f"{name[-200:]}.json"  # file systems allow 255 bytes

    @property
    def rows_file(self) -> Path:
        """Where it goes what the model said to each row."""
        return self.report_file.with_name(self.report_file.name.removesuffix(".json") + ".jsonl")
