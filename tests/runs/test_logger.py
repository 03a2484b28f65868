"""Speed and MFU as the logger measures them."""

import re
import time

import pytest
import torch
from accelerate import Accelerator

from modeling_gpt2repro.runs.logger import RunLogger
from modeling_gpt2repro.runs.metrics import MetricsLog, StepMetrics
from modeling_gpt2repro.runs.read import read_metrics


def test_mfu_is_the_share_of_the_peak_that_training_alone_reaches(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 130.0, 134.0])  # the start; an evaluation until 100; a step until 130, two until 134
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    logger = RunLogger(
        Accelerator(cpu=True),
        MetricsLog(tmp_path, resumed_step=None, enabled=True),
        total_steps=3,
        tokens_per_step=1_000,
        logging_steps=3,
        flops_per_token=50,
        peak_flops=1e6,
    )
    with logger.untimed():
        pass
    for step in (1, 2, 3):
        metrics = StepMetrics(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(False))
        logger.log_step(step, metrics, 1e-3, data_seconds=0.0)
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3]
    speeds = [(record["step_seconds"], record["tokens_per_second"], record["mfu"]) for record in records[1:]]
    assert speeds == [(2.0, 500.0, 0.025)] * 2
    assert records[0]["step_seconds"] == 30.0  # the first step alone: it compiles
    assert logger.train_seconds == 34.0


@pytest.mark.parametrize(("first_step", "expected"), [(0, [1, 4, 8, 10]), (5, [6, 8, 10])])
def test_a_log_has_a_line_for_every_logging_step_and_metrics_for_every_step(tmp_path, capsys, first_step, expected):
    logger = RunLogger(
        Accelerator(cpu=True),
        MetricsLog(tmp_path, resumed_step=None, enabled=True),
        total_steps=10,
        tokens_per_step=1_000,
        logging_steps=4,
        first_step=first_step,
    )
    for step in range(first_step + 1, 11):
        metrics = StepMetrics(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(False))
        logger.log_step(step, metrics, 1e-3, data_seconds=0.0)
        if step == 7:  # before an evaluation the metrics are read, too
            logger.flush()
    printed = re.findall(r"^step +(\d+)/10 \|", capsys.readouterr().out, re.MULTILINE)
    assert [int(step) for step in printed] == expected
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(first_step + 1, 11))
