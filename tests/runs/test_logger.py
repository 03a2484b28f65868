"""Speed and MFU as the logger measures them."""

import errno
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
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from refusing_disk import RefusingDisk

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


@pytest.mark.parametrize("is_main_process", [True, False])
def test_a_wait_for_data_is_said_once_a_step_by_the_process_that_waits(tmp_path, monkeypatch, capsys, is_main_process):
    monkeypatch.setattr(Accelerator, "is_main_process", is_main_process)
    logger = made_logger(tmp_path, total_steps=2, logging_steps=1)
    for _ in range(3):
        logger.show_waiting("part-3.parquet cannot be read: 403")
    sentence = "Waiting for data, for up to 5 minutes: part-3.parquet cannot be read: 403.\n"
    assert capsys.readouterr().out == sentence
    logger.log_step(1, StepMetrics(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(False)), 1e-3, 100.0)
    logger.show_waiting("part-3.parquet cannot be read: 403")
    assert capsys.readouterr().out.endswith(sentence)


def test_the_bar_shows_a_wait_for_data_until_the_next_step(tmp_path):
    with terminal() as read:
        logger = made_logger(tmp_path, total_steps=100, logging_steps=100)
        logger.show_waiting("403")
        waiting = screen(read())[-1]
        logger.print("above")
        logger.bar.start_t -= 60
        logger.show_waiting("403")
        later = screen(read())[-1]
        logger.log_step(2, StepMetrics(torch.tensor(3.0), torch.tensor(1.0), torch.tensor(False)), 1e-3, 0.0)
        logger.print("above")
        after = screen(read())[-1]
        logger.close()
    assert waiting.endswith("waiting for data]")
    assert later.endswith("waiting for data]")
    assert waiting != later  # its clock
    assert "waiting" not in after


class EventFile(GeneralTracker):
    """As TensorBoard's tracker: a write that fails ends its thread, and every later one fails as well."""

    name = "tensorboard"
    requires_logging_directory = False
    main_process_only = True
    tracker = None

    def __init__(self, written: list, is_full: list):
        super().__init__(_blank=True)
        self.written, self.is_full = written, is_full
        self.writer = SimpleNamespace(file_writer=None, all_writers=None)

    def log(self, values, step=None):
        writer = self.writer.file_writer = self.writer.file_writer or SimpleNamespace(is_dead=False)
        writer.is_dead = writer.is_dead or bool(self.is_full)
        if writer.is_dead:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written.append((step, values["loss"]))


def test_events_of_a_tracker_wait_for_the_disk_and_come_in_order(tmp_path, capsys):
    written, is_full = [], []
    logger = made_logger(tmp_path, total_steps=9, logging_steps=1)
    logger.accelerator.trackers = [EventFile(written, is_full)]
    for step in range(1, 10):
        if step == 3:
            is_full.append(True)
        if step == 6:
            is_full.clear()
        logger.record(step, {"loss": float(step)})
        if step == 4:
            assert [read for read, _ in written] == [1, 2]
        if step == 7:
            with logger.untimed():  # an evaluation
                pass
            assert [read for read, _ in written] == [1, 2, 3, 4, 5, 6, 7]
    is_full.append(True)
    logger.record(10, {"loss": 10.0})
    is_full.clear()
    logger.close()
    assert written == [(step, float(step)) for step in range(1, 11)]
    errors = capsys.readouterr().err
    assert errors.count("the log of the trackers cannot be written (No space left on device)") == 2
    assert errors.count("The disk takes writes again") == 2


def test_trackers_are_left_alone_while_the_disk_refuses_the_metrics(tmp_path, monkeypatch):
    """TensorBoard prints a traceback for each try."""
    written = []
    disk = RefusingDisk(monkeypatch, tmp_path)
    logger = made_logger(tmp_path, total_steps=9, logging_steps=1)
    logger.accelerator.trackers = [EventFile(written, [])]
    for step in range(1, 7):
        if step == 2:
            disk.refuse(errno.EROFS)
        if step == 5:
            disk.recover()
        logger.record(step, {"loss": float(step)})
        assert [read for read, _ in written] == ([1] if step < 5 else list(range(1, step + 1)))
