"""The preflight's arithmetic: time, disk and cost of the whole run from what was measured on a part of it."""

import shutil

import pytest

from modeling_gpt2repro.pretrain.preflight import StepTimings, disk_bytes, preflight_report, whole_run_seconds
from modeling_gpt2repro.training.arguments import TrainArguments

MEASURED = StepTimings(
    first_step=30.0,
    step=0.3,
    data=0.01,
    evaluation=40.0,
    save=5.0,
    checkpoint_bytes=1_500_000_000,
    memory_gb=60.0,
)


def test_the_whole_run_is_the_sum_of_its_parts():
    args = TrainArguments()
    parts = whole_run_seconds(args, MEASURED)
    assert parts["training"] == pytest.approx(30 + 0.3 * 19072)
    assert parts["evaluation"] == 40 * 78  # steps 0, 250, ..., 19000, and the end
    assert parts["saving"] == 5 * 20
    assert disk_bytes(args, 10) == 50  # three kept, one being written, the result
    assert disk_bytes(TrainArguments(save_total_limit=0, keep_every=5000), 10) == (20 + 3 + 2) * 10


def test_the_report_gives_speed_and_cost_and_what_is_missing(tmp_path, monkeypatch):
    args = TrainArguments(output_dir=str(tmp_path), preflight=True, price_per_hour=10.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 7_000_000_000))
    report, problems = preflight_report(args, MEASURED, flops_per_token=10**9, peak_flops=312e12 * 8)
    hours = sum(whole_run_seconds(args, MEASURED).values()) / 3600
    assert "1,747,627 tokens/s" in report
    assert f"{1747626.7 * 1e9 / (312e12 * 8):.1%} of 2,496 TFLOP/s" in report
    assert f"{10 * hours:,.2f} at 10 an hour" in report
    assert "7.5 GB at most, 7.0 GB free" in report
    assert problems == [
        f"output_dir ({tmp_path}) has 7.0 GB free, and the run needs 7.5 GB: free some space, or keep fewer "
        "checkpoints than --save_total_limit 3."
    ]
