"""metrics.jsonl: what a run appends, across restarts, crashes and full disks, reads as one run."""

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


def test_records_wait_in_memory_while_the_disk_is_full(tmp_path):
    log = MetricsLog(tmp_path, resumed_step=None, enabled=True)
    log.append({"step": 1})
    path = log.path
    log.path = tmp_path / "missing" / "metrics.jsonl"
    log.append({"step": 2})
    log.append({"step": 3})
    log.path = path
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]
    log.append({"step": 4})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]
