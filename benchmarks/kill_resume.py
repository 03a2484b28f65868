"""A run that is killed again and again against one that never was: the same losses, rows and weights, bit for bit?

    python -m benchmarks.kill_resume                 # quickstart's model and data, 20 kills; minutes
    python -m benchmarks.kill_resume --kills 4 --steps 60

The run is started by `--resume_from_checkpoint latest` each time and killed by SIGKILL: in turn after a random time of
training, while a checkpoint is being written (its folder `.step-NNNNNN.partial` is there), and at a random moment after
the start, which may be before the first step. Checkpoints come every few steps, so that many are being written.
"""

import argparse
import json
import os
import platform
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

import torch

from modeling_gpt2repro.runs.read import read_metrics
from modeling_gpt2repro.training.checkpoints import find_checkpoints

ROOT = Path(__file__).resolve().parents[1]
SAVE_STEPS = 10
RESULTS = Path(__file__).parent / "results" / "kill_resume_cpu.json"


@dataclass
class Attempts:
    """What the kills hit."""

    hit: Counter = field(default_factory=Counter)
    resumed_from: list[int] = field(default_factory=list)
    lost_steps: list[int] = field(default_factory=list)


def command(output_dir: Path, steps: int) -> list[str]:
    """The quickstart, `steps` long."""
    flags = {
        "preset": "quickstart",
        "output_dir": output_dir,
        "train_tokens": steps * 1024,
        "warmup_tokens": 20 * 1024,
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
    """The last step in the log."""
    return max((row["step"] for row in read_metrics(output_dir)), default=0)


def run_to_its_end(output_dir: Path, steps: int):
    """Train without a kill."""
    subprocess.run(command(output_dir, steps), env=environment(), stdout=subprocess.DEVNULL, check=True)


def kill_once(output_dir: Path, steps: int, draw: random.Random, moment: str, attempts: Attempts) -> bool:
    """Start, kill at a random moment, note what was hit; False if the run came to its end before."""
    before = logged_step(output_dir)
    process = subprocess.Popen(command(output_dir, steps), env=environment(), stdout=subprocess.DEVNULL)
    if moment == "start":
        time.sleep(draw.uniform(0.0, 8.0))
    else:
        while logged_step(output_dir) < min(before + 2, steps) and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0.0, 1.5))
    if moment == "write":
        while not list(output_dir.glob(".step-*.partial")) and process.poll() is None:
            pass
        time.sleep(draw.uniform(0.0, 0.02))  # a write of this size takes about so long
    if process.poll() is not None:
        return False
    process.kill()
    process.wait()
    found = find_checkpoints(output_dir)
    newest = int(found[-1].name.removeprefix("step-")) if found else 0
    half_written = bool(list(output_dir.glob(".step-*")) or list(output_dir.glob(".model*")))
    hit = "a checkpoint half-written" if half_written else "training"
    if logged_step(output_dir) == before:  # what is half-written may be of the kill before
        hit = "starting"
    attempts.hit[hit] += 1
    attempts.resumed_from.append(newest)
    attempts.lost_steps.append(logged_step(output_dir) - newest)
    return True


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs differ in; empty where all is the same, bit for bit."""
    found = []
    for name in ("loss", "grad_norm", "learning_rate", "validation_loss"):
        a, b = ([(row["step"], row[name]) for row in read_metrics(run) if name in row] for run in (one, other))
        if dict(a) != dict(b) or (len(a) != len(b) and name != "validation_loss"):
            found.append(name)
    last = find_checkpoints(one)[-1].name
    files = ["model/model.safetensors", f"{last}/training_state/optimizer.safetensors"]
    files += [f"{last}/training_state/random.safetensors"]
    found += [name for name in files if (one / name).read_bytes() != (other / name).read_bytes()]
    return found


def main(argv: list[str] | None = None):
    """Train twice, kill one of them, compare, print and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    draw, attempts = random.Random(args.seed), Attempts()
    with tempfile.TemporaryDirectory() as folder:
        never_killed, killed = Path(folder) / "never_killed", Path(folder) / "killed"
        print(f"a run of {args.steps} steps that is never killed ...", flush=True)
        run_to_its_end(never_killed, args.steps)
        killed.mkdir()
        shutil.copytree(never_killed / "data", killed / "data")  # prepared once; the rows are compared by their losses
        for number in range(args.kills):
            moment = ("training", "write", "start")[number % 3]
            if not kill_once(killed, args.steps, draw, moment, attempts):
                raise SystemExit(f"the run was over after {number} kills: give more --steps than {args.steps}.")
            print(
                f"kill {number + 1:>2}: {dict(attempts.hit)}, at step {logged_step(killed)}, goes on from step "
                f"{attempts.resumed_from[-1]}",
                flush=True,
            )
        run_to_its_end(killed, args.steps)
        different = differences(never_killed, killed)
    result = {
        "command": f"python -m benchmarks.kill_resume --kills {args.kills} --steps {args.steps} --seed {args.seed}",
        "kills": args.kills,
        "steps": args.steps,
        "hit": dict(attempts.hit),
        "lost_steps": attempts.lost_steps,
        "different": different,
        "equal_bit_for_bit": not different,
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    raise SystemExit(1 if different else 0)


if __name__ == "__main__":
    main()
