"""Train GPT-2 124M with `train_accelerate.py` on generated tokens: tokens a second, MFU, and a loss that must fall.

    python -m benchmarks.training_run                                  # 140 steps of 524,288 tokens, bf16, on a GPU
    python -m benchmarks.training_run --steps 30 --precision fp16
    python -m benchmarks.training_run --shape toy --steps 30 --device cpu --precision no

The script runs in a process of its own, as people run it, with evaluations, samples and a final model. After
`--stop_after` seconds it is asked to stop, as by Slurm, and what it has logged until then is the result.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks import generated_data
from benchmarks.harness import add_to_file, machine_name, result_header
from benchmarks.training_step import SHAPES
from modeling_gpt2repro.runs.read import read_metrics
from modeling_gpt2repro.runtime.command_line import arg, check_limits, parse_command_line
from modeling_gpt2repro.runtime.signals import EXIT_CODE
from modeling_gpt2repro.storage.json_files import read_json_object

ROOT = Path(__file__).resolve().parents[1]
TOKENS_PER_STEP = {"124m": 524_288, "tiny": 8_192, "toy": 512}
BATCH_ROWS = {"124m": 32, "tiny": 8, "toy": 4}
LEARNING_RATES = {"124m": 6e-4, "tiny": 1e-3, "toy": 1e-2}
WARMUP_STEPS = 10  # not timed: they compile and make the first allocations
SMALLEST_FALL = 0.5  # nats; from the 10.8 of fresh weights, 30 steps of 124M are enough for it


@dataclass
class RunArguments:
    shape: str = arg(default="124m", choices=TOKENS_PER_STEP, help="124m: GPT-2; toy: two layers, 64 wide.")
    steps: int = arg(default=140, minimum=WARMUP_STEPS + 2, help="Optimizer steps.")
    stop_after: float = arg(default=600.0, above=0, help="Ask the run to stop after so many seconds.")
    precision: Literal["bf16", "fp16", "no"] = arg(default="bf16", help="Mixed precision of accelerate launch.")
    attn_implementation: str | None = arg(default=None, help="Attention; if not given, train_accelerate.py's default.")
    compile: bool | None = arg(default=None, help="Compile; if not given, on a GPU.")
    deterministic: bool | None = arg(default=None, help="The same bits each time; if not given, on a CPU.")
    batch_rows: int | None = arg(default=None, minimum=1, help="Sequences of a micro-batch; if not given, by shape.")
    device: Literal["auto", "cpu", "cuda"] = arg(default="auto", help="auto: CUDA if there is a GPU.")
    data: str = arg(default="build/generated", help="Folder of benchmarks.generated_data, made if it is not there.")
    runs_dir: str = arg(default="build/runs", help="Folder for the run's own folder.")
    output: str | None = arg(default=None, help="Add the result to this JSON file (a list of results).")

    def __post_init__(self):
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        problems = list(check_limits(self))
        if self.device == "cuda" and not torch.cuda.is_available():
            problems.append("--device cuda cannot be used here: torch sees no GPU; give cpu.")
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def run_dir(self) -> Path:
        """One folder for each setting."""
        given = {"attn": self.attn_implementation, "compile": self.compile, "deterministic": self.deterministic}
        parts = [f"{name}-{value}" for name, value in given.items() if value is not None]
        return Path(self.runs_dir) / "_".join([self.shape, self.precision, *parts])


def main(argv: list[str] | None = None):
    args = parse_command_line(RunArguments, argv, description=__doc__)
    header = result_header("training_run", argv, args, ("torch", "transformers", "accelerate"), device=args.device)
    made = ["--output_dir", args.data, "--shape", args.shape, "--tokens", str(20 * TOKENS_PER_STEP[args.shape])]
    generated_data.main(made)
    shutil.rmtree(args.run_dir, ignore_errors=True)
    process = subprocess.Popen(command(args), cwd=ROOT, env=environment(args))
    try:
        exit_code = process.wait(args.stop_after)
    except subprocess.TimeoutExpired:
        process.terminate()
        exit_code = process.wait()
    if exit_code not in (0, EXIT_CODE):
        sys.exit(exit_code)
    records = [record for record in read_metrics(args.run_dir) if "loss" in record]
    result = header | {"stopped": exit_code == EXIT_CODE, **summary(records)}
    run_record = read_json_object(args.run_dir / "run.json", any_numbers=True)
    result |= {"hardware": run_record["hardware"]} if "hardware" in run_record else {}
    if args.output:
        add_to_file(Path(args.output), result)
    report(args, result)
    if result["first_loss"] - result["last_loss"] < SMALLEST_FALL:
        sys.exit(f"the loss did not fall by {SMALLEST_FALL} from {result['first_loss']:.4f}: training is broken.")


def command(args: RunArguments) -> list[str]:
    """The script's command line: the lecture's recipe in the number of steps, evaluated before and after."""
    tokens_per_step = TOKENS_PER_STEP[args.shape]
    shape = SHAPES[args.shape]
    flags = {
        "output_dir": args.run_dir,
        "shards": Path(args.data) / "shards",
        "hellaswag": "none",
        "n_layer": shape["n_layer"],
        "n_head": shape["n_head"],
        "n_embd": shape["n_embd"],
        "block_size": shape["n_positions"],
        "train_tokens": args.steps * tokens_per_step,
        "tokens_per_step": tokens_per_step,
        "warmup_tokens": WARMUP_STEPS * tokens_per_step,
        "learning_rate": LEARNING_RATES[args.shape],
        "per_device_train_batch_size": args.batch_rows or BATCH_ROWS[args.shape],
        "eval_tokens": 2 * tokens_per_step,
        "eval_steps": 0,
        "save_steps": 0,
        "num_samples": 1,
        "attn_implementation": args.attn_implementation,
        "torch_compile": args.compile,
        "deterministic": args.deterministic,
    }
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "train_accelerate.py"), *words]


def environment(args: RunArguments) -> dict[str, str]:
    """As accelerate launch sets it."""
    use_cpu = str(args.device == "cpu").lower()
    return {**os.environ, "ACCELERATE_USE_CPU": use_cpu, "ACCELERATE_MIXED_PRECISION": args.precision}


def summary(records: list[dict]) -> dict[str, Any]:
    """Losses, and medians over the steps after the first ones.

    Raises:
        ValueError: If there are none.
    """
    timed = [record for record in records if record["step"] > WARMUP_STEPS]
    if not timed:
        raise ValueError(
            f"the run logged {len(records)} steps, of which {WARMUP_STEPS} are not timed: give it more time."
        )
    medians = {
        name: float(np.median([record[name] for record in timed]))
        for name in ("step_seconds", "tokens_per_second", "mfu", "data_seconds")
        if name in timed[0]
    }
    return {
        "steps": records[-1]["step"],
        "first_loss": records[0]["loss"],
        "last_loss": records[-1]["loss"],
        "losses": [record["loss"] for record in records if record["step"] % 10 == 0],
        "skipped_steps": sum(record.get("skipped", False) for record in records),
        "first_steps_seconds": sum(record["step_seconds"] for record in records[:WARMUP_STEPS]),
        "peak_memory_gb": records[-1]["peak_memory_gb"],
        **medians,
    }


def report(args: RunArguments, result: dict[str, Any]):
    """Print the result in one sentence."""
    speed = f"{result['tokens_per_second']:,.0f} tokens/s" + (f", MFU {result['mfu']:.1%}" if "mfu" in result else "")
    print(
        f"{args.shape}, {args.precision}, {machine_name(result['machine'])}: {speed}, "
        f"{result['peak_memory_gb']:.1f} GB; loss {result['first_loss']:.4f} -> {result['last_loss']:.4f} in "
        f"{result['steps']} steps"
    )


if __name__ == "__main__":
    main()
