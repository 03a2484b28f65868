"""The push command, and the files that arrived."""

import subprocess
import sys
from pathlib import Path

from patience import PATIENCE_SECONDS
from toy_runs import ROOT

from modeling_gpt2repro.hub.background_upload import upload_environment

UNREACHABLE_HUB = "http://127.0.0.1:9"  # the discard port: nothing listens there


def run_push(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "modeling_gpt2repro.hub.push", *map(str, words)]
    return subprocess.run(
        command, env=upload_environment(), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def files_in(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file, without the Hub's own .gitattributes."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name != ".gitattributes"}
