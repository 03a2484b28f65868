"""Speed and MFU as the logger measures them."""

import time

import torch
from accelerate import Accelerator

from modeling_gpt2repro.runs.logger import RunLogger
from modeling_gpt2repro.runs.metrics import MetricsLog, StepMetrics
from modeling_gpt2repro.runs.read import read_metrics


def test_mfu_is_the_share_of_the_peak_that_training_alone_reaches(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 104.0])  # the start; an evaluation until 100; two steps until 104
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    logger = RunLogger(
        Accelerator(cpu=True),
        MetricsLog(tmp_path, resumed_step=None, enabled=True),
        total_steps=2,
        tokens_per_step=1_000,
        logging_steps=2,
        flops_per_token=50,
        peak_flops=1e6,
    )
    with logger.untimed():
        pass
    for step in (1, 2):
        metrics = StepMetrics(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(False))
        logger.log_step(step, metrics, 1e-3, data_seconds=0.0)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2]
    speeds = {(record["step_seconds"], record["tokens_per_second"], record["mfu"]) for record in records}
    assert speeds == {(2.0, 500.0, 0.025)}
    assert logger.train_seconds == 4.0
