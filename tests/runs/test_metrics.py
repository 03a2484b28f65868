"""metrics.jsonl: what a run appends, across restarts, crashes and full disks, reads as one run."""

import errno
import json
import os

import pytest
from refusing_disk import ERRORS, OPERATIONS, RefusingDisk

from modeling_gpt2repro.runs.metrics import MetricsLog
from modeling_gpt2repro.runs.read import read_metrics


def test_metrics_read_as_if_the_run_had_never_stopped(tmp_path):
    log = MetricsLog(tmp_path, resumed_step=None, enabled=True)
    for step in (1, 2, 3):
        log.append({"step": step, "loss": float(step)})
    log = MetricsLog(tmp_path, resumed_step=2, enabled=True)
    log.append({"step": 3, "loss": 33.0})
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [record["loss"] for record in read_metrics(tmp_path)] == [1.0, 2.0, 33.0]


def test_an_evaluation_at_the_resumed_step_counts_once_and_a_truncated_line_loses_only_itself(tmp_path):
    log = MetricsLog(tmp_path, resumed_step=None, enabled=True)
    log.append({"step": 0, "validation_loss": 9.0})
    log.append({"step": 1, "loss": 8.0})
    log.append({"step": 1, "validation_loss": 7.0})
    with open(log.path, "a") as file:
        file.write('{"step": 2, "lo')
    log = MetricsLog(tmp_path, resumed_step=1, enabled=True)
    log.append({"step": 1, "validation_loss": 7.0})
    log.append({"step": 2, "loss": 6.0})
    records = read_metrics(tmp_path)
    assert [record["validation_loss"] for record in records if "validation_loss" in record] == [9.0, 7.0]
    assert [record["loss"] for record in records if "loss" in record] == [8.0, 6.0]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_records_wait_in_memory_while_the_disk_refuses(tmp_path, monkeypatch, capsys, error, operation):
    disk = RefusingDisk(monkeypatch, tmp_path)
    log = MetricsLog(tmp_path, resumed_step=None, enabled=True)
    log.append({"step": 1})
    disk.refuse(ERRORS[error], operation)
    log.append({"step": 2})
    log.append({"step": 3})
    disk.recover()
    log.append({"step": 4})
    lines = log.path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4}]
    is_used = operation in ("open", "write", "flush")
    reason = os.strerror(ERRORS[error])
    errors = capsys.readouterr().err
    assert errors.count(f"metrics.jsonl cannot be written ({reason}): the run continues") == is_used
    assert errors.count("The disk takes writes again: what waited in memory is written.") == is_used


def test_a_log_opened_while_the_disk_refuses_gets_its_records_later(tmp_path, monkeypatch):
    disk = RefusingDisk(monkeypatch, tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    disk.refuse(errno.EIO)
    log = MetricsLog(tmp_path, resumed_step=1, enabled=True)
    disk.recover()
    log.append({"step": 2, "loss": 5.0})
    assert [record.get("loss") for record in read_metrics(tmp_path)] == [5.0]


@pytest.mark.parametrize("cut", range(1, 80, 7))
def test_a_partial_file_is_read_as_far_as_it_is_whole(tmp_path, cut):
    records = [{"step": step, "loss": 4.5} for step in range(1, 4)]
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "metrics.jsonl").write_bytes(content[:cut])
    whole = content[:cut].count(b"}")
    assert read_metrics(tmp_path) == records[:whole]
    # A crash of the machine may leave zeros or garbage at the end.
    (tmp_path / "metrics.jsonl").write_bytes(content[:cut] + b"\0\0\xff\n7\n")
    assert read_metrics(tmp_path) == records[: content[:cut].count(b"}\n")]
