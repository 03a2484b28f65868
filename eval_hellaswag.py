"""Score a causal language model on HellaSwag: a folder of ours, a model on the Hub, or stock GPT-2.

    python eval_hellaswag.py                                             # GPT-2 124M, 10,042 rows, both protocols
    python eval_hellaswag.py --model runs/gpt2-124m/model --output runs/gpt2-124m/hellaswag.json
    python eval_hellaswag.py --data hellaswag_val.jsonl --dtype bfloat16   # a local file: nothing is downloaded

Two protocols share the name HellaSwag and give different numbers; modeling_gpt2repro/evaluation/hellaswag.py says how.
"""

import hashlib
import json
import math
import os
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import transformers
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.hf_argparser import HfArg

import modeling_gpt2repro  # noqa: F401 - registers our model, so that its folders need no remote code
from modeling_gpt2repro.evaluation.hellaswag import BASELINES, count_correct, score_hellaswag, summarize
from modeling_gpt2repro.evaluation.hellaswag_rows import (
    OFFICIAL_ROWS,
    OFFICIAL_SHA256,
    PROTOCOLS,
    HellaSwagRow,
    check_hellaswag_source,
    load_hellaswag,
)
from modeling_gpt2repro.training.command_line import bad_input_exits, parse_command_line


@dataclass
class EvalHellaSwagArguments:
    model: str = HfArg(default="openai-community/gpt2", help="A model folder, or a model on the Hub.")
    data: str = HfArg(default="Rowan/hellaswag", help="A local jsonl in HellaSwag's schema, or a dataset on the Hub.")
    protocol: Literal["completion", "lm-eval", "both"] = HfArg(
        default="both", help="completion: as build-nanogpt scores; lm-eval: as lm-evaluation-harness does."
    )
    limit: int | None = HfArg(
        default=None, help="Score the first so many rows only: a quick look, not an estimate of the whole."
    )
    batch_tokens: int = HfArg(
        default=8192, help="Tokens in a batch, padding included. Its logits take 1.6 GB in float32: lower it on OOM."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = HfArg(
        default="float32", help="Of the weights and the forward; log-probabilities are float32 in any case."
    )
    device: str | None = HfArg(
        default=None, help="cuda, cuda:1, mps or cpu; the first of these there is, if not given."
    )
    output: str | None = HfArg(default=None, help="Write the results to this JSON file.")
    trust_remote_code: bool = HfArg(default=False, help="Let the model's repository run its own Python code.")

    def __post_init__(self):
        """Everything that can be told without reading the data or the model; raises one problem a line."""
        problems = []
        try:
            check_hellaswag_source(self.data)
        except (OSError, ValueError) as error:
            problems.append(f"--data: {error}")
        for name in ("limit", "batch_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                problems.append(f"--{name} ({getattr(self, name)}) must be at least 1.")
        problems += [problem for problem in (self._model_problem(), self._output_problem()) if problem]
        try:
            self.device = self.device or best_device()
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            problems.append(
                f"--device {self.device} cannot be used here ({first_line(error)}); leave it out or say cpu."
            )
        if problems:
            raise ValueError("\n".join(problems))

    def _model_problem(self) -> str | None:
        if os.path.isdir(self.model):
            if not os.path.isfile(os.path.join(self.model, "config.json")):
                return f"--model {self.model} has no config.json: give a folder that save_pretrained has written."
        elif os.path.exists(self.model):
            return f"--model {self.model} is a file: give the folder it is in."
        elif self.model.startswith(("/", ".", "~")) or self.model.count("/") > 1 or not self.model:
            return f"--model {self.model}: there is no such folder, and a model on the Hub is named owner/name."

    def _output_problem(self) -> str | None:
        if self.output is None:
            return None
        folder = os.path.dirname(self.output) or "."
        if os.path.isdir(self.output):
            return f"--output {self.output} is a folder: give the name of a file in it."
        if not os.path.isdir(folder):
            return f"--output {self.output}: there is no folder {folder}; make it first."
        if not os.access(folder, os.W_OK):
            return f"--output {self.output}: the folder {folder} cannot be written to."

    @property
    def protocols(self) -> tuple[str, ...]:
        return PROTOCOLS if self.protocol == "both" else (self.protocol,)


def main(argv: list[str] | None = None) -> None:
    args = parse_command_line(EvalHellaSwagArguments, argv, description=__doc__.splitlines()[0])
    with bad_input_exits():
        rows = load_rows(args)
        model, tokenizer = load_model(args)
    start = time.perf_counter()
    with tqdm(total=len(rows), unit="row") as bar, bad_input_exits():
        results = score_hellaswag(
            model, tokenizer, rows, args.protocols, args.batch_tokens, on_progress=progress_on(bar, args.protocols)
        )
        if not all(math.isfinite(sum(result.log_likelihoods)) for result in results):
            raise ValueError(f"--model {args.model} gives NaN or infinite scores: try float32, or check its weights.")
    report = {
        "model": args.model,
        "data": args.data,
        "data_sha256": sha256_of(args.data),
        "results": summarize(results),
        "seconds": round(time.perf_counter() - start, 3),
        "arguments": asdict(args),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    print_table(report)
    if args.output:
        write_json(report, args.output)


def load_rows(args: EvalHellaSwagArguments) -> list[HellaSwagRow]:
    """The rows to score; ValueError that names the flag where they cannot be had."""
    try:
        return load_hellaswag(args.data, args.limit)
    except (OSError, ValueError) as error:
        raise ValueError(f"--data: {error}") from error


def load_model(args: EvalHellaSwagArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on its device and its tokenizer; ValueError with a sentence where they cannot be had."""
    # Given even where False: without it a repository with code of its own asks at the terminal and waits.
    options = {"trust_remote_code": args.trust_remote_code}
    part = "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model, **options)
        part = "model"
        model, loading = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=getattr(torch, args.dtype), output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(f"--model {args.model}: its {part} could not be loaded: {first_line(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"--model {args.model}: {len(missing)} of its weights are missing ({missing[0]}, ...) and would be random; "
            "give a complete checkpoint of a causal language model."
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"--model {args.model}: its tokenizer has {len(tokenizer)} tokens, its embedding {vocabulary}: they do not "
            "belong together."
        )
    return model.to(args.device), tokenizer


def best_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def progress_on(bar: tqdm, protocols: tuple[str, ...]):
    """A callback that moves the bar by rows and shows each protocol's acc_norm so far (long rows come first)."""
    so_far = count_correct([], protocols)

    def on_progress(finished):
        for protocol, count in count_correct(finished, protocols).items():
            for name in count:
                so_far[protocol][name] += count[name]
        shown = {p: f"{count['correct_norm'] / max(count['rows'], 1):.4f}" for p, count in so_far.items()}
        bar.set_postfix(shown, refresh=False)
        bar.update(so_far[protocols[0]]["rows"] - bar.n)

    return on_progress


def print_table(report: dict) -> None:
    """The measured numbers with their 95 % intervals, then the published ones they compare with."""
    print(f"\n{report['model']} on {report['data']}: {report['seconds']:.0f} s, with 95 % intervals (Wilson)")
    print(f"{'protocol':12}{'acc':>8}{'':18}{'acc_norm':>8}{'':18}{'rows':>8}")
    for protocol, result in report["results"].items():
        cells = ""
        for name in ("acc", "acc_norm"):
            low, high = result[f"{name}_interval"]
            cells += f"{result[name]:8.4f} [{low:.4f}, {high:.4f}]"
        print(f"{protocol:12}{cells}{result['rows']:>8}")
    print("\npublished, on all 10,042 rows; compare within a protocol only")
    for model, protocol, acc, acc_norm, source in BASELINES:
        if protocol in report["results"]:
            print(f"{protocol:12}{'' if acc is None else f'{acc:.4f}':>8}{acc_norm:26.4f}   {model}, {source}")
    rows = max(result["rows"] for result in report["results"].values())
    if rows != OFFICIAL_ROWS or report["data_sha256"] not in (None, OFFICIAL_SHA256):
        print(f"These {rows} rows are not the official {OFFICIAL_ROWS}: the published numbers are no measure for them.")


def sha256_of(path: str) -> str | None:
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def write_json(report: dict, path: str) -> None:
    """Whole or not at all: written aside, then renamed."""
    aside = f"{path}.partial"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(report, file, indent=2)
        file.write("\n")
    os.replace(aside, path)


def first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


if __name__ == "__main__":
    main()
