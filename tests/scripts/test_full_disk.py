"""A whole run on a small disk of its own that is really full, or really read-only, for a while."""

import json
import os
import subprocess
import sys

import pytest
from patience import PATIENCE_SECONDS
from toy_runs import ROOT, STEPS, WEIGHTS

UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]  # a user namespace may mount a tmpfs, as root or not

# The disk refuses from step 8 to 12, and when the final model is to be written; the second pause before another try
# gives it back.
PROGRAM = """
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_refusing_disk import between_steps
from toy_runs import train_here
from modeling_gpt2repro.pretrain import checkpointing

disk, shards, result, kind = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)

def refuse():
    if kind == "full":
        for block in (b"x" * 4096, b"x"):
            with open(disk / "filler", "ab", buffering=0) as file:
                try:
                    while True:
                        file.write(block)
                except OSError:
                    pass
    else:  # another mount of the same disk, because the lock file is open for writing
        subprocess.run(["mount", "--bind", disk, disk], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=True)

def give_back(*_):
    if kind == "full":
        (disk / "filler").unlink()
    else:
        subprocess.run(["umount", "--lazy", disk], check=True)

export, pauses = checkpointing.Checkpointer.export, []

def export_to_a_disk_that_refuses(*arguments):
    refuse()
    return export(*arguments)

def pause(seconds):
    pauses.append(seconds)
    if len(pauses) == 2:
        give_back()

checkpointing.Checkpointer.export = export_to_a_disk_that_refuses
checkpointing.time = SimpleNamespace(sleep=pause, perf_counter=time.perf_counter)  # others sleep, too
between_steps(pytest.MonkeyPatch(), {8: refuse, 13: give_back})
code = train_here(disk / "run", shards, save_total_limit=0)
files = {name: (disk / "run" / name).read_text() for name in ("metrics.jsonl", "samples.jsonl")}
names = sorted(path.name for path in (disk / "run").iterdir())
weights = (disk / "run/model/model.safetensors").read_bytes().hex()
result.write_text(json.dumps({"code": code, "pauses": pauses, "names": names, "weights": weights, **files}))
"""


def can_mount() -> bool:
    try:
        return subprocess.run([*UNSHARE, "true"], capture_output=True).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="needs unshare, and the right to mount in a user namespace")
@pytest.mark.parametrize(
    ("kind", "reason"), [("full", "No space left on device"), ("read-only", "Read-only file system")]
)
def test_a_disk_that_refuses_twice_costs_a_run_one_checkpoint(finished, shards, tmp_path, kind, reason):
    (tmp_path / "disk").mkdir()
    folders = [ROOT, ROOT / "tests/support", ROOT / "tests/scripts"]
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [*UNSHARE, sys.executable, "-c", PROGRAM, tmp_path / "disk", shards, tmp_path / "result.json", kind]
    ended = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )
    assert ended.returncode == 0, (ended.stdout[-1500:], ended.stderr[-2000:])
    assert ended.stderr.count(f"cannot be written ({reason}): the run continues") == 1
    assert ended.stderr.count("The disk takes writes again: what waited in memory is written.") == 1
    assert "Traceback" not in ended.stderr
    assert ended.stdout.count(f"The final model cannot be written ({reason}).") == 2
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["code"] == 0
    assert result["pauses"] == [30.0, 30.0]
    records = [json.loads(line) for line in result["metrics.jsonl"].splitlines()]
    assert [record["step"] for record in records if "loss" in record] == list(range(1, STEPS + 1))
    assert [json.loads(line)["step"] for line in result["samples.jsonl"].splitlines()] == [0, 10, 20, 30]
    kept = [name for name in result["names"] if "step-" in name]
    assert kept == ["step-000020", "step-000030"]
    assert bytes.fromhex(result["weights"]) == (finished[0] / WEIGHTS).read_bytes()
