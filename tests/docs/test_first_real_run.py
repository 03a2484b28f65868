"""docs/first-real-run.md names every test that needs a GPU or the network, and the parts for a GPU are commands."""

import ast
import shlex
from collections.abc import Iterator

import pytest
from command_checks import check_command
from markdown_pages import ROOT

from benchmarks import on_gpu


def marked_tests(marker: str) -> Iterator[tuple[str, str]]:
    """(file, test) of every test that has a marker, whether written at it or in a constant that it uses."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        names = {f"pytest.mark.{marker}"}
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and names & expressions(node.value):
                names |= {ast.unparse(target) for target in node.targets}
            is_test = isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
            marks = set().union(*map(expressions, node.decorator_list)) if is_test else set()
            if is_test and ("pytestmark" in names or names & marks):
                yield str(path.relative_to(ROOT)), node.name


def expressions(node: ast.AST) -> set[str]:
    """The names and dotted names in a piece of code."""
    return {ast.unparse(part) for part in ast.walk(node) if isinstance(part, ast.Name | ast.Attribute)}


@pytest.mark.parametrize("marker", ["gpu", "network"])
def test_every_test_that_nobody_here_can_run_is_named(marker):
    page = (ROOT / "docs" / "first-real-run.md").read_text(encoding="utf-8")
    tests = list(marked_tests(marker))
    assert tests
    missing = [f"{file}: {name}" for file, name in tests if f"`{file}`" not in page or f"`{name}`" not in page]
    assert not missing, "\n".join(["docs/first-real-run.md does not name", *missing])


@pytest.mark.parametrize("plan", ["gpu", "toy"])
def test_every_part_for_a_gpu_is_a_command_that_its_program_accepts(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for part in on_gpu.PLANS[plan]():
        if part.name in ("environment", "tests"):
            continue
        command = part.command.format(result="result.json", seconds=9, work="runs")
        for words in command.split(" && "):
            check_command(shlex.split(words), tmp_path, monkeypatch)
