"""The notebook: committed without output, formatted, its imports and links lead somewhere, and it runs."""

import ast
import base64
import importlib
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
from markdown_pages import ROOT, anchors_of

NOTEBOOK = ROOT / "notebooks" / "lecture.ipynb"
MAX_BYTES = 40_000
MAX_LINES = 30  # of a cell, so that it is read


@pytest.fixture(scope="module")
def cells() -> list[dict]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def python_of(cell: dict) -> str:
    """The code of a cell without the lines that only IPython understands."""
    return re.sub(r"^( *)%.*$", r"\1pass", "".join(cell["source"]), flags=re.MULTILINE)


def test_it_is_committed_small_and_without_output(cells):
    assert NOTEBOOK.stat().st_size < MAX_BYTES
    for cell in cells:
        assert len(cell["source"]) <= MAX_LINES, cell["id"]
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    assert len({cell["id"] for cell in cells}) == len(cells)


@pytest.mark.skipif(find_spec("ruff") is None, reason="ruff is not installed")
def test_its_code_is_formatted():
    for command in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, str(NOTEBOOK)], cwd=ROOT, check=True)


def test_what_it_imports_exists(cells):
    imported = set()
    for cell in cells:
        for node in ast.walk(ast.parse(python_of(cell) if cell["cell_type"] == "code" else "")):
            if isinstance(node, ast.ImportFrom) and node.module != "IPython.display":
                imported |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.Import):
                assert all(find_spec(alias.name) for alias in node.names), ast.unparse(node)
    assert ("modeling_gpt2repro.hub.conversion", "load_gpt2") in imported
    for module, name in imported:
        assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


def test_its_links_lead_somewhere(cells):
    text = "".join(line for cell in cells if cell["cell_type"] == "markdown" for line in cell["source"])
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = NOTEBOOK.parent / path
            assert file.exists(), target
            assert not anchor or anchor in anchors_of(file), target


PICTURES = 5  # loss, position embeddings, next tokens, attention, logit lens
COLORED_TEXTS = 3  # the loss of each token, and where two heads look


@pytest.mark.parametrize(
    "network", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.network)]
)
def test_it_runs_from_top_to_bottom(network, tmp_path, monkeypatch):
    """Offline with the model that it trains, with a network with OpenAI's GPT-2."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0" if network else "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    training = next(cell for cell in notebook.cells if "RUN = " in cell.source)
    training.source = training.source.replace("runs/notebook", (tmp_path / "run").as_posix())
    if network:  # the pictures are of another model
        training.source = training.source.replace("STEPS = 400", "STEPS = 20")
    nbclient.NotebookClient(notebook, timeout=None, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    data = [output["data"] for output in outputs if "data" in output]
    pictures = [base64.b64decode(each["image/png"]) for each in data if "image/png" in each]
    assert len(pictures) == PICTURES
    assert all(len(picture) > 5_000 for picture in pictures)
    assert sum("text/html" in each for each in data) == COLORED_TEXTS
    printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert ("124,439,808 parameters" if network else "1,018,624 parameters") in printed
    initial, uniform = re.search(r"at initialization +(\S+)\nln\(50,257\) +(\S+)", printed).groups()
    assert float(initial) == pytest.approx(float(uniform), abs=0.1)
    without, with_cache = re.findall(r"the cache: ([\d,]+) tokens read, \S+ s\n +(.*)", printed)
    assert without[1] == with_cache[1]  # the cache changes no token
    assert (without[0], with_cache[0]) == ("7,350", "123")  # 24 + ... + 123, and 24 + 99
    if not network:
        nats = float(re.search(r"(\S+) nats per token; the strongest", printed)[1])
        assert 0.2 < nats < 1  # guessing: 7.3
