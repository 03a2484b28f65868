"""Model cards of runs that a test has written, and changes to such a run."""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from modeling_gpt2repro.data.tokenizer import train_tokenizer
from modeling_gpt2repro.hub.model_card import FROM_SCRATCH, Origin, card_files
from modeling_gpt2repro.training.arguments import TrainArguments

COMMIT = "5f0c" * 10


def write_run(folder: Path) -> Path:
    """A finished run with default arguments; every number occurs only once."""
    evaluation = {"step": 19073, "tokens": 9_999_220_736, "validation_loss": 3.25, "validation_perplexity": 25.79}
    evaluation |= {"validation_bits_per_byte": 0.9876, "validation_tokens": 10_485_760}
    for protocol, value in (("completion", 0.3001), ("lm_eval", 0.3155)):
        name = f"hellaswag_{protocol}_acc_norm"
        evaluation |= {name: value, f"{name}_low": value - 0.009, f"{name}_high": value + 0.009}
    earlier = {**evaluation, "step": 0, "tokens": 0, "validation_loss": 10.9}
    steps = [{"step": step, "tokens": step * 2**19, "loss": 4.0, "step_seconds": 1800.0} for step in (1, 2)]
    records = [earlier, *steps, evaluation]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "arguments": asdict(TrainArguments()),
        "data": {"data": "0123456789abcdef"},
        "hardware": {"device": "NVIDIA H100", "processes": 8, "precision": "bf16"},
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "commit": "c0ffee",
    }
    (folder / "run.json").write_text(json.dumps(config))
    baselines = {"completion": {"gpt2": 0.2955}, "lm-eval": {"gpt2": 0.3114}}
    (folder / "baselines.json").write_text(json.dumps({"hellaswag_baselines": baselines}))
    (folder / "loss.png").write_bytes(b"a picture")
    return folder


def change_record(run_folder: Path, **values):
    """Change values of run.json."""
    config = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({**config, **values}))


def change_arguments(run_folder: Path, **arguments):
    config = json.loads((run_folder / "run.json").read_text())
    change_record(run_folder, arguments=config["arguments"] | arguments)


def trained(first: int, last: int, seconds: float | None = None) -> str:
    """Lines of metrics.jsonl: training steps, all of them if their time is given, else the first and the last."""
    time = {} if seconds is None else {"step_seconds": seconds}
    steps = (first, last) if seconds is None else range(first, last + 1)
    return "".join(json.dumps({"step": step, "tokens": step * 2**19, "loss": 4.0, **time}) + "\n" for step in steps)


def resumed(step: int, **changed) -> str:
    """A line of metrics.jsonl."""
    return json.dumps({"step": step, "event": "resume", "changed": changed}) + "\n"


@cache
def small_tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["the cat sees the dog"], vocab_size=260)


def model_card(
    model: PreTrainedModel,
    origin: Origin = FROM_SCRATCH,
    run_folder: Path | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> str:
    """README.md."""
    return card_files(model, tokenizer or small_tokenizer(), origin, run_folder)["README.md"]
