"""examples/ablations.py: the correct run is the product's, and each mistake shows where the page says it does."""

import importlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from steps import accelerator_for
from toy_runs import ROOT

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.batches.sequences import TokenSequences
from modeling_gpt2repro.data.batches.shuffled import BatchConfig, ShuffledBatches
from modeling_gpt2repro.runtime.loss import ModelWithLoss
from modeling_gpt2repro.training.optimization import build_optimizer, learning_rate_at, set_learning_rate
from modeling_gpt2repro.training.outliers import OutlierDetector
from train_accelerate import train_step

STEPS = 5
TOY = {"T": 32, "VALIDATION_TOKENS": 256, "DEEP": 12, "WARMUP_SHARE": 0.4, "BAD_BATCH": 0.6}
RANKS = f"""
import os, sys
rank = int(os.environ.pop("RANK"))
for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
    del os.environ[name]
sys.path.insert(0, {str(ROOT / "examples")!r})
import ablations, json
from pathlib import Path
vars(ablations).update({TOY!r})
shards, meeting = map(Path, sys.argv[1:])
runs = [ablations.Run(wrong, 1, processes=2) for wrong in (None, "sync")]
print(json.dumps([ablations.train(run, rank, {STEPS}, shards, meeting) for run in runs]))
"""


@pytest.fixture(scope="module")
def ablations():
    """The example at toy size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        module = importlib.import_module("ablations")
        for name, value in TOY.items():
            patch.setattr(module, name, value)
        yield module


@pytest.fixture(scope="module")
def record_of(ablations, token_shards, tmp_path_factory):
    """record_of(wrong) -> what a toy run with the mistake recorded, and what its optimizer saw; trained once."""
    records = {}

    def trained(wrong: str | None, bad_batch: bool = False) -> dict:
        run = ablations.Run(wrong, 1, bad_batch=bad_batch)
        if run not in records:
            seen = []  # by each step of the optimizer: its learning rate, and the norm of the gradients

            def build(model, learning_rate):
                optimizer = build_optimizer(model, learning_rate)
                optimizer.register_step_pre_hook(lambda *_: seen.append((optimizer.param_groups[0]["lr"], norm(model))))
                return optimizer

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(ablations, "build_optimizer", build)
                records[run] = ablations.train(run, None, STEPS, token_shards.folder, tmp_path_factory.mktemp("m"))
            records[run]["rates"], records[run]["used_norm"] = zip(*seen, strict=True)
        return records[run]

    return trained


def norm(model: torch.nn.Module) -> float:
    return math.sqrt(sum((parameter.grad**2).sum().item() for parameter in model.parameters()))


def test_the_correct_run_takes_the_steps_of_the_training_script(record_of, token_shards):
    accelerator = accelerator_for(4)
    torch.manual_seed(1)
    shape = {"n_layer": 4, "n_head": 2, "n_embd": 64, "n_positions": 32, "vocab_size": len(token_shards.tokenizer)}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, initializer_range=0.05, bos_token_id=0, eos_token_id=0))
    model, optimizer = accelerator.prepare(ModelWithLoss(model), build_optimizer(model, 1e-2))
    batches = ShuffledBatches(TokenSequences(token_shards.shards("train"), 32), BatchConfig(32, 4, 1, seed=1))
    detector = OutlierDetector(torch.device("cpu"))
    expected = []
    for step in range(STEPS):
        set_learning_rate(optimizer, learning_rate_at(step, STEPS, 2, 1e-2, 0.1))
        options = {"tokens_per_step": 128, "max_grad_norm": 1.0, "detector": detector}
        metrics = train_step(accelerator, model, optimizer, batches.micro_batches(step), **options)
        expected.append((metrics.loss.item(), metrics.grad_norm.item()))
    record = record_of(None)
    assert list(zip(record["loss"], record["grad_norm"], strict=True)) == pytest.approx(np.array(expected), rel=1e-6)


def test_without_warm_up_the_first_steps_are_larger(record_of):
    wrong, correct = record_of("warm-up"), record_of(None)
    assert wrong["loss"][0] == correct["loss"][0]
    assert wrong["loss"][1] != pytest.approx(correct["loss"][1], abs=0.05)
    assert (wrong["rates"][0], correct["rates"][0]) == (0.01, 0.005)  # of two steps of warm-up


def test_without_residual_scaling_activations_grow_with_depth(ablations, record_of):
    correct, wrong = record_of(None)["spread"], record_of("residual-scaling")["spread"]
    assert len(correct) == ablations.DEEP
    assert wrong[-1] / correct[-1] == pytest.approx(math.sqrt(2 * ablations.DEEP), rel=0.3)  # two outputs of each block
    assert wrong[-1] > 2 * wrong[0]


def test_an_untied_head_adds_a_matrix(ablations, record_of, token_shards):
    more = record_of("tying")["parameters"] - record_of(None)["parameters"]
    assert more == len(token_shards.tokenizer) * ablations.SHAPE["n_embd"]


def test_undivided_gradients_are_as_many_times_as_large_as_there_are_micro_batches(record_of):
    wrong, correct = record_of("division"), record_of(None)
    assert wrong["grad_norm"][0] == pytest.approx(4 * correct["grad_norm"][0], rel=1e-5)
    assert wrong["loss"][:2] == pytest.approx(correct["loss"][:2], rel=1e-4)  # Adam divides by the gradient's size


def test_gradients_that_are_not_set_to_zero_add_up(record_of):
    wrong, correct = record_of("zero-grad"), record_of(None)
    assert wrong["grad_norm"][0] == correct["grad_norm"][0]
    assert wrong["loss"][:2] == pytest.approx(correct["loss"][:2], rel=1e-4)  # so far the weights are equal
    # The first gradient, which was clipped to norm 1, is still there, and the second one does not point against it.
    assert correct["grad_norm"][1] < wrong["grad_norm"][1] <= correct["grad_norm"][1] + 1.0


def test_unshifted_targets_are_learned_and_the_language_is_not(record_of):
    wrong, correct = record_of("shift"), record_of(None)
    assert wrong["loss"][-1] < correct["loss"][-1] - 0.2
    assert wrong["validation_loss"] > correct["validation_loss"] + 0.2


def test_large_gradients_are_scaled_down_unless_clipping_is_forgotten(record_of):
    clipped, wrong = record_of(None, bad_batch=True), record_of("clipping", bad_batch=True)
    bad = 3  # after 60 % of five steps
    assert clipped["loss"][:bad] == record_of(None)["loss"][:bad]
    assert clipped["grad_norm"][bad] > 1.3 * record_of(None)["grad_norm"][bad]
    assert max(clipped["used_norm"]) <= 1.0001 < 2 < max(clipped["grad_norm"])
    assert wrong["used_norm"] == pytest.approx(wrong["grad_norm"], rel=1e-5)


def test_two_processes_stay_equal_only_if_their_last_gradients_are_synced(
    warm_python, token_shards, tmp_path, record_of
):
    ended = warm_python.run_together(2, "-c", RANKS, token_shards.folder, tmp_path)
    correct, wrong = json.loads(ended[0].stdout)
    assert json.loads(ended[1].stdout) == [None, None]
    assert correct["loss"] == pytest.approx(record_of(None)["loss"], abs=1e-4)
    assert correct["distance"] == [0.0] * STEPS
    assert wrong["loss"][0] == correct["loss"][0]
    assert min(wrong["distance"]) > 1e-3
    assert wrong["distance"][-1] > wrong["distance"][0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "dropout"], r"only \(dropout\) must be of warm-up, residual-scaling"),
        (["--steps", "5"], r"steps \(5\) must be at least 10"),
        (["--seeds", "0"], r"seeds \(0\) must be at least 1"),
        (["--shards", "nowhere"], r"nowhere"),
        (["--output_dir", "file"], r"output_dir \(file\)"),
        (["--output_dir", "damaged"], r"damaged.results.json is damaged \(.*\): delete it, or give another"),
    ],
)
def test_what_cannot_be_is_refused_in_one_sentence(ablations, token_shards, flags, message, capsys):
    Path("file").touch()
    Path("damaged").mkdir()
    Path("damaged", "results.json").write_text('{"runs": {')
    data = [] if "--shards" in flags else ["--shards", str(token_shards.folder)]
    with pytest.raises(SystemExit) as error:
        ablations.main([*flags, *data])
    assert error.value.code == 2
    printed = capsys.readouterr().err.strip()
    assert re.search(message, printed)
    assert "\n" not in printed


@pytest.fixture
def untrained(ablations, monkeypatch):
    """The runs that a command asked for, with records that are made up; set `stop_after` to interrupt it."""

    class Asked(list):
        stop_after = math.inf

    asked = Asked()

    def train_all(runs, steps, shards):
        for run in runs:
            if len(asked) == asked.stop_after:
                raise KeyboardInterrupt
            asked.append(run)
            level = (4.0 if run.wrong else 3.0) + 0.1 * run.seed
            series = dict.fromkeys(("loss", "grad_norm", "distance", "spread"), [level] * steps)
            yield run, {**series, "parameters": 1000, "validation_loss": 2 * level}

    monkeypatch.setattr(ablations, "train_all", train_all)
    return asked


def test_an_interrupted_command_continues_with_what_is_missing(ablations, untrained, token_shards, capsys):
    command = ["--shards", str(token_shards.folder), "--output_dir", "out", "--seeds", "2", "--steps", "10"]
    few = ["--only", "warm-up", "clipping", "sync"]
    untrained.stop_after = 5
    with pytest.raises(SystemExit, match="the same command continues"):
        ablations.main([*command, *few])
    assert len(json.loads(Path("out/results.json").read_text())["runs"]) == 5
    untrained.stop_after = math.inf
    ablations.main([*command, *few])
    assert len(untrained) == len(set(untrained)) == 2 * 3 * 2
    row = "| `warm-up` | training loss at the end | 3.150 ± 0.071 | 4.150 ± 0.071 | 6.300 ± 0.141 | 8.300 ± 0.141 |"
    assert row in capsys.readouterr().out
    assert Path("out/ablations.png").read_bytes().startswith(b"\x89PNG")
    ablations.main([*command, "--only", "sync", "tying"])
    assert [run.wrong for run in untrained[12:]] == ["tying", "tying"]  # nothing else is missing
    with pytest.raises(SystemExit):
        ablations.main([*command[:-1], "20"])
    assert re.search(r"holds runs with steps 10, not 20: give another --output_dir\.", capsys.readouterr().err)


def test_the_page_has_the_table_of_its_results(ablations):
    results = json.loads((ROOT / "benchmarks" / "results" / "ablations_cpu.json").read_text())
    written = (ROOT / "docs" / "ablations.md").read_text(encoding="utf-8")
    assert ablations.table(results, list(ablations.MISTAKES)) in written


@pytest.mark.slow
def test_a_whole_command(token_shards):
    command = [sys.executable, ROOT / "examples" / "ablations.py", "--shards", token_shards.folder, "--steps", "10"]
    ended = subprocess.run([*command, "--seeds", "1"], capture_output=True, text=True, check=True)
    assert "11 of 11 runs, 0 s left" in ended.stdout
    runs = json.loads(Path("runs/ablations/results.json").read_text())["runs"]
    assert len(runs) == 7 + 2 + 2
    assert Path("runs/ablations/ablations.png").exists()
