"""Tokens that a recipe needs: statistics by hand, tuning, interrupted commands, and a whole command in two steps."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import recipes
from benchmarks.reports import recipes_report
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.training.optimization import scheduled_learning_rate

PAGE = "A page.\n<!-- written by python -m benchmarks.recipes -->\nold\n<!-- until here -->\nIts end.\n"


def test_tokens_to_the_loss_between_two_lengths_are_on_a_straight_line():
    shares = np.array([0.2, 0.4, 1.0])
    assert recipes_report.share_to_loss(shares, np.array([6.0, 5.0, 4.0]), 5.5) == pytest.approx(0.3)
    assert recipes_report.share_to_loss(shares, np.array([6.0, 5.0, 4.0]), 4.25) == pytest.approx(0.85)
    assert recipes_report.share_to_loss(shares, np.array([6.0, 5.0, 4.0]), 5.0) == pytest.approx(0.4)
    assert recipes_report.share_to_loss(shares, np.array([6.0, 5.0, 5.6]), 5.5) == pytest.approx(0.3)  # the first time
    assert recipes_report.share_to_loss(shares, np.array([6.0, 5.0, 4.0]), 3.9) == math.inf
    assert recipes_report.share_to_loss(shares, np.array([6.0, 5.0, 4.0]), 6.1) == 0.2


def test_the_interval_is_that_of_the_seeds():
    shares = np.array([0.2, 0.4])
    exact = recipes_report.share_interval(shares, np.array([[6.0, 6.0], [5.0, 5.0]]), np.array([5.5, 5.5]))
    assert exact == pytest.approx((0.3, 0.3))
    # Of two seeds a quarter of the draws have the first alone, and a quarter the second.
    losses = np.array([[6.0, 6.4], [5.0, 5.4]])
    assert recipes_report.share_interval(shares, losses, np.array([5.5, 5.5])) == pytest.approx((0.3, 0.38))
    # A seed that is bad for both is no difference between the two.
    assert recipes_report.share_interval(shares, losses, np.array([5.5, 5.9])) == pytest.approx((0.3, 0.3))


def test_the_deviation_is_within_groups_and_the_statistic_counts_standard_errors():
    groups = [np.array([1.0, 3.0]), np.array([10.0, 10.0, 13.0])]  # squares 2 and 6
    deviation, degrees = recipes_report.pooled_deviation(groups)
    assert (deviation, degrees) == (pytest.approx(math.sqrt(8 / 3)), 3)
    losses = np.array([4.0, 4.1, 3.9, 4.0])
    assert recipes_report.statistic(4.5, losses, 0.25) == pytest.approx(0.5 * 2 / 0.25)
    assert recipes_report.statistic(3.5, losses, 0.25) == pytest.approx(-4.0)


def made_loss(run: recipes.Run) -> float:
    """The best rate is above the first ones of lecture, and below those of muon, which needs 0.3 of the steps."""
    best = {"lecture": 8e-3, "fast-adamw": 2e-3, "muon": 2e-3}[run.recipe]
    off = 0.1 * math.log2(run.learning_rate / best) ** 2
    noise = {0: 0.0, 1: -0.001, 2: 0.0, 3: 0.001}[run.seed]
    return {"lecture": 5.0, "fast-adamw": 5.2, "muon": 4.3}[run.recipe] + (1 - run.steps / 100) + off + noise


@pytest.fixture
def command(tmp_path, token_shards, monkeypatch):
    """The flags of a command whose files are in `tmp_path`, on shards that are prepared already."""
    monkeypatch.setattr(recipes, "load_built_in_text", lambda *_: open_shards(token_shards.folder))
    monkeypatch.setattr(recipes_report, "BOOTSTRAP_SAMPLES", 100)
    (tmp_path / "page.md").write_text(PAGE)
    files = {"--output": "results/recipes.json", "--picture": "recipes.png", "--page": "page.md"}
    return [word for flag, name in files.items() for word in (flag, str(tmp_path / name))]


@pytest.fixture
def trained(monkeypatch):
    """The runs that were trained, with losses that are made up; set `stop_after` to interrupt the command."""

    class Trained(list):
        stop_after = math.inf

    runs = Trained()

    def train_run(run, args, folder):
        if len(runs) == runs.stop_after:
            raise KeyboardInterrupt
        runs.append(run)
        loss = made_loss(run)
        curve = [[0, 8.0], [run.steps * recipes.TOKENS_PER_STEP, loss]]
        return {**recipes.asdict(run), "loss": loss, "curve": curve, "cpu_seconds": 1.0}

    monkeypatch.setattr(recipes, "train_run", train_run)
    return runs


FLAGS = ["--steps", "100", "--seeds", "3", "--muon_shares", "0.2", "0.5", "--fast_adamw_shares", "0.5"]


def test_each_recipe_is_trained_with_the_rate_that_is_best_between_two_others(command, trained, tmp_path, capsys):
    recipes.main([*FLAGS, *command])
    tried = {
        name: sorted(r.learning_rate for r in trained if (r.recipe, r.seed) == (name, 0)) for name in recipes.RECIPES
    }
    assert tried["lecture"] == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    assert tried["fast-adamw"] == [1e-3, 2e-3, 4e-3]
    assert tried["muon"] == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    measured = sorted((r.recipe, r.learning_rate, r.steps, r.seed) for r in trained if r.seed)
    lengths = [("fast-adamw", 2e-3, 50), ("fast-adamw", 2e-3, 100), ("lecture", 8e-3, 100)]
    lengths += [("muon", 2e-3, 20), ("muon", 2e-3, 50), ("muon", 2e-3, 100)]
    assert measured == [(*length, seed) for length in lengths for seed in (1, 2, 3)]
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("A page.\n<!-- ")
    assert page.endswith("<!-- until here -->\nIts end.\n")
    assert "old" not in page
    # The lecture ends at 5.0; muon has 5.1 after a fifth and 4.8 after a half, so it needs 0.2 + 0.3 / 3. The deviation
    # of -.001, 0 and .001 is .001.
    assert "| `lecture` | 0.008 (of 0.001, 0.002, 0.004, 0.008, 0.016) | 1 | 5.000 ± 0.001 |  |" in page
    assert f"| 0.5 | 4.800 ± 0.001 | {0.2 * math.sqrt(3) / 0.001:.1f}: yes |" in page
    assert f"| 0.2 | 5.100 ± 0.001 | -{0.1 * math.sqrt(3) / 0.001:.1f}: no |" in page
    assert "- `muon`: 0.30 x the tokens of `lecture` (95 % interval: 0.30 to 0.30)." in page
    assert "- `fast-adamw`: more than 1 x the tokens" in page
    assert "deviates by 0.0010 nats, pooled over all rows (12 degrees" in page
    assert (tmp_path / "recipes.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert page.split("-->\n")[1].split("<!--")[0] in printed
    assert "0 min left" in printed


@pytest.mark.parametrize("stop_after", [2, 20])  # in tuning, and after it
def test_an_interrupted_command_continues_with_what_is_missing(command, trained, stop_after, tmp_path):
    output = tmp_path / "results" / "recipes.json"
    trained.stop_after = stop_after
    with pytest.raises(SystemExit, match="the same command continues"):
        recipes.main([*FLAGS, *command])
    assert len(json.loads(output.read_text())["runs"]) == stop_after
    assert "old" in (tmp_path / "page.md").read_text()
    trained.stop_after = math.inf
    recipes.main([*FLAGS, *command])
    assert len(trained) == len(set(trained)) == 13 + 18  # tuning, and 3 seeds of 6 lengths
    assert len(json.loads(output.read_text())["runs"]) == len(trained)
    recipes.main([*FLAGS, *command])
    assert len(trained) == 31  # nothing is missing
    recipes.main([*FLAGS, *command, "--muon_shares", "0.4"])
    assert [(run.recipe, run.steps) for run in trained[31:]] == [("muon", 40)] * 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--steps", "50", "--seeds", "3"], r"runs with other settings \(steps 100, not 50\): give another --output"),
        (["--recipes", "adam"], r"recipes \(adam\) must be of lecture, fast-adamw, muon"),
        (["--muon_shares", "1.2"], r"muon_shares \(1.2\) must be below 1, .*, and at least one of 480 steps"),
        (["--picture", "a.gif"], r"picture \(a.gif\) must end in .png or .svg"),
        (["--page", str(Path(__file__).parents[2] / "README.md")], r"README.md has no place for the table"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(command, trained, flags, message, tmp_path, capsys):
    recipes.main([*FLAGS, *command, "--tune"])
    before = (tmp_path / "results" / "recipes.json").read_text()
    with pytest.raises(SystemExit) as error:
        recipes.main([*command, *flags])
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert (tmp_path / "results" / "recipes.json").read_text() == before
    assert len(trained) == 13


def test_a_whole_command_in_two_steps(command, tmp_path, token_shards):
    flags = [
        "--steps",
        "2",
        "--seeds",
        "2",
        "--eval_tokens",
        "256",
        "--muon_shares",
        "0.5",
        "--fast_adamw_shares",
        "0.5",
    ]
    recipes.main([*flags, *command])
    results = json.loads((tmp_path / "results" / "recipes.json").read_text())
    assert results["commands"][0].startswith("python -m benchmarks.recipes --steps 2 --seeds 2")
    assert {"cpu", "threads", "system"} <= set(results["machine"])
    assert {"python", "torch"} <= set(results["versions"])
    first = {(run["recipe"], run["seed"]): run["curve"][0] for run in results["runs"]}
    for seed in (1, 2):  # a seed decides the weights, for all recipes alike
        assert first["lecture", seed] == first["fast-adamw", seed] == first["muon", seed]
        assert first["muon", seed][1] == pytest.approx(math.log(len(token_shards.tokenizer)), abs=0.3)
    assert first["muon", 1] != first["muon", 2]
    run = next(run for run in results["runs"] if run["recipe"] == "muon" and run["seed"] == 2)
    names = ("recipe", "learning_rate", "steps", "seed")
    args = recipes.BenchmarkArguments(steps=2, eval_tokens=256, muon_shares=[0.5], fast_adamw_shares=[0.5])
    repeated = recipes.train_run(recipes.Run(*(run[name] for name in names)), args, token_shards.folder)
    assert repeated["curve"] == run["curve"]  # in every bit


def test_a_run_is_what_the_recipe_of_the_training_is():
    arguments = {name: recipes.train_arguments(recipes.Run(name, 4e-3, 240, 1), 480) for name in recipes.RECIPES}
    assert {name: args.optimizer for name, args in arguments.items()} == {
        "lecture": "adamw",
        "fast-adamw": "adamw",
        "muon": "muon",
    }
    # The lecture's 375 M of 10 B tokens are 18 steps of 480; the others' 131 M are 6, also in a shorter run.
    assert [args.warmup_tokens // 1024 for args in arguments.values()] == [18, 6, 6]
    last = {name: scheduled_learning_rate(args.schedule, 240) for name, args in arguments.items()}
    assert last == {"lecture": pytest.approx(4e-4), "fast-adamw": 0.0, "muon": 0.0}
    for args in arguments.values():
        assert scheduled_learning_rate(args.schedule, 20) == pytest.approx(4e-3, rel=0.07)
        assert (args.tokens_per_step, args.sequences_per_step, args.block_size) == (1024, 8, 128)
