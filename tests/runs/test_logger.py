"""Speed and MFU as the logger measures them."""

import fcntl
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest
import torch
from accelerate import Accelerator

from modeling_gpt2repro.runs.logger import RunLogger
from modeling_gpt2repro.runs.metrics import MetricsLog, StepMetrics
from modeling_gpt2repro.runs.read import read_metrics


def made_logger(folder, **options) -> RunLogger:
    log = MetricsLog(folder, resumed_step=None, enabled=True)
    return RunLogger(Accelerator(cpu=True), log, tokens_per_step=1_000, **options)


def test_mfu_is_the_share_of_the_peak_that_training_alone_reaches(tmp_path, monkeypatch):
    clock = iter([0.0, 100.0, 130.0, 134.0])  # the start; an evaluation until 100; a step until 130, two until 134
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    logger = made_logger(tmp_path, total_steps=3, logging_steps=3, flops_per_token=50, peak_flops=1e6)
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
    logger = made_logger(tmp_path, total_steps=10, logging_steps=4, first_step=first_step)
    for step in range(first_step + 1, 11):
        metrics = StepMetrics(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(False))
        logger.log_step(step, metrics, 1e-3, data_seconds=0.0)
        if step == 7:  # before an evaluation the metrics are read, too
            logger.flush()
    printed = re.findall(r"^step +(\d+)/10 \|", capsys.readouterr().out, re.MULTILINE)
    assert [int(step) for step in printed] == expected
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(first_step + 1, 11))


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """A pseudo-terminal of 60 columns in place of stdout and stderr; yields a function that reads what it was sent."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))

    def read() -> str:
        sent = b""
        while select.select([reader], [], [], 0.2)[0]:
            sent += os.read(reader, 1 << 16)
        return sent.decode()

    with os.fdopen(writer, "w") as file, redirect_stdout(file), redirect_stderr(file):
        yield read
    os.close(reader)


def screen(sent: str) -> list[str]:
    """The lines that a terminal shows: a carriage return goes back to the beginning of the line, to write over it."""
    lines = []
    for line in sent.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_a_terminal_has_a_bar_under_what_is_printed_and_no_rest_of_it(tmp_path):
    with terminal() as read:
        logger = made_logger(tmp_path, total_steps=2, logging_steps=1)
        logger.print("device       CPU\nwriting to   run\n")
        started = read()
        for step in (1, 2):
            logger.log_step(step, StepMetrics(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(False)), 1e-3, 0.0)
        logger.print("trained      2 steps")
        logger.close()
        ended = read()
    assert "0/2" not in started[: started.index("device")]
    assert screen(started)[:3] == ["device       CPU", "writing to   run", ""]
    assert screen(started)[3].startswith("  0%|")
    assert "2/2" in ended
    assert screen(started + ended) == ["device       CPU", "writing to   run", "", "trained      2 steps", ""]


def test_a_log_that_is_a_pipe_has_lines_though_errors_go_to_a_terminal(tmp_path):
    with terminal() as read, open(tmp_path / "log", "w") as log, redirect_stdout(log):
        logger = made_logger(tmp_path, total_steps=2, logging_steps=1)
        logger.log_step(1, StepMetrics(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(False)), 1e-3, 0.0)
        logger.close()
        shown = read()
    assert (tmp_path / "log").read_text().startswith("step      1/2 | loss  3.0000")
    assert shown == ""
