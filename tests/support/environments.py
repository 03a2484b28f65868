"""Virtual environments with other versions of packages, on top of this one's: tests of what others have installed."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path


def new_environment(folder: Path, *packages: str) -> Path:
    """Create one in `folder`, install `packages` there, and return its python; torch is this environment's."""
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True, capture_output=True)
    library = sysconfig.get_path("purelib", vars={"base": str(folder)})
    (Path(library) / "torch_from_here.pth").write_text(sysconfig.get_path("purelib"))  # searched after its own packages
    return python
