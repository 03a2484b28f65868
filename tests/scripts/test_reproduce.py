"""The section "Reproduce" of a model card, followed by somebody who has only the card and the repository."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS
from toy_runs import ROOT, as_flags

from modeling_gpt2repro.runs.config import current_commit

TOY = {"preset": "quickstart", "train_tokens": 20 * 1792, "warmup_tokens": 3584}
TOY |= {"eval_steps": 0, "eval_tokens": 10 * 224, "num_samples": 0}


def run(words: list[str], cwd: Path, **environment: str) -> str:
    """A command in a process that finds only the installed packages and the files in `cwd`."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    ended = subprocess.run(
        words,
        cwd=cwd,
        env={**kept, "PATH": path, "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow  # a training twice, in new processes
def test_the_section_leads_to_the_same_weights(tmp_path):
    if current_commit() is None:
        pytest.skip("this is not a git checkout, so the card names no commit")
    launch = ["accelerate", "launch", "--config_file", "accelerate_configs/cpu.yaml", "train_accelerate.py"]
    run([*launch, *as_flags(TOY), "--output_dir", str(tmp_path / "first")], cwd=ROOT, OMP_NUM_THREADS="1")
    card = (tmp_path / "first/model/README.md").read_text()
    assert str(tmp_path) not in card
    section = card.split("## Reproduce\n")[1]
    [block] = re.findall(r"^```bash\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)

    run(["git", "clone", "-q", str(ROOT), str(tmp_path / "clone")], cwd=tmp_path)
    done = []
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
        done.append(words[1] if "=" in words[0] else words[0])
        if words[:2] == ["pip", "install"]:  # these are installed
            wanted = dict(word.split("==") for word in words if "==" in word)
            assert {name: version(name).partition("+")[0] for name in wanted} == wanted
            continue
        environment = dict([words.pop(0).split("=")]) if "=" in words[0] else {}
        output = run(words, cwd=tmp_path / "clone", **environment)
    assert done == ["git", "pip", "accelerate", "sha256sum"]
    weights = (tmp_path / "first/model/model.safetensors").read_bytes()
    assert output.split() == [hashlib.sha256(weights).hexdigest(), "first/model/model.safetensors"]
    assert (tmp_path / "clone/first/model/model.safetensors").is_file()
