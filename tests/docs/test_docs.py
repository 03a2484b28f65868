"""README and docs against the code: commands parse, names exist, links lead somewhere, snippets run.

A failure names the page, the line and what to mend. Nothing is downloaded and no command is run, but the README's
snippet that talks to a model.
"""

import ast
import json
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
from command_checks import check_command, known_flags
from markdown_pages import PAGES, README, ROOT, anchors_of, blocks_of, named_files, named_functions, written_commands

from benchmarks import first_model, memory
from benchmarks.reports import first_model_page, ladder, recipes_report, results_table
from benchmarks.reports.page import split_page

PACKAGE = "modeling_gpt2repro"
README_LINES = 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_is_one_that_its_program_accepts(page, tmp_path, monkeypatch):
    wrong = []
    commands = written_commands(page)
    for number, (where, words) in enumerate(commands):
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            check_command(words, folder, monkeypatch)
        except (AssertionError, ImportError) as error:
            wrong.append(f"{where}: {shlex.join(words)}\n    {str(error).splitlines()[0]}")
    assert not wrong, "\n".join(["commands that do not work:", *wrong])
    assert commands or page.name in ("platforms.md", "troubleshooting.md", "CHANGELOG.md"), (
        f"no command was found in {page}"
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_flag_exists(page):
    text = page.read_text(encoding="utf-8")
    unknown = sorted(set(re.findall(r"(?<![\w-])--([a-z][a-z_-]+)\b", text)) - known_flags())
    assert not unknown, f"{page.relative_to(ROOT)} names flags that no program has: {', '.join(unknown)}"


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
    assert second == f'{begin}".[test]" && pytest -n 2'
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
    model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=1, n_head=2, n_embd=16, n_positions=512, **ids))
    save_hub_folder(model, tiny_tokenizer, tmp_path / "runs" / "quickstart" / "model")
    monkeypatch.chdir(tmp_path)
    snippet = next(block for block in blocks_of(README) if block.language == "python")
    exec(compile(snippet.text, str(snippet), "exec"), {})
    assert capsys.readouterr().out.startswith("A story of Mila and Tom, Mrs. Plum, a fox, a bell and some honey.")


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
        for peak in result["peak_memory_bytes"]:
            if peak["megabytes"] == result["settings"]["megabytes"]:
                megabytes = [
                    f"{peak[processes]['ours'] / 1e6:,.0f}, lecture's {peak[processes]['lecture'] / 1e6:,.0f}"
                    for processes in ("parent", "all_processes")
                ]
                cells = f"| {' | '.join(megabytes)} |"
                assert cells in data, f"docs/data.md has no cells {cells}"


def test_the_table_of_recipes_is_that_of_its_results():
    page = ROOT / "docs" / "recipes.md"
    results = json.loads((ROOT / "benchmarks" / "results" / "recipes_cpu.json").read_text())
    before, after = split_page(page, recipes_report.MARKERS)
    assert page.read_text(encoding="utf-8") == before + recipes_report.table(results) + after


def test_the_table_of_memory_is_that_of_its_results():
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks" / "results" / "memory_reckoned.json").read_text())
    assert memory.table(results) in page
    for check in [check for result in results for check in result["checks"]]:
        assert check["reckoned"] == pytest.approx(check["measured"], rel=0.1)


def test_the_tables_of_performance_are_those_of_their_results():
    page = ROOT / "docs" / "performance.md"
    folder = ROOT / "benchmarks" / "results"
    [result] = json.loads((folder / "speed_ladder_cpu.json").read_text())
    measured = json.loads((folder / "amd-epyc-1-thread.json").read_text())
    for markers, table in (
        (ladder.MARKERS, ladder.table(result)),
        (results_table.MARKERS, results_table.table(measured)),
    ):
        before, after = split_page(page, markers)
        assert page.read_text(encoding="utf-8") == before + table + after


def test_the_lesson_is_made_of_its_results():
    file = ROOT / "benchmarks" / "results" / "first_model_cpu.json"
    lesson = (ROOT / "docs" / "first-model.md").read_text(encoding="utf-8")
    marks = re.escape(first_model_page.BEGIN).replace(r"\{\}", r"(\w+)") + r"\n(.*?)<!-- end of \1 -->"
    written = {name: part.strip() for name, part in re.findall(marks, lesson, re.DOTALL)}
    assert written.keys() == {"story", "table", "samples", "kinds"}
    if not file.exists():  # nothing has been measured, so no figure may be there
        assert set(written.values()) == {""}
        return
    results = json.loads(file.read_text(encoding="utf-8"))
    assert len(results) == len(first_model.RUNS)
    assert written == first_model_page.sections(results), "run python -m benchmarks.first_model again"
