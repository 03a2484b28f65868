"""Train four small GPT-2s on stories for the same seconds, 2 or 4 layers with AdamW or Muon, and show what each writes.

    python -m benchmarks.first_model                 # 4 x 150 s of training on one thread, some 15 minutes in all
    python -m benchmarks.first_model --seconds 60    # sooner; file, picture and page are rewritten all the same

The runs come one after the other, each in its own process, on an otherwise idle machine: their seconds are compared. A
learning rate that falls to zero needs to know how many steps there will be, so each run is preceded by a few steps that
are timed. The results file, picture and lesson are written after each run, and the same command continues where it was
stopped. The lesson is docs/first-model.md.
"""

import json
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from benchmarks.harness import result_header
from benchmarks.kill_resume import ROOT, environment
from benchmarks.reports.first_model_page import draw, rewrite_page
from modeling_gpt2repro.data.sources.stories import Story
from modeling_gpt2repro.evaluation.stories import held_out_stories
from modeling_gpt2repro.runs.read import read_metrics, read_samples
from modeling_gpt2repro.runtime.command_line import arg, check_limits, parse_command_line
from modeling_gpt2repro.runtime.hardware import readable_duration
from modeling_gpt2repro.training.presets import PRESETS

PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
RUNS = [(n_layer, recipe) for n_layer in (2, 4) for recipe in ("lecture", "muon")]
QUICKSTART = PRESETS["quickstart"]
TOKENS_PER_STEP = QUICKSTART["tokens_per_step"]
EVALUATIONS = 20  # points of a curve, after the one at the start
TIMED_STEPS = 30
WARM_UP_STEPS = 10  # of them: the first allocate memory, and fill caches


@dataclass
class BenchmarkArguments:
    seconds: float = arg(default=150.0, above=0, help="Training steps of each run, in seconds.")
    threads: int = arg(default=1, minimum=1, help="Threads of each run.")
    train_flags: str = arg(default="", help='More flags for all runs, such as "--initializer_range 0.02".')
    runs_dir: str = arg(default="runs/first_model", help="Folder of the runs; replaces earlier ones.")
    output: str = arg(default="benchmarks/results/first_model_cpu.json", help="JSON file; replaces what is in it.")
    picture: str = arg(default="docs/images/first_model.png", help="Draw the results here.")
    page: str = arg(default="docs/first-model.md", help="Rewrite the results in this page; '' for none.")

    def __post_init__(self):
        if problems := list(check_limits(self)):
            raise ValueError("\n".join(problems))


@cache
def held_out_story() -> Story:
    """One that no model has seen, nor its hero with this animal and thing: all are to continue its title."""
    [story] = held_out_stories(QUICKSTART["validation_share"], count=1)
    return story


def prompt() -> str:
    return held_out_story().text.partition("\n")[0]


def steps_that_fit(step_seconds: Sequence[float], seconds: float) -> int:
    """How many steps take `seconds`, by the median of the timed ones after the warm-up; at least one."""
    return max(1, int(seconds / statistics.median(step_seconds[WARM_UP_STEPS:])))


def train(args: BenchmarkArguments, folder: Path, n_layer: int, recipe: str, steps: int, **flags: int):
    """The quickstart with so many layers and steps, in a process of its own.

    Raises:
        SystemExit: With the exit code of a training that has failed; it has said why.
    """
    flags = {
        "output_dir": folder,
        "n_layer": n_layer,
        "recipe": recipe,
        "train_tokens": steps * TOKENS_PER_STEP,
        "eval_tokens": 8 * TOKENS_PER_STEP,  # few: the stories are scored anyway
        "save_steps": 0,
        "num_samples": 1,
        "sample_prompts": prompt(),
        **flags,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "train_accelerate.py"), "--preset", "quickstart", *words]
    ended = subprocess.run(
        [*command, *shlex.split(args.train_flags)], env={**environment(), "OMP_NUM_THREADS": str(args.threads)}
    )
    if ended.returncode:
        raise SystemExit(ended.returncode)


def train_for_seconds(args: BenchmarkArguments, n_layer: int, recipe: str) -> dict:
    """Time a few steps, train as many as fit, and collect what the run has logged."""
    folder = Path(args.runs_dir) / f"{n_layer}-{recipe}"
    timing = folder.with_name(f"{folder.name}-timing")
    for earlier in (folder, timing):
        shutil.rmtree(earlier, ignore_errors=True)
    short = {"warmup_tokens": TOKENS_PER_STEP, "eval_steps": 0, "logging_steps": 1, "sample_tokens": 1}
    train(args, timing, n_layer, recipe, TIMED_STEPS, **short)
    timed = [record["step_seconds"] for record in read_metrics(timing) if "loss" in record]
    steps = steps_that_fit(timed, args.seconds)
    folder.mkdir()
    (timing / "data").rename(folder / "data")  # the same tokens: prepared once
    shutil.rmtree(timing)
    train(args, folder, n_layer, recipe, steps, eval_steps=max(1, steps // EVALUATIONS))
    return collect(folder)


def collect(folder: Path) -> dict:
    """The run's evaluations over its seconds of training, its last numbers, and the first sample of its model."""
    seconds = 0.0
    curve = []
    for record in read_metrics(folder):
        if "loss" in record:
            seconds += record["step_seconds"]
        elif "story_loss" in record:  # the only place that knows the scorer's names
            names = {"loss": "story_loss", "floor": "story_floor", "right": "story_mentions_right"}
            numbers = {ours: record[name] for ours, name in names.items()}
            curve.append({"step": record["step"], "seconds": seconds, **numbers})
            kinds = [name.split("_")[1] for name in record if name.endswith("_right") and name not in names.values()]
            by_kind = {kind: record[f"story_{kind}_right"] for kind in kinds}
    if not curve:
        raise SystemExit(f"{folder} has no scores of stories: is --block_size too short for them?")
    return {
        **curve[-1],
        "times_floor": curve[-1]["loss"] / curve[-1]["floor"],
        "right_by_kind": by_kind,
        "sample": read_samples(folder, prompt())[-1][1],
        "curve": curve,
    }


def results_of(file: Path, settings: dict) -> list[dict]:
    """The results in the file with these settings, in the order of RUNS."""
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    found = {run_of(result): result for result in results if settings.items() <= result["settings"].items()}
    return [found[run] for run in RUNS if run in found]


def run_of(result: dict) -> tuple[int, str]:
    return result["settings"]["n_layer"], result["settings"]["recipe"]


def write_results(file: Path, results: Sequence[dict]):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None, measure: Callable[..., dict] = train_for_seconds):
    """Train what is not in the results file yet; after each run write file, picture and page."""
    args = parse_command_line(BenchmarkArguments, argv, description=__doc__)
    torch.set_num_threads(args.threads)  # which the results name
    output = Path(args.output)
    story = {"story": held_out_story().text, "story_bits": held_out_story().bits}
    durations = []
    for number, run in enumerate(RUNS):
        n_layer, recipe = run
        header = result_header("first_model", argv, args, PACKAGES)
        results = results_of(output, header["settings"])
        if run not in map(run_of, results):
            each = statistics.mean(durations) if durations else args.seconds
            left = f"{'about' if durations else 'at least'} {readable_duration(each * (len(RUNS) - number))} left"
            print(f"run {number + 1} of {len(RUNS)}: {n_layer} layers, --recipe {recipe}; {left}", flush=True)
            started = time.perf_counter()
            try:
                measured = measure(args, n_layer, recipe)
            except KeyboardInterrupt:
                raise SystemExit("Stopped: the same command continues with the runs that are not finished.") from None
            durations.append(time.perf_counter() - started)
            settings = {**header["settings"], "n_layer": n_layer, "recipe": recipe}
            write_results(output, [*results, {**header, "settings": settings, **story, **measured}])
        results = results_of(output, header["settings"])
        draw(results, Path(args.picture))
        if args.page:
            rewrite_page(results, Path(args.page))
    for result in results:
        print(
            f"{result['settings']['n_layer']} layers, {result['settings']['recipe']}: {result['step']} steps in "
            f"{result['seconds']:.0f} s, {result['times_floor']:.2f} x the floor, {result['right']:.0%} right"
        )


if __name__ == "__main__":
    main()
