"""A run's writes on a disk that refuses for a while: they wait, and the run says so once."""

import errno

from modeling_gpt2repro.runs.deferred import DeferredWrites


class Disk:
    """Raises `error`, if there is one, else notes what was written."""

    def __init__(self):
        self.error = None
        self.written = []

    def writer(self, content: str):
        def write():
            if self.error is not None:
                raise self.error
            self.written.append(content)

        return write


def test_an_outage_is_reported_once_and_its_end_once(capsys):
    disk = Disk()
    deferred = DeferredWrites()
    disk.error = OSError(errno.EROFS, "Read-only file system")
    deferred.write("metrics.jsonl", disk.writer("step 1"))
    deferred.write("metrics.jsonl", disk.writer("steps 1 and 2"))
    deferred.write("loss.png", disk.writer("plot"))
    deferred.retry()
    assert disk.written == []
    assert deferred.is_waiting("loss.png", "none")
    assert capsys.readouterr().err == (
        "metrics.jsonl cannot be written (Read-only file system): the run continues, and keeps it in memory "
        "until it can.\n"
    )
    disk.error = None
    deferred.write("metrics.jsonl", disk.writer("steps 1 to 3"))
    assert disk.written == ["steps 1 to 3", "plot"]  # what waits is written as soon as anything can be
    assert capsys.readouterr().err == "The disk takes writes again: what waited in memory is written.\n"
    deferred.write("metrics.jsonl", disk.writer("step 4"))
    deferred.close()
    assert capsys.readouterr().err == ""
    disk.error = OSError(errno.EROFS, "Read-only file system")
    deferred.write("metrics.jsonl", disk.writer("step 5"))
    assert "cannot be written" in capsys.readouterr().err  # the next outage


def test_another_reason_is_reported_too_and_so_is_what_is_lost(capsys):
    disk = Disk()
    deferred = DeferredWrites()
    disk.error = OSError(errno.EACCES, "Permission denied")
    deferred.write("loss.png", disk.writer("plot"))
    disk.error = OSError(errno.ENOSPC, "No space left on device")
    deferred.write("metrics.jsonl", disk.writer("step 1"))
    assert capsys.readouterr().err.count("cannot be written (") == 2
    deferred.close()
    errors = capsys.readouterr().err
    assert "loss.png could not be written before the run ended (No space left on device)" in errors
    assert "metrics.jsonl could not be written before the run ended" in errors
