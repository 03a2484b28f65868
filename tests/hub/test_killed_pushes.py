"""Pushes that SIGKILL ends, in a process of their own, over LFS and over Xet; then the same command again."""

import re
import shutil
import subprocess
import sys
from collections import Counter

import pytest
from patience import PATIENCE_SECONDS, wait_until
from pushing import files_in
from toy_runs import ROOT

pytestmark = pytest.mark.slow
# Two shards a commit, so that there are several; and pauses that are a twentieth of what they are.
PUSH_SHARDS = """
import sys
import prepare_data
from modeling_gpt2repro.hub import push_shards
from modeling_gpt2repro.storage import retry
push_shards.COMMIT_FILES = 2
retry.FIRST_BACKOFF_SECONDS = 0.05
prepare_data.main(["--push_to_hub", *sys.argv[1:]])
"""
UPLOAD = "PUT /lfs/|POST /v1/xorbs/"
SENT_AS_USUAL = {"drop": 10**9}


def push_shards(folder, name, *more) -> list[str]:
    return [sys.executable, "-c", PUSH_SHARDS, "--output_dir", str(folder), "--hub_dataset_id", f"user/{name}", *more]


def run(command) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def kill_at(hub, command, request: str, earlier: int):
    """Kill the command when it makes such a request for the time after `earlier`; the request is not answered."""
    seen = len(hub.log())
    usual = [{"match": request, "times": earlier, **SENT_AS_USUAL}] if earlier else []
    with (
        hub.faults(*usual, {"match": request, "until": "never"}),
        subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process,
    ):
        wait_until(lambda: "late" in [line["status"] for line in hub.log()[seen:]], lambda: f"exit {process.poll()}")
        process.kill()


def stored(hub, seen: int) -> Counter:
    """What the storage took: the file, or the chunks, with the number of bytes -> how often."""
    return Counter(
        (line["path"].partition("?")[0], line["bytes"])
        for line in hub.log()[seen:]
        if line["status"] == 200 and re.match(UPLOAD, f"{line['method']} {line['path']}")
    )


@pytest.mark.parametrize(
    ("request_", "earlier"),
    [("repos/create", 0), (UPLOAD, 0), (UPLOAD, 2), ("/commit/", 0), ("/commit/", 1), ("/commit/", 3), ("/tree/", 1)],
)
def test_a_push_of_shards_that_is_killed_sends_nothing_twice_and_shows_no_half(
    either_hub, shards, tmp_path, request_, earlier
):
    hub, name = either_hub, f"killed-{re.sub('[^a-z]', '', request_)}-{earlier}"
    folder = shutil.copytree(shards, tmp_path / "prepared")
    seen = len(hub.log())
    command = push_shards(folder, name)
    kill_at(hub, command, request_, earlier)
    result = run(command)
    assert result.returncode == 0, result.stderr
    there = files_in(hub.root / "datasets/user" / name)
    there.pop("README.md")
    assert there == {name: content for name, content in files_in(folder).items() if name != "run.lock"}
    sent = stored(hub, seen)
    assert set(sent.values()) == {1}
    assert sum(size for _, size in sent) < 1.2 * sum(path.stat().st_size for path in folder.rglob("*"))
    for commit in (hub.root / "history/datasets/user" / name).iterdir():
        if (commit / "manifest.json").exists():
            assert {path.name for path in folder.glob("*.npy")} <= {path.name for path in commit.iterdir()}


def test_what_fails_on_the_way_costs_a_push_of_shards_nothing_but_time(either_hub, shards, tmp_path):
    hub = either_hub
    folder = shutil.copytree(shards, tmp_path / "prepared")
    seen = len(hub.log())
    faults = [
        {"match": "repos/create", "status": 503, "times": 2},
        {"match": UPLOAD, "status": 503, "times": 1},
        {"match": UPLOAD, "status": 429, "headers": {"Retry-After": "1"}, "times": 1},
        {"match": "/commit/", "status": 429, "headers": {"Retry-After": "1"}, "times": 1},
        {"match": "/commit/", "drop": 0, "times": 1},  # it is made, and the answer lost
        {"match": "", "status": 503, "times": 6},  # the Hub is away
    ]
    with hub.faults(*faults):
        result = run(push_shards(folder, "busy"))
    assert result.returncode == 0, result.stderr
    assert "trying again in" in result.stderr
    there = files_in(hub.root / "datasets/user/busy")
    assert {name: there[name] for name in files_in(folder) if name != "run.lock"} == {
        name: content for name, content in files_in(folder).items() if name != "run.lock"
    }
    assert set(stored(hub, seen).values()) == {1}


@pytest.mark.parametrize(("request_", "earlier"), [("twin-gpt2/preupload", 0), ("twin-gpt2/commit/", 0)])
def test_a_push_of_a_run_with_its_twin_that_is_killed_between_them_is_finished_by_the_same_command(
    either_hub, finished, tmp_path, monkeypatch, request_, earlier
):
    hub = either_hub
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    name = f"{re.sub('[^a-z]', '', request_)[:12]}-twin"
    folder = shutil.copytree(finished[0], tmp_path / "run")
    seen = len(hub.log())
    module = [sys.executable, "-m", "modeling_gpt2repro.hub.push"]
    command = [*module, str(folder), "--hub_model_id", f"user/{name}", "--stock_twin"]
    kill_at(hub, command, request_, earlier)
    assert list(tmp_path.glob("gpt2repro-push-*"))
    result = run(command)
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.glob("gpt2repro-push-*"))
    assert set(stored(hub, seen).values()) == {1}
    for repository in (name, f"{name}-gpt2"):
        commits = [line for line in hub.log()[seen:] if f"/user/{repository}/commit/" in line["path"]]
        assert sum(line["status"] == 200 for line in commits) == 1
    ours, twin = (files_in(hub.root / "models/user" / repository) for repository in (name, f"{name}-gpt2"))
    kept = {file: content for file, content in files_in(folder / "model").items() if file != "README.md"}
    assert {file: ours[file] for file in kept} == kept
    assert f"user/{name}-gpt2" in ours["README.md"].decode()
    assert "report/report.md" in ours
    assert f"Equal to user/{name}" in twin["README.md"].decode()
    assert "model.safetensors" in twin
