"""The push command, in a process of its own or in this one, and the files that arrived."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE_SECONDS
from toy_runs import ROOT

from modeling_gpt2repro.hub.background_upload import upload_environment
from modeling_gpt2repro.hub.push import main

UNREACHABLE_HUB = "http://127.0.0.1:9"  # the discard port: nothing listens there


def run_push(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "modeling_gpt2repro.hub.push", *map(str, words)]
    return subprocess.run(
        command, env=upload_environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def push_in_process(*words) -> subprocess.CompletedProcess:
    """The same without the seconds that a process takes to start; the fixture `here` must be used."""
    words = list(map(str, words))
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as stdout, contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            main(words)
        except SystemExit as ended:
            code = ended.code
    return subprocess.CompletedProcess(words, code, stdout.getvalue(), stderr.getvalue())


def files_in(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file, without the Hub's own .gitattributes."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def as_pushed(folder: Path, repository: str) -> dict[str, bytes]:
    """The same of a model's folder as it is on the Hub, where the card's example names the repository."""
    files = files_in(folder)
    this_folder = b'folder = "."  # path of this folder, or its name on the Hub'
    assert files["README.md"].count(this_folder) == 1
    return files | {"README.md": files["README.md"].replace(this_folder, f'folder = "{repository}"'.encode())}
