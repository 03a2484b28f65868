"""Toy runs of train_accelerate.py, in this process or in others: data, flags, and the values that a run logged."""

import gc
import io
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

from patience import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "train_accelerate.py"
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 32, "seed": 11}
STEPS = 30
WEIGHTS = "model/model.safetensors"  # of a finished run
SEQUENCES_PER_STEP = 8
TOKENS_PER_STEP = SEQUENCES_PER_STEP * SHAPE["block_size"]
RECIPE = {
    **SHAPE,
    "train_tokens": STEPS * TOKENS_PER_STEP,
    "tokens_per_step": TOKENS_PER_STEP,
    "warmup_tokens": 5 * TOKENS_PER_STEP,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "eval_tokens": 320,
    "eval_steps": 10,
    "save_steps": 10,
    "logging_steps": 1,
    "sample_tokens": 5,
    "num_samples": 2,
}


def make_shards(folder: Path) -> Path:
    """A few thousand tokens of made-up prose, prepared with a tokenizer of 300 ids, in several shards."""
    from modeling_gpt2repro.data.prepare.local import prepare_shards
    from modeling_gpt2repro.data.sources.resolve import local_source
    from modeling_gpt2repro.data.tokenizer import train_tokenizer

    words = ["the", "a", "cat", "dog", "tree", "house", "sees", "runs", "under", "over", "big", "small", "and", "then"]
    draw = random.Random(0)
    texts = [" ".join(draw.choices(words, k=60)) + "." for _ in range(80)]
    (folder / "prose.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = train_tokenizer(texts, 300)
    source = local_source([str(folder / "prose.jsonl")])
    prepare_shards(source, tokenizer, "toy", folder / "tokens", validation_share=0.3, shard_tokens=1500)
    examples = [
        {
            "ind": i,
            "activity_label": "Seeing",
            "ctx_a": "the cat sees.",
            "ctx_b": "the dog",
            "ctx": "the cat sees. the dog",
            "endings": [" ".join(draw.choices(words, k=3 + choice)) + "." for choice in range(4)],
            "label": i % 4,
        }
        for i in range(7)
    ]
    (folder / "hellaswag.jsonl").write_text("\n".join(map(json.dumps, examples)))
    return folder / "tokens"


def as_flags(recipe: dict) -> list[str]:
    """{"seed": 1} -> ["--seed", "1"]."""
    return [word for name, value in recipe.items() for word in (f"--{name}", str(value))]


def toy_flags(output_dir: Path, shards: Path | str | None, **overrides) -> list[str]:
    """The command line of a toy run; shards may be an address, and without them the overrides must name its data."""
    data = {"hellaswag": shards.parent / "hellaswag.jsonl" if isinstance(shards, Path) else "none"}
    data |= {"shards": shards} if shards else {}
    return as_flags({**data, "output_dir": output_dir, **RECIPE, **overrides})


CPU_FP32 = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}


def train(
    output_dir: Path,
    shards: Path,
    processes: int = 1,
    environment: dict[str, str] = CPU_FP32,
    **overrides,
) -> subprocess.CompletedProcess:
    """Run the script as people do, in fresh processes; by `environment` in fp32 on the CPU with one thread."""
    launcher = [sys.executable]
    if processes > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*launcher, str(SCRIPT), *toy_flags(output_dir, shards, **overrides)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )


def logged_values(output_dir: Path, name: str = "loss") -> list[float]:
    """The values of `name` in a run's metrics.jsonl, in order; None for NaN."""
    from modeling_gpt2repro.runs.read import read_metrics

    return [record[name] for record in read_metrics(output_dir) if name in record]


def train_here(output_dir: Path, shards: Path, **overrides) -> int:
    """Run the script in this process, in fp32, which saves seconds of imports; returns the exit code."""
    return run_here(toy_flags(output_dir, shards, **overrides))


def run_here(flags: list[str]) -> int:
    """The same with flags of any kind; plots are drawn small and without a layout, else they take half the time."""
    import train_accelerate
    from modeling_gpt2repro.runs import plots

    before = {name: os.environ.get(name) for name in CPU_FP32}
    os.environ.update(CPU_FP32)
    gc.freeze()  # the script looks for garbage twice, and need not search all that the tests have imported
    try:
        with patch.object(plots, "figure_bytes", _draw_small):
            train_accelerate.main(flags)
    except SystemExit as end:
        if isinstance(end.code, str):  # as the interpreter does
            print(end.code, file=sys.stderr)
            return 1
        return end.code
    finally:
        gc.unfreeze()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return 0


def _draw_small(figure, format: str, dpi: int) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # late, as the training does

    content = io.BytesIO()
    figure.set_layout_engine("none")
    figure.dpi = dpi / 5
    FigureCanvasAgg(figure).print_png(content)
    return content.getvalue()


def at_step(monkeypatch, step: int, action: Callable):
    """Call `action(take_step, model)` in place of the training step with this number."""
    import train_accelerate

    original = train_accelerate.train_step
    numbers = itertools.count(1)

    def step_or_action(accelerator, model, *others, **limits):
        def take_step():
            return original(accelerator, model, *others, **limits)

        return action(take_step, model) if next(numbers) == step else take_step()

    monkeypatch.setattr(train_accelerate, "train_step", step_or_action)


def send_signal(number: int) -> Callable:
    """An action for `at_step`: this process gets the signal, then takes the step."""

    def action(take_step, model):
        os.kill(os.getpid(), number)
        return take_step()

    return action
