"""Whether a command of the documentation is one that its program accepts; none is run further than its arguments."""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from markdown_pages import ROOT

from modeling_gpt2repro.runtime import command_line

PACKAGE = "modeling_gpt2repro"

# Programs that are not ours: nothing but the files they name is checked.
FOREIGN = {"python3", "py", "conda", "hf", "jupyter", "ruff", "export", "cd", ".", ".venv\\Scripts\\activate"}
FOREIGN_FLAGS = {
    *("nodes", "time", "account", "partition", "gpus-per-node", "cpus-per-task"),  # sbatch
    *("index-url", "extra-index-url", "no-deps"),  # pip
    *("cpu", "help"),
}
# Problems that depend on the machine that the test runs on.
OF_THIS_MACHINE = ("needs the package ray", "there is no sbatch here")


class Parsed(Exception):
    """A program's arguments were accepted."""


def check_command(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Raise an AssertionError that says what is wrong with a command."""
    program, *arguments = words
    if program == "accelerate" and arguments[0] == "launch":
        check_launch(arguments[1:], tmp_path, monkeypatch)
    elif program in command_line.CONSOLE_SCRIPTS:
        check_program(load_module(command_line.CONSOLE_SCRIPTS[program]), arguments, tmp_path, monkeypatch)
    elif program == "python" and arguments[0] == "-m":
        check_program(load_module(arguments[1]), arguments[2:], tmp_path, monkeypatch)
    elif program == "python":
        check_program(load_script(arguments[0]), arguments[1:], tmp_path, monkeypatch)
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), f"there is no {arguments[0]}"
        check_program(load_module(f"benchmarks.{Path(arguments[0]).stem}"), arguments[1:], tmp_path, monkeypatch)
    elif program == "sbatch":
        script = next(place for place, word in enumerate(arguments) if word.endswith(".sbatch"))
        assert (ROOT / arguments[script]).is_file(), f"there is no {arguments[script]}"
        check_program(load_script("train_accelerate.py"), arguments[script + 1 :], tmp_path, monkeypatch)
    elif program == "pytest":
        check_pytest(arguments)
    elif program == "pip":
        check_pip(arguments)
    else:
        assert program in FOREIGN, f"{program!r} is a program that this test does not know"


def check_launch(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Check accelerate's own flags, its configuration, and the program that is launched."""
    from accelerate.commands.launch import launch_command_parser

    ends = (i for i, word in enumerate(arguments) if word.endswith(".py") or word == "-m")
    ours = next(ends, len(arguments))
    _, unknown = launch_command_parser().parse_known_args([*arguments[:ours], "script.py"])
    assert not [word for word in unknown if word.startswith("-")], f"accelerate launch has no {unknown}"
    if "--config_file" in arguments:
        config = arguments[arguments.index("--config_file") + 1]
        assert (ROOT / config).is_file(), f"there is no {config}"
    if arguments[ours:]:
        check_command(["python", *arguments[ours:]], tmp_path, monkeypatch)


def check_program(module, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Let the program parse its command line, in a folder that has what the command names, and go no further."""
    if not hasattr(module, "main") or not module.main.__code__.co_argcount:
        assert not arguments, f"{module.__name__} takes no arguments"
        return
    arguments = [word.removeprefix("/") for word in arguments if word != "--help"]
    for flag, word in zip(["", *arguments], arguments, strict=False):
        make_stand_in(tmp_path, word, is_output=flag == "--output_dir")
        if flag == "--output_dir" and "--certify" in arguments:  # of a run that is there
            (tmp_path / word / "run.json").write_text('{"arguments": {}}')
            (tmp_path / word / "metrics.jsonl").write_text('{"step": 1, "tokens": 1, "loss": 3.0}')
    stderr = io.StringIO()
    end = None
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", [module.__name__, *arguments])
        # Some programs import the first of these into themselves, others inside main; the rest use argparse.
        patch.setattr(command_line, "parse_command_line", stops_after(command_line.parse_command_line))
        if hasattr(module, "parse_command_line"):
            patch.setattr(module, "parse_command_line", command_line.parse_command_line)
        patch.setattr(argparse.ArgumentParser, "parse_args", stops_after(argparse.ArgumentParser.parse_args))
        patch.setattr(argparse.ArgumentParser, "error", print_and_exit)
        with contextlib.redirect_stderr(stderr), contextlib.suppress(Parsed):
            end = exit_code_of(lambda: module.main(arguments))
    ignored = ("problems; nothing was started", *OF_THIS_MACHINE)
    problems = [line for line in stderr.getvalue().splitlines() if not any(text in line for text in ignored)]
    assert not (end and problems), " ".join(problems)


def print_and_exit(parser: argparse.ArgumentParser, message: str):
    """What argparse does with a wrong argument, without the usage."""
    print(message, file=sys.stderr)
    sys.exit(2)


def exit_code_of(run: Callable) -> object:
    """What a program that exits exits with; None where it does not."""
    try:
        run()
    except SystemExit as end:
        return end.code
    return None


def stops_after(parse: Callable) -> Callable:
    """The function, which raises Parsed instead of returning."""

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    return parse_and_stop


def make_stand_in(folder: Path, word: str, is_output: bool = False):
    """Make the file or folder that a word of a command names: 'texts/*.txt', 'data/edu', 'a.jsonl', 'a:0.9,b:0.1'."""
    for part in re.split(r":[\d.]+,?", word):
        name = part.replace("*", "stand-in")
        path = folder / name
        if not part or part.startswith("-") or path.exists() or not re.fullmatch(r"[\w./-]+", name):
            continue
        if path.suffix in (".txt", ".md", ".gz", ".jsonl"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}\n")
        elif part.startswith(("data/", "runs/", "shared/edu")) and not path.suffix:
            path.mkdir(parents=True)
            if path.parent.parent.name == "runs":
                (path / "config.json").write_text("{}")
            elif path.parent.name == "runs" and not is_output:
                (path / "model").mkdir()
                (path / "model" / "config.json").write_text("{}")


def check_pytest(arguments: list[str]):
    """Paths exist, and markers are declared."""
    project = (ROOT / "pyproject.toml").read_text()
    previous = None
    for word in arguments:
        if previous == "-m":
            assert re.search(rf'^    "{word}: ', project, re.MULTILINE), f"the marker {word} is not declared"
        elif previous not in ("-k", "-n") and not word.startswith("-"):
            assert (ROOT / word).exists(), f"there is no {word}"
        previous = word


def check_pip(arguments: list[str]):
    """Constraints files and extras exist."""
    project = (ROOT / "pyproject.toml").read_text()
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag in ("-c", "-r"):
            assert (ROOT / value).is_file(), f"there is no {value}"
        if extra := re.fullmatch(r"\.\[(\w+)\]", flag):
            assert re.search(rf"^{extra[1]} = \[", project, re.MULTILINE), f"there is no extra {extra[1]}"


@cache
def load_module(name: str):
    """Import the module that `python -m` would run; for an alias, the module that its main is defined in."""
    if name.split(".")[0] not in (PACKAGE, "benchmarks", *command_line.CONSOLE_SCRIPTS.values()):
        assert importlib.util.find_spec(name), f"there is no module {name}"
        return argparse.Namespace(__name__=name)
    package = importlib.util.find_spec(name).submodule_search_locations
    module = importlib.import_module(f"{name}.__main__" if package else name)
    return sys.modules[module.main.__module__]


@cache
def load_script(path: str):
    """Import a script by its path in the repository, if it has a main; its name is enough otherwise."""
    assert (ROOT / path).is_file(), f"there is no {path}"
    if "def main(" not in (ROOT / path).read_text(encoding="utf-8"):
        return argparse.Namespace(__name__=path)
    if "/" not in path:
        return importlib.import_module(Path(path).stem)
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str((ROOT / path).parent))  # as `python FILE` does
        spec.loader.exec_module(module)
    return module


@cache
def known_flags() -> frozenset[str]:
    """Every flag that a page may name: of our programs, of accelerate launch, and of the others above."""
    from accelerate.commands.launch import launch_command_parser

    flags = {option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings}
    scripts = [path for folder in (".", "benchmarks", "examples") for path in (ROOT / folder).glob("*.py")]
    for path in [*scripts, *(ROOT / PACKAGE).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                flags |= {item.target.id for item in node.body if is_flag(item)}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument"):
                flags |= {a.value.lstrip("-") for a in node.args if isinstance(a, ast.Constant)}
    return frozenset(flags | FOREIGN_FLAGS)


def is_flag(item: ast.stmt) -> bool:
    """Whether a statement of a dataclass is a field with a help text."""
    return isinstance(item, ast.AnnAssign) and item.value is not None and "help" in ast.unparse(item.value)
