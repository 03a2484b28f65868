"""A download of shards that Ctrl-C or SIGKILL ends, in a process of its own, over LFS and over Xet."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from patience import PATIENCE_SECONDS, wait_until
from pushing import files_in
from toy_runs import ROOT

pytestmark = pytest.mark.slow
CONTENT = "GET /(lfs|xorbs)/"
DESCRIBE = [sys.executable, "-m", "modeling_gpt2repro.data.describe"]


def write_shards(hub, name, prepared):
    """The dataset `user/NAME`, with contents that the storage has not seen before: its folder."""
    folder = hub.new_repository(f"datasets/user/{name}")
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    new, end_of_text = np.frombuffer(hashlib.sha256(name.encode()).digest(), np.uint8), manifest["end_of_text_id"]
    for entry in manifest["splits"]["train"]["shards"]:
        ids = np.load(folder / entry["file"])
        ids[:32] = np.where((ids[:32] == end_of_text) | (new == end_of_text), ids[:32], new)
        np.save(folder / entry["file"], ids)
        entry["sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def requests(hub, seen: int) -> list[str]:
    """What the CDN was asked for: files over LFS, chunks over Xet."""
    return [line["path"] for line in hub.log()[seen:] if re.search(CONTENT, f"{line['method']} {line['path']}")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_download_that_is_stopped_ends_at_once_and_continues_with_what_is_missing(
    either_hub, shards, tmp_path, number, terminal_signals
):
    hub, address = either_hub, f"hf://user/stopped-{number}"
    folder = write_shards(hub, f"stopped-{number}", shards)
    cache = tmp_path / f"home/hub/datasets--user--stopped-{number}"
    seen = len(hub.log())
    two_files = {"match": CONTENT, "times": 2, "drop": 10**9}  # sent as usual
    with (
        hub.faults(two_files, {"match": CONTENT, "until": "never"}),
        subprocess.Popen([*DESCRIBE, address], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process,
    ):
        wait_until(lambda: len(list(cache.glob("snapshots/*/*.npy"))) == 2 and len(requests(hub, seen)) >= 4)
        process.send_signal(number)
        errors = process.communicate(timeout=PATIENCE_SECONDS)[1]
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert re.search(rf"\ndescribe\.py: the download of {address}@\w+ was interrupted: [^\n]*\n\Z", errors)
        assert "Traceback" not in errors
    assert list(cache.glob("blobs/*.incomplete"))
    seen = len(hub.log())
    again = subprocess.run([*DESCRIBE, address], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert again.returncode == 0, again.stderr
    (snapshot,) = cache.glob("snapshots/*")
    assert files_in(snapshot) == files_in(folder)
    assert len(requests(hub, seen)) == len(list(folder.glob("*.npy"))) - 2
    assert not list(cache.glob("blobs/*.incomplete"))


@pytest.mark.parametrize("times", [1, 3])
def test_content_that_is_not_that_of_the_file_is_downloaded_again(either_hub, shards, tmp_path, times):
    hub, name = either_hub, f"damaged-{times}"
    folder = write_shards(hub, name, shards)
    faults = [
        {"match": CONTENT, "status": 200, "body": "\0" * 3000, "times": times},
        {"match": CONTENT, "drop": 700, "times": 2},
        {"match": CONTENT, "status": 503, "times": 2},
        {"match": "resolve|reconstructions", "status": 429, "headers": {"Retry-After": "1"}, "times": 2},
    ]
    with hub.faults(*faults):
        command = [*DESCRIBE, f"hf://user/{name}"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert result.returncode == 0, result.stderr
    (snapshot,) = (tmp_path / f"home/hub/datasets--user--{name}/snapshots").iterdir()
    assert files_in(snapshot) == files_in(folder)
