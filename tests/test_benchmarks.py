"""The benchmarks run, and what they compare computes the same."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmark_run(tmp_path_factory) -> tuple[Path, str]:
    """The file that a toy run wrote, and what it printed."""
    output = tmp_path_factory.mktemp("benchmark") / "results" / "training_step.json"
    flags = ["--shape", "toy", "--device", "cpu", "--rounds", "2", "--steps", "2", "--micro_batches", "2"]
    command = [sys.executable, "-m", "benchmarks.training_step", *flags, "--output", str(output)]
    ran = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return output, ran.stdout


def test_our_step_and_the_plain_loop_have_the_same_losses(benchmark_run):
    [result] = json.loads(benchmark_run[0].read_text())
    ours, stock = result["losses"]["ours"], result["losses"]["stock"]
    assert len(ours) == len(stock) == 2 + 2 * 2  # warm-up, rounds x steps
    assert len(set(ours)) == len(ours)  # every step has rows of its own
    np.testing.assert_allclose(ours, stock, rtol=0, atol=1e-5)
    assert result["largest_loss_difference"] == np.abs(np.subtract(ours, stock)).max()


def test_training_step_benchmark_writes_what_its_figures_come_from(benchmark_run):
    output, printed = benchmark_run
    [result] = json.loads(output.read_text())
    assert result["command"].startswith("python -m benchmarks.training_step --shape toy --device cpu")
    assert result["settings"]["shape"] == "toy"
    assert result["settings"]["micro_batches"] == 2
    assert {"cpu", "threads", "system", "load_average_before"} <= set(result["machine"])
    assert set(result["versions"]) == {"python", "torch", "transformers", "accelerate", "numpy"}
    for side in ("ours", "stock"):
        assert result["step_seconds"][side] > 0
        assert result["peak_memory_bytes"][side] > 0
    for ratio in result["stock_over_ours"].values():
        assert 0 < ratio["lower_quartile"] <= ratio["median"] <= ratio["upper_quartile"]
    assert f"ours is {result['stock_over_ours']['seconds']['median']:.3f} times as fast" in printed


def test_a_results_file_keeps_the_latest_result_of_each_setting(tmp_path, monkeypatch):
    specification = importlib.util.spec_from_file_location("training_step", REPOSITORY / "benchmarks/training_step.py")
    benchmark = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "training_step", benchmark)  # dataclasses look their module up
    specification.loader.exec_module(benchmark)
    file = tmp_path / "results.json"
    for dtype, speed in (("fp32", 1), ("bf16", 2), ("fp32", 3)):
        benchmark.add_to_file(file, {"settings": {"dtype": dtype}, "speed": speed})
    assert [result["speed"] for result in json.loads(file.read_text())] == [2, 3]
