"""A new Python that knows neither the package nor this checkout: what somebody has who downloads a model."""

import os
import subprocess
import sys
from pathlib import Path

from patience import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]
# An editable install is a finder, or a line in a .pth file. Not by prefix: a .venv may lie inside the checkout.
HIDE_PACKAGE = f"""
import sys
sys.path = [path for path in sys.path if path.rstrip("/\\\\") != {str(ROOT)!r}]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
try:
    import modeling_gpt2repro
    raise SystemExit("the package is there: this would prove nothing")
except ModuleNotFoundError:
    pass
"""


def run_without_package(program: str, *arguments: object, cwd: Path, **environment: str) -> str:
    """Run a program with the arguments in sys.argv[1:], offline; returns what it printed, once it has succeeded."""
    result = subprocess.run(
        [sys.executable, "-I", "-c", HIDE_PACKAGE + program, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "home"), **environment},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout
