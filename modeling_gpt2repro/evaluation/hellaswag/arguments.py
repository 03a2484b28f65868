"""Arguments of eval_hellaswag.py, and every check that needs neither the data nor the model."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from modeling_gpt2repro.evaluation.load_model import best_device, device_problem, model_problem, output_problem
from modeling_gpt2repro.runtime.command_line import InputErrors, arg, check_limits

from .examples import PROTOCOLS, check_hellaswag_source
from .official import HUB_DATASET

RESULTS_FOLDER = Path("runs") / "hellaswag"
COMPARE_FLAGS = ("compare", "protocol", "output")  # the other flags are for scoring

# What people type who know lm-evaluation-harness, transformers or build-nanogpt's hellaswag.py.
FLAG_HINTS: dict[tuple[str, ...], str] = {
    ("model_name_or_path", "model_type", "model_args", "pretrained", "checkpoint", "m"): "use --model.",
    ("dataset", "dataset_name", "data_path"): "use --data.",
    ("tasks", "task"): "this script scores HellaSwag only; --protocol chooses how.",
    ("num_fewshot",): "both protocols are zero-shot; --protocol chooses one.",
    ("batch_size", "per_device_eval_batch_size"): "use --batch_tokens, in tokens.",
    ("max_examples", "num_examples", "max_samples"): "use --limit.",
    ("d",): "use --device.",
    ("fp16", "half"): "use --dtype float16.",
    ("bf16",): "use --dtype bfloat16.",
    ("precision", "mixed_precision", "torch_dtype"): "use --dtype.",
    ("output_dir", "output_path", "out_dir"): "use --output, a .json file.",
    ("num_processes", "multi_gpu"): (
        "the number of processes is chosen at launch: accelerate launch --num_processes 8 eval_hellaswag.py ..."
    ),
}


@dataclass
class EvalHellaSwagArguments:
    """What to score and how, or which two results to compare."""

    flag_hints: ClassVar[Mapping[tuple[str, ...], str]] = FLAG_HINTS

    model: str = arg(
        default="openai-community/gpt2", help="Model to score: a folder, or a model on the Hub.", group="model"
    )
    trust_remote_code: bool = arg(default=False, help="Let the model's repository run its own Python code.")

    data: str = arg(
        default=HUB_DATASET,
        help="Examples to score: a dataset on the Hub, a local .jsonl file in HellaSwag's schema, or 'official', "
        "the file of the original repository, which can no longer be downloaded and must be in the cache.",
        group="examples and protocol",
    )
    protocol: str = arg(
        default="both",
        choices=(*PROTOCOLS, "both"),
        help="How to score. completion: as build-nanogpt does. lm-eval: as lm-evaluation-harness does.",
    )
    limit: int | None = arg(
        default=None,
        minimum=1,
        help="Score only this many examples, the first ones. They are not a random sample, so the accuracy is no "
        "estimate of the whole. If not given, all are scored.",
    )

    output: str | None = arg(
        default=None,
        help="JSON file for the accuracies; a .jsonl file beside it gets the scores of each example. If not given, a "
        "file in runs/hellaswag/, named after the model and every flag that is not at its default.",
        group="results",
    )
    compare: list[str] | None = arg(
        default=None,
        help="Compare two .jsonl files of results, A and B, example by example (B minus A), and score nothing. If not "
        "given, --model is scored.",
    )

    batch_tokens: int | None = arg(
        default=None,
        minimum=1,
        help="Tokens in a batch, padding included. Lower it if memory runs out. If not given, 512 on a CPU; elsewhere "
        "16384, or fewer where their logits would take more than 2 GB (GPT-2: 9948).",
        group="hardware",
    )
    dtype: str = arg(
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="Precision of the weights and the forward. Log-probabilities are always computed in float32.",
    )
    device: str | None = arg(
        default=None, help="'cuda', 'cuda:1', 'mps' or 'cpu'. If not given, the first of cuda, mps and cpu that exists."
    )

    def __post_init__(self):
        if self.compare is None:
            self.device = self.device or best_device()
        checks = self._check_scoring() if self.compare is None else self._check_comparison()
        InputErrors([*check_limits(self), *checks, *self._check_output()]).raise_if_any()

    def _check_scoring(self) -> Iterator[str]:
        try:
            check_hellaswag_source(self.data)
        except (OSError, ValueError) as error:
            yield f"--data: {error}"
        yield from filter(None, (model_problem(self.model), device_problem(self.device)))
        if ":" in self.device and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            yield f"--device {self.device} is one device for several processes: leave its number out."
        if self.output is None:
            parent = next(folder for folder in self.report_file.absolute().parents if folder.exists())
            if not parent.is_dir() or not os.access(parent, os.W_OK):
                yield f"{RESULTS_FOLDER} cannot be created in {parent}: choose a file with --output."

    def _check_comparison(self) -> Iterator[str]:
        if len(self.compare) != 2:
            yield f"--compare takes two .jsonl files of results, not {len(self.compare)}."
        yield from (f"--compare: there is no file {path}." for path in self.compare if not os.path.isfile(path))
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        unused = [f"--{name}" for name in given if name not in COMPARE_FLAGS]
        if unused:
            yield f"--compare reads results that were scored before: leave out {', '.join(unused)}."

    def _check_output(self) -> Iterator[str]:
        if self.output is None:
            return
        yield from filter(None, (output_problem(self.output),))
        if self.output.endswith(".jsonl"):
            yield f"--output {self.output} must end in .json; the scores of each example go beside it, into a .jsonl."
        samples_file = self.rows_file.resolve()
        if self.compare is None and samples_file == Path(self.data).resolve():
            yield (
                f"--output {self.output}: the scores of each example would replace the data ({self.data}): give "
                "another name."
            )
        if self.compare is not None and samples_file in [Path(path).resolve() for path in self.compare]:
            yield (
                f"--output {self.output}: the comparison would replace the accuracies that belong to "
                f"{self.rows_file}: give another name."
            )

    @property
    def protocols(self) -> tuple[str, ...]:
        """Protocols to score."""
        return PROTOCOLS if self.protocol == "both" else (self.protocol,)

    @property
    def report_file(self) -> Path:
        """File of the accuracies. Other arguments, another name, so that a quick look replaces no full evaluation."""
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
        """File of the scores of each example."""
        return self.report_file.with_name(self.report_file.name.removesuffix(".json") + ".jsonl")
