"""Several processes, and several programs, whose shards are on the Hub: one of a machine downloads, the others read."""

import itertools
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from patience import wait_until
from toy_runs import CPU_FP32, SCRIPT, TOKENS_PER_STEP, logged_values, toy_flags

pytestmark = pytest.mark.slow
numbers = itertools.count()
# Divisible among two and three processes.
SHORT = {"tokens_per_step": 3 * TOKENS_PER_STEP // 2, "per_device_train_batch_size": 2, "train_tokens": 2400}
SHORT |= {"save_steps": 2, "hellaswag": "none", "eval_steps": 4, "num_samples": 0}
# For programs without a launcher, which would end the others.
START = (
    "from modeling_gpt2repro.runtime import command_line; command_line.RANK_0_HEAD_START_SECONDS = 0\n"
    "import sys, train_accelerate; train_accelerate.main(sys.argv[1:])"
)
# Other processes wait for longer than a collective may take.
LONG_WORK = """
import threading
from datetime import timedelta
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from modeling_gpt2repro.runtime.collectives import call_main_process_first

accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=2))])
is_over = threading.Event()
if accelerator.is_main_process:
    threading.Timer(5, is_over.set).start()
print(call_main_process_first(accelerator, lambda: is_over.wait() if accelerator.is_main_process else "after it"))
"""


@pytest.fixture
def repository(hub, shards):
    """A dataset that is not in any cache yet: (its address, its folder)."""
    name = f"user/shared-{next(numbers)}"
    folder = hub.new_repository(f"datasets/{name}")
    shutil.copytree(shards, folder, dirs_exist_ok=True)
    return f"hf://{name}", folder


def sent(hub, address: str, seen: int = 0) -> Counter:
    """File -> how often the client asked where it is, which it does once for a download."""
    name = address.removeprefix("hf://")
    paths = [line["path"] for line in hub.log()[seen:] if line["method"] == "HEAD"]
    return Counter(re.sub(r".*/", "", path) for path in paths if f"/{name}/resolve/" in path)


@pytest.mark.parametrize("processes", [2, 3])
def test_one_process_downloads_and_the_run_is_the_one_on_local_shards(
    hub, warm_python, shards, repository, tmp_path, processes
):
    address, folder = repository
    for name, data in (("disk", shards), ("hub", address)):
        flags = toy_flags(tmp_path / name, data, **SHORT)
        warm_python.run_together(processes, SCRIPT, *flags, **CPU_FP32)
    assert logged_values(tmp_path / "hub") == logged_values(tmp_path / "disk") != []
    downloads = sent(hub, address)
    assert downloads == dict.fromkeys(downloads, 1)
    assert {path.name for path in folder.glob("*.npy")} <= downloads.keys()
    # As after an interruption: from the checkpoint, with the same shards in a cache that is empty again.
    cache = Path(warm_python.environment["HF_HOME"], "hub")
    shutil.rmtree(cache / address.replace("hf://", "datasets--").replace("/", "--"))
    for name, data in (("disk", shards), ("hub", address)):
        for finished in ("model", "step-000006"):
            shutil.rmtree(tmp_path / name / finished)
        flags = toy_flags(tmp_path / name, data, **SHORT, resume_from_checkpoint="latest")
        first, *_ = warm_python.run_together(processes, SCRIPT, *flags, **CPU_FP32)
        assert "resuming from step 4" in first.stdout
    assert logged_values(tmp_path / "hub") == logged_values(tmp_path / "disk")
    assert sent(hub, address) == {name: 2 * count for name, count in downloads.items()}


def test_a_download_that_fails_ends_all_processes_with_its_sentence(hub, warm_python, repository, tmp_path):
    address, folder = repository
    (folder / "train_000001.npy").unlink()
    seen = len(hub.log())
    flags = toy_flags(tmp_path / "run", address, **SHORT)
    ended = warm_python.run_together(3, "-c", START, *flags, check=False, **CPU_FP32)
    assert [process.returncode for process in ended] == [2, 2, 2]
    sentence = r"hf://.* cannot be downloaded: it lacks train_000001\.npy, which its manifest\.json names"
    for process in ended:
        assert len(re.findall(sentence, process.stderr)) == 1
        assert "Traceback" not in process.stderr
    assert sum("/tree/" in line["path"] for line in hub.log()[seen:]) == 1  # the others did not try it again


def test_processes_wait_for_a_download_that_takes_longer_than_a_collective_may(warm_python):
    first, other = warm_python.run_together(2, "-c", LONG_WORK, **CPU_FP32)
    assert (first.stdout, other.stdout) == ("True\n", "after it\n")


def test_two_programs_that_download_the_same_shards_at_once_both_get_them(
    hub, warm_python, shards, repository, tmp_path
):
    address, folder = repository
    seen = len(hub.log())
    flags = [toy_flags(tmp_path / name, address, **SHORT) for name in ("a", "b")]
    with warm_python.start(SCRIPT, *flags[0], **CPU_FP32) as (first, _):
        wait_until(lambda: sent(hub, address))
        warm_python.run(SCRIPT, *flags[1], **CPU_FP32)
        first.join()
        assert first.exitcode == 0
    warm_python.run(SCRIPT, *toy_flags(tmp_path / "disk", shards, **SHORT), **CPU_FP32)
    values = [logged_values(tmp_path / name) for name in ("a", "b", "disk")]
    assert values[0] == values[1] == values[2] != []
    log = [line["path"] for line in hub.log()[seen:] if line["method"] == "GET"]
    assert all(sum(path.name in line for line in log) == 1 for path in folder.glob("*.npy"))


def test_processes_of_the_validation_command_score_the_same_commit(hub, warm_python, finished, repository, tmp_path):
    address, _ = repository
    seen = len(hub.log())
    flags = ("--model", finished[0] / "model", "--shards", address, "--output", tmp_path / "scores.json")
    module = "modeling_gpt2repro.evaluation.validation"
    warm_python.run_together(2, "-m", module, *flags, "--device", "cpu", **CPU_FP32)
    scored = json.loads((tmp_path / "scores.json").read_text())["shards"]
    assert re.fullmatch(rf"{address}@[0-9a-f]{{40}}", scored)
    name = address.removeprefix("hf://")
    asked = [line["path"] for line in hub.log()[seen:] if name in line["path"]]
    assert [path for path in asked if path.startswith("/api/") and "/tree/" not in path] == [f"/api/datasets/{name}"]
