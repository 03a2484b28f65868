"""Compare a run that is killed again and again with one that never was: losses and weights must be equal in every bit.

    python -m benchmarks.kill_resume                 # quickstart's model and data, 20 kills; minutes
    python -m benchmarks.kill_resume --kills 4 --steps 60

The run is started by `--resume_from_checkpoint latest` each time and killed by SIGKILL: in turn after a random time of
training, while a checkpoint is being written (its folder `.step-NNNNNN.partial` exists), and at a random moment after
the start, which may be before the first step. Checkpoints come every few steps, so that many are being written.
"""

import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import add_to_file, result_header
from modeling_gpt2repro.runs.read import read_metrics
from modeling_gpt2repro.runtime.command_line import arg, check_limits, parse_command_line
from modeling_gpt2repro.training.checkpoints import find_checkpoints

ROOT = Path(__file__).resolve().parents[1]
SAVE_STEPS = 10


@dataclass
class BenchmarkArguments:
    kills: int = arg(default=20, minimum=0, help="How often the run is killed.")
    steps: int = arg(default=1400, minimum=1, help="Its length; the kills must fit in.")
    seed: int = arg(default=0, help="Seed of the moments of the kills.")
    output: str | None = arg(default=None, help="Add the result to this JSON file (a list of results).")

    def __post_init__(self):
        if problems := list(check_limits(self)):
            raise ValueError("\n".join(problems))


@dataclass
class Attempts:
    """What the kills hit, the checkpoints that were left, and the steps that they cost."""

    hit: Counter = field(default_factory=Counter)
    resumed_from: list[int] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)


def command(output_dir: Path, steps: int) -> list[str]:
    """The quickstart, `steps` long."""
    flags = {
        "preset": "quickstart",
        "output_dir": output_dir,
        "train_tokens": steps * 1792,
        "warmup_tokens": 20 * 1792,
        "eval_steps": 0,
        "save_steps": SAVE_STEPS,
        "save_total_limit": 3,
        "resume_from_checkpoint": "latest",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "train_accelerate.py"), *words]


def environment() -> dict[str, str]:
    """As accelerate_configs/cpu.yaml sets it."""
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "bf16"}


def logged_step(output_dir: Path) -> int:
    """The last step in metrics.jsonl; 0 if there is none."""
    return max((record["step"] for record in read_metrics(output_dir)), default=0)


def run_to_end(output_dir: Path, steps: int):
    subprocess.run(command(output_dir, steps), env=environment(), stdout=subprocess.DEVNULL, check=True)


def kill_once(output_dir: Path, steps: int, generator: random.Random, moment: str, attempts: Attempts) -> bool:
    """Start the run, kill it at a random moment, record what was hit; False if it finished before."""
    before = logged_step(output_dir)
    process = subprocess.Popen(command(output_dir, steps), env=environment(), stdout=subprocess.DEVNULL)
    if moment == "start":
        time.sleep(generator.uniform(0.0, 8.0))
    else:
        while logged_step(output_dir) < min(before + 2, steps) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 1.5))
    if moment == "write":
        while not list(output_dir.glob(".step-*.partial")) and process.poll() is None:
            pass
        time.sleep(generator.uniform(0.0, 0.02))  # a write of this size takes about as long
    if process.poll() is not None:
        return False
    process.kill()
    process.wait()
    found = find_checkpoints(output_dir)
    newest = int(found[-1].name.removeprefix("step-")) if found else 0
    half_written = bool(list(output_dir.glob(".step-*")) or list(output_dir.glob(".model*")))
    hit = "a checkpoint half-written" if half_written else "training"
    if logged_step(output_dir) == before:  # what is half-written may be left from the previous kill
        hit = "starting"
    attempts.hit[hit] += 1
    attempts.resumed_from.append(newest)
    attempts.lost_steps.append(logged_step(output_dir) - newest)
    return True


def differences(one: Path, other: Path) -> list[str]:
    """The metrics and files in which two finished runs differ in any bit."""
    found = []
    for name in ("loss", "grad_norm", "learning_rate", "validation_loss"):
        a = [(record["step"], record[name]) for record in read_metrics(one) if name in record]
        b = [(record["step"], record[name]) for record in read_metrics(other) if name in record]
        # An evaluation is repeated, and logged again, if the kill came between it and the next checkpoint.
        if dict(a) != dict(b) or (len(a) != len(b) and name != "validation_loss"):
            found.append(name)
    last = find_checkpoints(one)[-1].name
    files = ["model/model.safetensors", f"{last}/training_state/optimizer.safetensors"]
    files += [f"{last}/training_state/random.safetensors"]
    found += [name for name in files if (one / name).read_bytes() != (other / name).read_bytes()]
    return found


def main(argv: list[str] | None = None):
    """Train twice, kill one of the runs, compare them, print and write the result."""
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    header = result_header("kill_resume", argv, args, ("torch", "transformers", "accelerate"))
    generator = random.Random(args.seed)
    attempts = Attempts()
    with tempfile.TemporaryDirectory() as folder:
        never_killed = Path(folder) / "never_killed"
        killed = Path(folder) / "killed"
        print(f"a run of {args.steps} steps that is never killed ...", flush=True)
        run_to_end(never_killed, args.steps)
        killed.mkdir()
        shutil.copytree(never_killed / "data", killed / "data")  # prepared once; equal losses show equal data
        for number in range(args.kills):
            moment = ("training", "write", "start")[number % 3]
            if not kill_once(killed, args.steps, generator, moment, attempts):
                raise SystemExit(f"the run finished after {number} kills: give more --steps than {args.steps}.")
            print(
                f"kill {number + 1:>2}: {dict(attempts.hit)}, at step {logged_step(killed)}, resumes from step "
                f"{attempts.resumed_from[-1]}",
                flush=True,
            )
        run_to_end(killed, args.steps)
        different = differences(never_killed, killed)
    result = header | {
        "kills": args.kills,
        "steps": args.steps,
        "hit": dict(attempts.hit),
        "lost_steps": attempts.lost_steps,
        "different": different,
        "equal_bit_for_bit": not different,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9,  # kilobytes on Linux
    }
    print(json.dumps(result, indent=1))
    if args.output:
        add_to_file(Path(args.output), result)
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
