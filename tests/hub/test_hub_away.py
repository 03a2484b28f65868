"""The end of a run while the Hub is away, or slow."""

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS, wait_until
from pushing import UNREACHABLE_HUB, as_pushed, files_in, run_push
from toy_runs import CPU_FP32, ROOT, SCRIPT, toy_flags, train_here

from modeling_gpt2repro.hub import background_upload
from modeling_gpt2repro.hub.background_upload import UploadQueue, upload_environment
from modeling_gpt2repro.pretrain.checkpointing import Checkpointer

SECONDS_A_LOOK = 10  # by the clock of these tests, which moves at each look at the uploads
COUNTDOWN = r"trying again in (\d+) s, giving up in (\d+) s"


class Queue(UploadQueue):
    """An upload queue whose pushes are shell scripts: one for checkpoints, and one for the final model."""

    def __init__(self, output_dir: Path, upload: str, **options):
        self.final_flags = output_dir / "final_flags"
        final = f'printf "%s\\n" "$@" > {shlex.quote(str(self.final_flags))}'
        script = f'case "$*" in *--branch*) {upload};; *) {final};; esac'
        super().__init__("user/any", "checkpoint", output_dir, command=["sh", "-c", script, "sh"], **options)

    def seconds_of_final_push(self) -> float:
        flags = self.final_flags.read_text().split()
        return float(flags[flags.index("--hub_wait_seconds") + 1])


@pytest.fixture
def looks(monkeypatch) -> list[float]:
    """The looks at the uploads so far, which are all that moves the clock."""
    pauses = []
    sleep = background_upload.time.sleep
    monkeypatch.setattr(background_upload.time, "sleep", lambda seconds: pauses.append(seconds) or sleep(seconds))
    monkeypatch.setattr(background_upload.time, "monotonic", lambda: SECONDS_A_LOOK * len(pauses))
    return pauses


def push_final(queue: UploadQueue, folder: Path, looks: list, shown: list[str], release: Path, after: int) -> int:
    """Push the final model; after so many looks at the upload before it, `release` appears."""

    def should_stop() -> bool:
        if len(looks) >= after:
            release.touch()
        return False

    return queue.push_final(folder, shown.append, should_stop)


def until(path: Path) -> str:
    return f"until [ -e {shlex.quote(str(path))} ]; do sleep 0.01; done"


def test_an_upload_that_says_that_the_hub_is_away_is_given_up_for_the_final_push(folder, tmp_path, looks):
    release = tmp_path / "release"
    retries = "; ".join(f"echo 'the Hub is away; trying again in {n} s, giving up in 290 s.'" for n in (1, 2, 4))
    upload = f"{until(release)}; {retries}; exec sleep {PATIENCE_SECONDS}"
    queue = Queue(tmp_path, upload, hub_wait_seconds=300)
    queue.enqueue(folder)
    shown = []
    assert push_final(queue, folder, looks, shown, release, after=50) == 0
    assert queue.seconds_of_final_push() == 300  # those 500 s were no time without the Hub
    assert shown[0].startswith("Training in progress, step 10: still being pushed to last-checkpoint, for 0 s now.")
    assert "300 s at most (--hub_wait_seconds), the final push included." in shown[0]
    reminders = [line for line in shown if "still being pushed" in line]
    assert len(reminders) >= 50 * SECONDS_A_LOOK / 40
    assert shown[len(reminders) :] == [
        "The Hub is away: only the final model is still pushed; checkpoints are given up.",
        "Training in progress, step 10: not pushed to last-checkpoint, dropped from the queue",
        f"Pushing {folder} to user/any; if the Hub is away, this waits 300 s at most.",
    ]


def test_an_upload_that_was_refused_once_or_twice_is_not_given_up(folder, tmp_path, looks):
    release = tmp_path / "release"
    retries = "; ".join(f"echo 'the Hub is away; trying again in {n} s, giving up in 290 s.'" for n in (1, 2))
    queue = Queue(tmp_path, f"{retries}; {until(release)}; echo pushed to main", hub_wait_seconds=300)
    queue.enqueue(folder)
    shown = []
    assert push_final(queue, folder, looks, shown, release, after=50) == 0
    assert "Training in progress, step 10: pushed to main" in shown
    assert queue.seconds_of_final_push() == 300


def test_an_upload_that_retried_long_ago_and_is_silent_since_is_not_given_up(folder, tmp_path, looks):
    release = tmp_path / "release"
    touch = f"touch -t 202001010000 {shlex.quote(str(tmp_path / 'push.log'))}"
    upload = f"echo 'the Hub is away; trying again in 60 s'; {touch}; {until(release)}"
    queue = Queue(tmp_path, f"{upload}; echo pushed to main", hub_wait_seconds=300)
    queue.enqueue(folder)
    wait_until(lambda: (tmp_path / "push.log").stat().st_size)
    shown = []
    assert push_final(queue, folder, looks, shown, release, after=50) == 0
    assert "Training in progress, step 10: pushed to main" in shown


def test_an_upload_that_has_given_up_leaves_the_final_push_the_rest_of_the_time(folder, tmp_path, looks):
    release = tmp_path / "release"
    queue = Queue(tmp_path, f"{until(release)}; echo try again later; exit 3", hub_wait_seconds=300)
    queue.enqueue(folder)
    shown = []
    assert push_final(queue, folder, looks, shown, release, after=9) == 0
    waited = next(i for i, line in enumerate(shown) if "not pushed, because try again later" in line)
    assert shown[waited + 1].startswith("The Hub is away")
    assert 300 - 300 < queue.seconds_of_final_push() <= 300 - 9 * SECONDS_A_LOOK


@contextmanager
def own_hub(hub, root: Path, monkeypatch) -> Iterator[subprocess.Popen]:
    """The process of a Hub that a test may kill; pushes of the test go there."""
    command = [sys.executable, ROOT / "tests/support/loopback_hub_writes.py", "--root", root]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        started = replace(hub, **json.loads(server.stdout.readline()), root=root)
        monkeypatch.setenv("HF_ENDPOINT", started.endpoint)
        yield server
        server.stdin.close()


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_a_run_whose_hub_dies_ends_soon_with_the_command_that_pushes_later(
    on_hub, shards, tmp_path, monkeypatch, capfd, strategy
):
    root = tmp_path / "hub"
    root.mkdir()
    run = tmp_path / "it's my run"
    save = Checkpointer.save
    with own_hub(on_hub, root, monkeypatch) as server:

        def kill_hub_and_save(*given, **options):
            server.kill()
            server.wait()
            return save(*given, **options)

        monkeypatch.setattr(Checkpointer, "save", kill_hub_and_save)
        given = {"push_to_hub": True, "hub_model_id": "user/mine", "train_tokens": 20 * 256, "hub_wait_seconds": 3}
        assert train_here(run, shards, hub_strategy=strategy, **given) == 3
    output, errors = capfd.readouterr()
    assert ("0: still being pushed to " in output) == (strategy != "every_save")
    assert re.search(r"Pushing .*/model to user/mine; if the Hub is away, this waits [0-3] s at most\.", output)
    pauses = [int(pause) for pause, _ in re.findall(COUNTDOWN, errors)]
    assert sum(pauses) <= 3
    assert "the Hub cannot be reached (" in errors.splitlines()[-1]

    command = re.search(r"^    (python -m modeling_gpt2repro.hub.push .*)$", output, re.MULTILINE)[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    with own_hub(on_hub, root, monkeypatch):
        environment = {**upload_environment(), "PATH": path}
        subprocess.run(command, shell=True, env=environment, check=True, timeout=PATIENCE_SECONDS)
    assert files_in(root / "models/user/mine") == as_pushed(run / "model", "user/mine")


def test_of_several_processes_only_one_waits_for_the_hub(finished, on_hub, warm_python, shards, tmp_path):
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "step-000030")
    given = {"push_to_hub": True, "hub_model_id": "user/any", "hub_wait_seconds": 3, "resume_from_checkpoint": "latest"}
    away = {"HF_ENDPOINT": UNREACHABLE_HUB, "HF_TOKEN": on_hub.token}
    first, second = warm_python.run_together(
        2, SCRIPT, *toy_flags(run, shards, **given), check=False, **CPU_FP32, **away
    )
    assert (first.returncode, second.returncode) == (3, 0), first.stderr  # one of them has it in its report
    assert "The run continues, and pushes once the Hub can be reached again." in first.stdout
    printed = first.stdout + second.stdout
    assert printed.count("Pushing ") == 1
    assert printed.count("but not on the Hub. Push it with") == 1


def test_a_hub_that_answers_late_is_not_given_up(on_hub, folder, tmp_path, looks):
    release = on_hub.root / "release"
    release.unlink(missing_ok=True)
    queue = UploadQueue("user/late", "checkpoint", tmp_path, hub_wait_seconds=PATIENCE_SECONDS)
    queue.enqueue(folder)
    shown = []
    with on_hub.faults({"match": "POST .*/commit/", "until": "release"}):
        assert push_final(queue, folder, looks, shown, release, after=100) == 0  # 1,000 s, by the clock of this test
    assert files_in(on_hub.root / "branches/models/user/late/last-checkpoint") == files_in(folder)
    assert "model.safetensors" in files_in(on_hub.root / "models/user/late")
    assert not any(line.startswith("The Hub is away") for line in shown)


@pytest.mark.parametrize("seconds", ["-1", "nan", "soon"])
def test_the_push_command_refuses_to_wait_for_what_is_no_time(seconds):
    result = run_push("model", "--hub_model_id", "user/any", "--hub_wait_seconds", seconds)
    assert result.returncode == 2
    assert "--hub_wait_seconds" in result.stderr.splitlines()[-1]
    assert seconds in result.stderr.splitlines()[-1]


def test_a_terminal_counts_down_until_the_push_gives_up(folder, on_hub):
    terminal, its_end = pty.openpty()
    command = [sys.executable, "-m", "modeling_gpt2repro.hub.push", folder, "--hub_model_id", "user/any"]
    environment = {**upload_environment(), "HF_ENDPOINT": UNREACHABLE_HUB}
    with subprocess.Popen([*command, "--hub_wait_seconds", "4"], env=environment, stderr=its_end) as push:
        os.close(its_end)
        shown = b""
        with suppress(OSError):  # the end of a terminal
            while True:
                shown += os.read(terminal, 1000)
    os.close(terminal)
    assert push.returncode == 3
    pauses, seconds_left = zip(*re.findall(rf"\r{COUNTDOWN}", shown.decode()), strict=True)
    assert pauses == ("1", "2", "1")
    assert sorted(seconds_left, reverse=True) == list(seconds_left)
    assert seconds_left[0] == "4"
    assert shown.decode().splitlines()[-1].startswith("the Hub cannot be reached (")
