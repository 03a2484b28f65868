"""What is written in README and docs: code blocks, commands, headings, files and functions that are named."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests" / "README.md"]
SHELLS = ("bash", "powershell")
# Files that are in a run's, a model's or a data folder, not in the repository.
WRITTEN_BY_PROGRAMS = {"run.json", "state.json", "files.json", "baselines.json", "config.json", "manifest.json"}
WRITTEN_BY_PROGRAMS |= {"stopped.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
WRITTEN_BY_PROGRAMS |= {"gpt2_validation.json", "certificate.json"}


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
    begins = r"(?:[A-Z_]+=\S+ )*(?:python3?|accelerate|pytest|pip|sbatch|gpt2repro-\w+) [^`]+"
    inline = re.findall(rf"`({begins})`", prose_of(page))
    return found + [(f"{page.relative_to(ROOT)}: `{text}`", words) for text in inline for words in commands_of(text)]


def anchors_of(page: Path) -> set[str]:
    """GitHub's anchors of a page: '## Bits per byte, and why?' -> 'bits-per-byte-and-why'."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


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
