"""README and docs against the code: commands parse, names exist, links lead somewhere, snippets run.

A failure names the page, the line and what to mend. Nothing is downloaded and no command is run, but the README's
snippet that talks to a model.
"""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from modeling_gpt2repro.runtime import command_line

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests" / "README.md"]
PACKAGE = "modeling_gpt2repro"
README_LINES = 200

# Programs that are not ours: nothing but the files they name is checked.
FOREIGN = {"python3", "py", "conda", "hf", "ruff", "export", ".", ".venv\\Scripts\\activate"}
FOREIGN_FLAGS = {
    *("nodes", "time", "account", "partition", "gpus-per-node"),  # sbatch
    *("index-url", "extra-index-url"),  # pip
    *("cpu", "help"),
}
SHELLS = ("bash", "powershell")
# Files that are in a run's, a model's or a data folder, not in the repository.
WRITTEN_BY_PROGRAMS = {"run.json", "state.json", "files.json", "baselines.json", "config.json", "manifest.json"}
# Problems that depend on the machine that the test runs on.
OF_THIS_MACHINE = ("needs the package ray", "there is no sbatch here")


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of a page; an indented one has no language."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the page's code blocks, whose `line` is that of their first line."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        if fence := re.match(r"```(\w*)", lines[number]):
            first = number + 1
            number = next(i for i in range(first, len(lines)) if lines[i].startswith("```"))
            yield Block(page, first + 1, fence[1], "\n".join(lines[first:number]))
        elif lines[number].startswith("    ") and not lines[number - 1].strip():
            first = number
            while number < len(lines) and lines[number].startswith("    "):
                number += 1
            yield Block(page, first + 1, "", "\n".join(line[4:] for line in lines[first:number]))
            continue
        number += 1


def prose_of(page: Path) -> str:
    """The page without its fenced blocks, in one line per paragraph or table row."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?<!\n)\n(?!\n|\||#|- )", " ", text)


def commands_of(text: str) -> Iterator[list[str]]:
    """Yield the words of each command: 'A=1 a b && c' -> ['a', 'b'], ['c']."""
    for line in text.splitlines():
        words = shlex.split(line.replace("\\S", "\\\\S").replace("\\a", "\\\\a"), comments=True)
        command = []
        for word in [*words, "&&"]:
            ends = word == "&&" or word.endswith(";")
            if word != "&&":
                command.append(word.removesuffix(";"))
            if ends:
                while command and re.match(r"[A-Z_]+=", command[0]):
                    del command[0]
                if command:
                    yield command
                command = []


def written_commands(page: Path) -> list[tuple[str, list[str]]]:
    """(where, words) of every command in the page's shell blocks and, where it begins like one, in its inline code."""
    found = []
    for block in blocks_of(page):
        if block.language in SHELLS or (not block.language and page == README):
            found += [(str(block), words) for words in commands_of(block.text)]
    begins = r"(?:[A-Z_]+=\S+ )*(?:python|accelerate|pytest|pip|sbatch)3? [^`]+"
    inline = re.findall(rf"`({begins})`", prose_of(page))
    return found + [(f"{page.relative_to(ROOT)}: `{text}`", words) for text in inline for words in commands_of(text)]


# What a command must be


class Parsed(Exception):
    """A program's arguments were accepted."""


def check_command(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Raise an AssertionError that says what is wrong with a command."""
    program, *arguments = words
    if program == "accelerate" and arguments[0] == "launch":
        check_launch(arguments[1:], tmp_path, monkeypatch)
    elif program == "python" and arguments[0] == "-m":
        check_program(load_module(arguments[1]), arguments[2:], tmp_path, monkeypatch)
    elif program == "python":
        check_program(load_script(arguments[0]), arguments[1:], tmp_path, monkeypatch)
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
    if "--help" in arguments:
        arguments = [word for word in arguments if word != "--help"]
    arguments = [word.removeprefix("/") for word in arguments]
    for word in arguments:
        make_stand_in(tmp_path, word)
    said = []
    end = None
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        patch.setattr(sys, "argv", [module.__name__, *arguments])
        # Some programs import the first of these into themselves, others inside main; the rest use argparse.
        patch.setattr(command_line, "parse_command_line", stops_after(command_line.parse_command_line))
        if hasattr(module, "parse_command_line"):
            patch.setattr(module, "parse_command_line", command_line.parse_command_line)
        patch.setattr(argparse.ArgumentParser, "parse_args", stops_after(argparse.ArgumentParser.parse_args))
        patch.setattr(argparse.ArgumentParser, "error", lambda self, message: said.append(message) or sys.exit(2))
        with contextlib.redirect_stderr(Lines(said)), contextlib.suppress(Parsed):
            end = exit_code_of(lambda: module.main(arguments))
    problems = [text for text in said if not any(reason in text for reason in OF_THIS_MACHINE)]
    problems = [text for text in problems if text.strip() and "problems; nothing was started" not in text]
    assert not (end and problems), "".join(problems)


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


class Lines:
    """A text stream that appends what is written to a list."""

    def __init__(self, said: list[str]):
        self.said = said

    def write(self, text: str):
        self.said.append(text)

    def flush(self):
        pass


def make_stand_in(folder: Path, word: str):
    """Make the file or folder that a word of a command names: 'texts/*.txt', 'data/edu', 'a.jsonl', 'a:0.9,b:0.1'."""
    for part in re.split(r":[\d.]+,?", word):
        name = part.replace("*", "stand-in")
        path = folder / name
        if not part or part.startswith("-") or path.exists() or not re.fullmatch(r"[\w./-]+", name):
            continue
        if path.suffix in (".txt", ".jsonl"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}\n")
        elif part.startswith(("data/", "runs/", "shared/edu")) and not path.suffix:
            path.mkdir(parents=True)
            if path.parent.parent.name == "runs":
                (path / "config.json").write_text("{}")


def check_pytest(arguments: list[str]):
    """Paths exist, and markers are declared."""
    project = (ROOT / "pyproject.toml").read_text()
    previous = None
    for word in arguments:
        if previous == "-m":
            assert re.search(rf'^    "{word}: ', project, re.MULTILINE), f"the marker {word} is not declared"
        elif previous != "-k" and not word.startswith("-"):
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
    """Import the module that `python -m` would run; an alias stands for the module that it gets its main from."""
    if name.split(".")[0] not in (PACKAGE, "benchmarks"):
        assert importlib.util.find_spec(name), f"there is no module {name}"
        return argparse.Namespace(__name__=name)
    module = importlib.import_module(name)
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
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_its_program_accepts(page, tmp_path, monkeypatch):
    wrong = []
    commands = written_commands(page)
    for number, (where, words) in enumerate(commands):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            check_command(words, folder, monkeypatch)
        except AssertionError as error:
            wrong.append(f"{where}: {shlex.join(words)}\n    {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(["commands that do not work:", *wrong])
    assert commands or page.name in ("platforms.md", "troubleshooting.md"), f"no command was found in {page}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_exists(page):
    text = page.read_text(encoding="utf-8")
    unknown = sorted(set(re.findall(r"(?<![\w-])--([a-z][a-z_-]+)\b", text)) - known_flags() - FOREIGN_FLAGS)
    assert not unknown, f"{page.relative_to(ROOT)} names flags that no program has: {', '.join(unknown)}"


@cache
def known_flags() -> frozenset[str]:
    """Every flag of our programs and of accelerate launch."""
    from accelerate.commands.launch import launch_command_parser

    flags = {option.lstrip("-") for action in launch_command_parser()._actions for option in action.option_strings}
    for path in [*ROOT.glob("*.py"), *(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
                flags |= {item.target.id for item in node.body if is_flag(item)}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument"):
                flags |= {a.value.lstrip("-") for a in node.args if isinstance(a, ast.Constant)}
    return frozenset(flags)


def is_flag(item: ast.stmt) -> bool:
    """Whether a statement of a dataclass is a field with a help text."""
    return isinstance(item, ast.AnnAssign) and item.value is not None and "help" in ast.unparse(item.value)


# Links, files and names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            wrong.append(f"{target}: there is no such file")
        elif anchor and anchor not in anchors_of(file):
            wrong.append(f"{target}: there is no such heading")
    assert not wrong, "\n".join([f"{page.relative_to(ROOT)}:", *wrong])


def anchors_of(page: Path) -> set[str]:
    """GitHub's anchors of a page: '## Bits per byte, and why?' -> 'bits-per-byte-and-why'."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\(([^)#\s]+)", README.read_text(encoding="utf-8")))
    missing = [str(page.relative_to(ROOT)) for page in PAGES[1:] if str(page.relative_to(ROOT)) not in linked]
    assert not missing, f"not linked from README.md: {', '.join(missing)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_and_every_function_named_beside_it_exists(page):
    wrong = [f"there is no {path}" for path in named_files(page) if find_file(path) is None]
    for path, name in named_functions(page):
        if (file := find_file(path)) is not None and name not in definitions_of(file):
            wrong.append(f"{file.relative_to(ROOT)} has no {name}")
    assert not wrong, "\n".join([f"{page.relative_to(ROOT)}:", *sorted(set(wrong))])


def named_files(page: Path) -> list[str]:
    """Paths in inline code that are of this repository, by their ending."""
    spans = re.findall(r"`([^`\s]+)`", prose_of(page))
    paths = [span for span in spans if re.fullmatch(r"[\w./-]+\.(py|yaml|sbatch|toml|json)", span)]
    folders = r"(tests|docs|benchmarks|examples|accelerate_configs)/[\w./-]*"
    paths += [span for span in spans if re.fullmatch(folders, span)]
    return [path for path in paths if path not in WRITTEN_BY_PROGRAMS]


def named_functions(page: Path) -> list[tuple[str, str]]:
    """(file, name) of "`file.py`: `name`, `other`" and of "`name` and `other` in `file.py`"."""
    text = prose_of(page)
    names = r"((?:`[A-Za-z_][\w.]*`(?:, and |, | and )?)+)"
    found = re.findall(rf"`([\w./-]+\.py)`:\s+{names}", text)
    found += [(path, listed) for listed, path in re.findall(rf"{names}\s+in\s+`([\w./-]+\.py)`", text)]
    return [(path, name) for path, listed in found for name in re.findall(r"`([^`]+)`", listed)]


def find_file(path: str) -> Path | None:
    """The file of a path as the pages write it: from the root, from the package, or a bare name of either."""
    candidates = [ROOT / path, ROOT / PACKAGE / path, ROOT / "accelerate_configs" / path]
    return next((candidate for candidate in candidates if candidate.exists()), None)


@cache
def definitions_of(file: Path) -> set[str]:
    """Names that a file defines: functions, classes, `Class.method`, constants."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign):
            names.add(ast.unparse(node.target))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            members = node.body if isinstance(node, ast.ClassDef) else []
            names |= {f"{node.name}.{member.name}" for member in members if isinstance(member, ast.FunctionDef)}
    return names


# The README


def test_the_readme_is_short_and_begins_with_two_commands():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES, f"README.md has {len(lines)} lines: move something to docs/"
    first, second = [line.strip() for line in lines if line.startswith("    ")][:2]
    begin = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt -e "
    launch = "accelerate launch --config_file accelerate_configs/cpu.yaml train_accelerate.py --preset quickstart"
    assert first == f"{begin}. && {launch}"
    assert second == f'{begin}".[test]" && pytest'
    # The continuous integration takes the second line that begins so (.ci/run).
    assert [line.strip() for line in lines if line.strip().startswith("python3 -m venv")] == [first, second]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_snippets_are_python(page):
    for block in blocks_of(page):
        if block.language == "python":
            compile(block.text, str(block), "exec")


def test_the_readmes_snippet_talks_to_a_model(tiny_tokenizer, tmp_path, monkeypatch, capsys):
    from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
    from modeling_gpt2repro.hub.export import save_hub_folder

    ids = {"vocab_size": len(tiny_tokenizer), "bos_token_id": tiny_tokenizer.bos_token_id, "eos_token_id": 0}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=1, n_head=2, n_embd=16, n_positions=128, **ids))
    save_hub_folder(model, tiny_tokenizer, tmp_path / "runs" / "quickstart" / "model")
    monkeypatch.chdir(tmp_path)
    snippet = next(block for block in blocks_of(README) if block.language == "python")
    exec(compile(snippet.text, str(snippet), "exec"), {})
    assert capsys.readouterr().out.startswith("Hello, I'm a language model,")


def test_the_figures_are_those_of_the_results_files():
    training = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for result in json.loads((ROOT / "benchmarks" / "results" / "training_step_cpu.json").read_text()):
        ratio = result["stock_over_ours"]["seconds"]["median"]
        memory = result["peak_memory_bytes"]["ours"] / result["peak_memory_bytes"]["stock"]
        settings = result["settings"]
        mode = "compiled" if settings["compile"] else "eager"
        row = rf"^\| {settings['shape']}\b.*\| {settings['dtype']} \| {mode} \| {ratio:.2f} \| {memory:.2f} \|$"
        assert re.search(row, training, re.MULTILINE | re.IGNORECASE), f"docs/training.md has no row {row}"
    data = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for result in json.loads((ROOT / "benchmarks" / "results" / "prepare_cpu.json").read_text()):
        for workers, figures in result["workers"].items():
            ours, lecture = (figures["tokens_per"]["seconds"][side] / 1e6 for side in ("ours", "lecture"))
            whole, warm = (figures["lecture_over_ours"][k]["median"] for k in ("seconds", "seconds_after_start_up"))
            row = f"| {workers} | {ours:.1f} | {lecture:.1f} | {whole:.2f} | {warm:.2f} |"
            assert row in data, f"docs/data.md has no row {row}"
