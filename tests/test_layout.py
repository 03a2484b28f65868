"""The house's rules: imports point one way, and what ships to the Hub imports nothing else of ours."""

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
RELATIVE_IMPORTS = {  # the first is indented: for type checkers, and for transformers, which looks for such lines
    SHIPPED[0]: "    from .modeling_gpt2repro import GPT2ReproModel",
    SHIPPED[1]: "from .configuration_gpt2repro import GPT2ReproConfig",
}


# Floor by floor, the highest first. A file imports from lower floors and from its own room, never from a neighbour.
FLOORS = (("pretrain",), ("hub",), ("training", "evaluation"), ("data", "runs"), ("runtime", "storage"))
MODEL_FLOORS = FLOORS[:2]  # which may import the model


def imported_by(path: Path) -> set[str]:
    """Full names of the modules that a file imports, wherever in the file, relative ones resolved."""
    names = set()
    package = ["modeling_gpt2repro", *path.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def own(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "modeling_gpt2repro"}


def rooms_imported_by(path: Path) -> set[str]:
    """The rooms of our own that a file imports from; "model" for what lies at the package's root."""
    parts = [name.split(".")[1] for name in own(imported_by(path))]
    return {part if (PACKAGE / part).is_dir() else "model" for part in parts}


@pytest.mark.parametrize("room", [room for floor in FLOORS for room in floor])
def test_imports_point_down(room):
    level = next(number for number, floor in enumerate(FLOORS) if room in floor)
    allowed = {room, *(below for floor in FLOORS[level + 1 :] for below in floor)}
    if FLOORS[level] in MODEL_FLOORS:
        allowed.add("model")
    for path in (PACKAGE / room).rglob("*.py"):
        assert rooms_imported_by(path) <= allowed, path


def test_storage_imports_the_standard_library_and_the_hub_client_only():
    for path in (PACKAGE / "storage").glob("*.py"):
        roots = {name.split(".")[0] for name in imported_by(path) - own(imported_by(path))}
        assert roots <= {*sys.stdlib_module_names, "huggingface_hub"}, path


def test_the_package_holds_the_model_and_the_rooms_and_no_folder_is_crowded():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", *SHIPPED}
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert rooms == {room for floor in FLOORS for room in floor}
    for folder in PACKAGE.glob("*/**/"):
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(files) <= 12, folder


def test_no_code_reads_pickle():
    """Which runs whatever a stranger's file names. numpy reads it by `allow_pickle` only, and torch by `torch.load`."""
    readers = re.compile(
        r"\btorch\.load\(|^\s*(import|from) (pickle|dill|joblib|cloudpickle)\b|allow_pickle|read_pickle", re.M
    )
    for path in [*ROOT.glob("*.py"), *PACKAGE.rglob("*.py")]:
        assert not readers.search(path.read_text(encoding="utf-8")), path
    for reader in ("state = torch.load(file)", "import pickle", "np.load(file, allow_pickle=True)"):
        assert readers.search(reader)


def test_product_code_patches_nothing():
    for path in [*ROOT.glob("*.py"), *PACKAGE.rglob("*.py")]:
        assert "unittest" not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_import_only_libraries_and_each_other(name):
    text = (PACKAGE / name).read_text(encoding="utf-8")
    allowed = {"math", "torch", "transformers", "typing", "huggingface_hub"}
    for imported in imported_by(PACKAGE / name) - own(imported_by(PACKAGE / name)):
        assert imported.split(".")[0] in allowed, imported
    relative = re.findall(r"^.*from\s+\.\S*\s+import[^#\n]*\w", text, re.MULTILINE)
    assert relative == [RELATIVE_IMPORTS[name]]
    assert not re.search(r"\b(from|import)\s+modeling_gpt2repro\b", text), "an absolute import of ourselves"


def test_inner_init_files_are_one_docstring():
    for path in PACKAGE.glob("*/**/__init__.py"):
        body = ast.parse(path.read_text(encoding="utf-8")).body
        assert len(body) == 1, path
        assert isinstance(body[0], ast.Expr), path


def test_scripts_do_nothing_when_imported():
    for path in ROOT.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            run = "__name__ == '__main__'"
            guards = (run, f"{run} or Path(sys.argv[0]).stem == 'gpt2repro-prepare'", "TYPE_CHECKING")
            guard = isinstance(node, ast.If) and ast.unparse(node.test) in guards
            plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert guard or docstring or isinstance(node, plain), f"{path.name}:{node.lineno}"


def test_scripts_import_no_more_than_they_need():
    """In imported modules, because seconds depend on the machine; each line of it was a second of every start."""
    program = """
import sys

def imported_since(before):
    return {name.partition(".")[0] for name in sys.modules.keys() - before}

import prepare_data
try:
    prepare_data.main(["--help"])
except SystemExit:
    pass
heavy = {"accelerate", "datasets", "datatrove", "evaluate", "matplotlib", "pandas", "peft", "ray", "sklearn", "torch"}
assert not imported_since(set()) & (heavy | {"transformers"})

from transformers import PreTrainedTokenizerFast
by_transformers = set(sys.modules)  # older versions import torch with their tokenizers
import modeling_gpt2repro.data.prepare.cluster, modeling_gpt2repro.data.prepare.local
assert not imported_since(by_transformers) & {"torch"}
assert "modeling_gpt2repro.modeling_gpt2repro" not in sys.modules

import torch, transformers.modeling_utils, transformers.models.auto.modeling_auto
base = set(sys.modules)
from modeling_gpt2repro import GPT2ReproConfig
assert imported_since(base) <= {"modeling_gpt2repro", "tokenizers", "transformers"}
assert len(sys.modules.keys() - base) < 60
from transformers import AutoConfig, AutoModelForCausalLM
assert isinstance(AutoConfig.for_model("gpt2repro"), GPT2ReproConfig)
assert GPT2ReproConfig in AutoModelForCausalLM._model_mapping

import eval_hellaswag, train_accelerate
assert not imported_since(base) & heavy - {"accelerate"}
"""
    environment = {**os.environ, "GPT2REPRO_LAZY": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)


def test_no_file_is_named_after_nothing():
    vague = {"utils.py", "common.py", "helpers.py", "misc.py"}
    assert not [path for path in PACKAGE.rglob("*.py") if path.name in vague]
