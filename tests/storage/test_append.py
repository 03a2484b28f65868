"""Lines appended to a file while the disk fails: each is in it once, in order, and none is half there."""

import errno
import os
import re
from contextlib import suppress

import pytest
from refusing_disk import ERRORS, OPERATIONS, RefusingDisk

from modeling_gpt2repro.storage.append import LineAppender


@pytest.fixture
def disk(tmp_path, monkeypatch):
    return RefusingDisk(monkeypatch, tmp_path)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("operation", ["open", "write", "flush"])
@pytest.mark.parametrize("with_truncate", [False, True])
def test_refused_lines_are_written_later_each_once(tmp_path, disk, error, operation, with_truncate):
    lines = LineAppender(tmp_path / "log.jsonl")
    lines.append("one")
    lines.flush()
    # Where half a line cannot even be cut off, as on a disk that has just become read-only, it is before the next.
    disk.refuse(ERRORS[error], operation, *(["truncate", "stat"] if with_truncate else []))
    for word in ("two", "three"):
        lines.append(word)
        with pytest.raises(OSError, match=re.escape(os.strerror(ERRORS[error]))):
            lines.flush()
        if not with_truncate:
            assert (tmp_path / "log.jsonl").read_text() == "one\n"
    disk.recover()
    lines.append("four")
    lines.flush()
    lines.flush()
    assert (tmp_path / "log.jsonl").read_text() == "one\ntwo\nthree\nfour\n"


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_that_is_refused_costs_at_most_time(tmp_path, disk, operation):
    lines = LineAppender(tmp_path / "log.jsonl")
    disk.refuse(errno.EIO, operation)
    lines.append("one")
    with suppress(OSError):
        lines.flush()
    disk.recover()
    lines.append("two")
    lines.flush()
    assert (tmp_path / "log.jsonl").read_text() == "one\ntwo\n"


def test_a_line_that_a_crash_cut_off_is_ended_first(tmp_path):
    (tmp_path / "log.jsonl").write_text("one\ntw")
    lines = LineAppender(tmp_path / "log.jsonl")
    lines.append("three")
    lines.flush()
    assert (tmp_path / "log.jsonl").read_text() == "one\ntw\nthree\n"


def test_a_file_that_somebody_shortens_meanwhile_is_not_filled_with_zeros(tmp_path, disk):
    lines = LineAppender(tmp_path / "log.jsonl")
    lines.append("one")
    lines.flush()
    disk.refuse(errno.EIO, "write", "truncate")
    lines.append("two")
    with pytest.raises(OSError, match="Input/output"):
        lines.flush()
    disk.recover()
    os.truncate(tmp_path / "log.jsonl", 0)
    lines.flush()
    assert (tmp_path / "log.jsonl").read_text() == "two\n"
