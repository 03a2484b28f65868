"""Tests wait by patience.py alone, or they fail where other programs use the cores."""

import ast
from pathlib import Path

import patience
import pytest
from patience import wait_until

TESTS = Path(__file__).parents[1]
CLOCKS = {"time.sleep", "time.monotonic", "time.perf_counter", "time.time"}


def impatient_calls(source: str) -> list[int]:
    """Lines with a number of seconds as a time limit, a pause, or a look at the clock on the wall."""
    lines = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        limits = [keyword.value for keyword in call.keywords if keyword.arg == "timeout"]
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("wait", "join", "communicate"):
            limits += call.args
        if ast.unparse(call.func) in CLOCKS or any(
            isinstance(limit, ast.Constant) and isinstance(limit.value, int | float) for limit in limits
        ):
            lines.append(call.lineno)
    return lines


def test_no_test_has_a_time_limit_of_its_own():
    files = [path for path in TESTS.rglob("*.py") if path.name != "patience.py"]
    found = [f"{path.relative_to(TESTS)}:{line}" for path in files for line in impatient_calls(path.read_text("utf-8"))]
    assert not found, f"{', '.join(found)}: wait by patience.py, with PATIENCE_SECONDS or wait_until, and measure none"


def test_time_limits_pauses_and_clocks_are_found():
    found = ["p.wait(60)", "p.communicate(timeout=9)", "run(x, timeout=0.5)", "time.sleep(0.1)", "time.monotonic()"]
    allowed = ["p.wait(PATIENCE_SECONDS)", "run(x, timeout=2 * PATIENCE_SECONDS)", "time.process_time()", "p.wait()"]
    assert impatient_calls("\n".join([*found, *allowed, "', '.join(x)"])) == [1, 2, 3, 4, 5]


def test_a_wait_ends_with_what_it_waits_for_or_says_what_was_there_instead(monkeypatch):
    answers = iter([False, False, True])
    wait_until(lambda: next(answers))
    assert not list(answers)
    monkeypatch.setattr(patience, "PATIENCE_SECONDS", 0)
    with pytest.raises(AssertionError, match=r"has not happened in 0 seconds\. the log"):
        wait_until(lambda: False, lambda: "the log")
