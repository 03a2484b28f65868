"""The house's rules: imports point one way, and what ships to the Hub stands alone."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_gpt2repro"
SHIPPED = ("configuration_gpt2repro.py", "modeling_gpt2repro.py")


def imported_by(path: Path) -> set[str]:
    """Full names of the modules that a file of the package imports, relative ones resolved.

    What a `main` imports inside itself does not count: it is a script that `python -m` runs, and scripts combine rooms.
    """
    names = set()
    package = ["modeling_gpt2repro", *path.relative_to(PACKAGE).parent.parts] if PACKAGE in path.parents else []
    module = ast.parse(path.read_text(encoding="utf-8"))
    module.body = [node for node in module.body if not (isinstance(node, ast.FunctionDef) and node.name == "main")]
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            names.add(".".join([*base, *([node.module] if node.module else [])]))
    return names


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "modeling_gpt2repro"}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_import_each_other_by_from_at_the_margin(name):
    text = (PACKAGE / name).read_text(encoding="utf-8")
    allowed = {"difflib", "math", "torch", "transformers", "huggingface_hub"}
    for imported in imported_by(PACKAGE / name) - own(imported_by(PACKAGE / name)):
        assert imported.split(".")[0] in allowed, imported
    relative = re.findall(r"^.*from\s+\.\S*\s+import.*$", text, re.MULTILINE)
    assert relative == (["from .configuration_gpt2repro import GPT2ReproConfig"] if name == SHIPPED[1] else [])
    assert not re.search(r"\b(from|import)\s+modeling_gpt2repro\b", text), "an absolute import of ourselves"


def test_inner_init_files_are_one_docstring():
    for path in PACKAGE.glob("*/**/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path


def test_scripts_do_nothing_when_imported():
    for path in ROOT.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            guard = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
            plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert guard or docstring or isinstance(node, plain), f"{path.name}:{node.lineno}"


def test_preparing_data_loads_neither_the_model_nor_torch_until_they_are_asked_for():
    program = """
import sys
from transformers import PreTrainedTokenizerFast
from transformers.hf_argparser import HfArgumentParser
by_transformers = "torch" in sys.modules  # older versions import it with their tokenizers
import modeling_gpt2repro.data.prepare.executors, modeling_gpt2repro.data.tokenize
import modeling_gpt2repro.runtime.command_line
assert ("torch" in sys.modules) == by_transformers
assert "modeling_gpt2repro.modeling_gpt2repro" not in sys.modules
from modeling_gpt2repro import GPT2ReproConfig
from transformers import AutoConfig, AutoModelForCausalLM
assert isinstance(AutoConfig.for_model("gpt2repro"), GPT2ReproConfig)
assert GPT2ReproConfig in AutoModelForCausalLM._model_mapping
"""
    environment = {**os.environ, "GPT2REPRO_LAZY": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


def test_no_file_is_named_after_nothing():
    vague = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not [path for path in PACKAGE.rglob("*.py") if path.name in vague]
