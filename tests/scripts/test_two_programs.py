"""Two programs in one folder: the second one is refused, waits, or takes over; nothing of the first is touched."""

import json
import os
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Process
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from patience import PATIENCE_SECONDS, wait_until
from toy_runs import CPU_FP32, SCRIPT, TOKENS_PER_STEP, at_step, logged_values, send_signal, toy_flags, train_here

import prepare_data
from modeling_gpt2repro.data.shards.verify import verify_shards
from modeling_gpt2repro.runs.read import read_metrics
from modeling_gpt2repro.storage import lock
from modeling_gpt2repro.storage.checksums import verify_checksums
from modeling_gpt2repro.storage.lock import LOCK_FILE, FolderLock
from modeling_gpt2repro.training.checkpoints import CHECKSUMS_FILE, find_checkpoints

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are stopped by signals")
LONG = {"train_tokens": 100_000 * TOKENS_PER_STEP, "eval_steps": 0, "num_samples": 0, "hellaswag": "none"}


@pytest.fixture(autouse=True)
def short_patience(monkeypatch):
    monkeypatch.setattr(lock, "GONE_SECONDS", 0.0)
    monkeypatch.setattr(lock, "RUNNING_PATIENCE_SECONDS", 1.0)


@pytest.fixture
def when_waiting(monkeypatch):
    """when_waiting(action): it is called once this process has said that it waits for another one."""

    def plan(action):
        print_now = lock.print_now

        def print_and_act(message):
            print_now(message)
            action()

        monkeypatch.setattr(lock, "print_now", print_and_act)

    return plan


def trains(folder: Path) -> bool:
    """Whether a run has logged steps and written a checkpoint."""
    return len(find_checkpoints(folder)) > 0 and len(logged_values(folder)) > 0


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def in_use(output: str, folder: Path, process: Process) -> bool:
    who = f": {folder} is in use by process {process.pid} on host {socket.gethostname()} since 20"
    last = output.splitlines()[-1]
    return who in last and last.endswith(": stop that first, or give another --output_dir.")


def test_a_run_beside_a_running_one_is_refused_fresh_or_resumed(shards, tmp_path, warm_python, capsys):
    run = tmp_path / "run"
    with warm_python.start(SCRIPT, *toy_flags(run, shards, **LONG), **CPU_FP32) as (first, _):
        wait_until(lambda: trains(run))
        os.kill(first.pid, signal.SIGSTOP)
        wait_until(lambda: is_stopped(first))
        (run / "run.json").rename(tmp_path / "run.json")  # as if the second had looked before the first had begun
        before = content(run)
        (run / ".step-000999.partial").mkdir()  # the first is writing it
        assert train_here(run, shards, seed=12) == 2
        assert in_use(capsys.readouterr().err, run, first)
        (tmp_path / "run.json").rename(run / "run.json")
        assert train_here(run, shards, resume_from_checkpoint="latest") == 2
        assert in_use(capsys.readouterr().err, run, first)
        assert train_here(run, shards, resume_from_checkpoint="latest", preflight=True) == 2
        assert in_use(capsys.readouterr().err, run, first)
        assert {name: data for name, data in content(run).items() if name != "run.json"} == before
        assert (run / ".step-000999.partial").is_dir()

        # A killed run is resumed, and what it left half-written goes.
        os.kill(first.pid, signal.SIGKILL)
        first.join()
        last = max(step for step in range(len(logged_values(run)) + 1) if (run / f"step-{step:06d}").exists())
        horizon = (last + 3) * TOKENS_PER_STEP
        assert train_here(run, shards, **LONG | {"train_tokens": horizon}, resume_from_checkpoint="latest") == 0
    assert "which may be dead" in capsys.readouterr().err
    assert not (run / ".step-000999.partial").exists()
    assert not (run / LOCK_FILE).exists()


SLOW_TO_STOP = """
import os, sys, time
import train_accelerate
from modeling_gpt2repro.pretrain.checkpointing import Checkpointer
save = Checkpointer.save

def slow_save(*arguments, final=False):
    while final and not os.path.exists(os.environ["IS_WAITED_FOR"]):
        time.sleep(0.01)
    save(*arguments, final=final)

Checkpointer.save = slow_save
train_accelerate.main(sys.argv[1:])
"""


def test_a_resumed_run_waits_for_the_last_checkpoint_of_a_stopping_one(
    shards, tmp_path, warm_python, capsys, monkeypatch, when_waiting
):
    monkeypatch.setattr(lock, "RUNNING_PATIENCE_SECONDS", 0.0)
    run = tmp_path / "run"
    is_waited_for = tmp_path / "is_waited_for"
    when_waiting(is_waited_for.touch)
    command = ["-c", SLOW_TO_STOP, *toy_flags(run, shards, **LONG)]
    with warm_python.start(*command, **CPU_FP32, IS_WAITED_FOR=str(is_waited_for)) as (first, _):
        wait_until(lambda: trains(run))
        first.terminate()
        wait_until(lambda: json.loads((run / LOCK_FILE).read_text())["stopping"])
        at_step(monkeypatch, 3, send_signal(signal.SIGTERM))
        assert train_here(run, shards, **LONG, resume_from_checkpoint="latest") == 143
        first.join()
        assert first.exitcode == 143
    printed = capsys.readouterr()
    assert f"{run} is in use by process {first.pid} on host" in printed.err
    assert "which is stopping: waiting up to 240 s." in printed.err
    handed_over = int(printed.out.partition("resuming from step ")[2].split()[0].rstrip(".,"))
    steps = [record["step"] for record in read_metrics(run) if "loss" in record]
    assert steps == list(range(1, handed_over + 4))  # none twice, none left out


def test_a_fresh_run_that_waited_for_another_one_does_not_begin_in_its_folder(shards, tmp_path, capsys, when_waiting):
    run = tmp_path / "run"
    with FolderLock(run) as first:
        first.acquire()
        first.announce_stop()
        wait_until(lambda: json.loads((run / LOCK_FILE).read_text())["stopping"])

        def end():
            (run / "run.json").write_text("{}")
            first.release()

        when_waiting(end)
        assert train_here(run, shards) == 2
    assert f"output_dir ({run}) holds another run: resume it with" in capsys.readouterr().err
    assert sorted(path.name for path in run.iterdir()) == ["run.json"]


def test_all_processes_of_a_refused_run_leave_together(shards, tmp_path, warm_python):
    start = (  # the second does not wait for a launcher to end it
        "from modeling_gpt2repro.runtime import command_line; command_line.RANK_0_HEAD_START_SECONDS = 0\n"
        "from modeling_gpt2repro.storage import lock; lock.RUNNING_PATIENCE_SECONDS = 1.0\n"
        "import sys, train_accelerate; train_accelerate.main(sys.argv[1:])"
    )
    run = tmp_path / "run"
    with FolderLock(run) as first:
        first.acquire()
        both = warm_python.run_together(2, "-c", start, *toy_flags(run, shards), check=False, **CPU_FP32)
        assert [process.returncode for process in both] == [2, 2]
        assert all(f"{run} is in use by process {os.getpid()} on host" in process.stderr for process in both)
        assert [path.name for path in run.iterdir()] == [LOCK_FILE]


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_a_stop_signal_ends_the_wait(shards, tmp_path, warm_python, stop, code):
    start = (  # a job in the background ignores SIGINT
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, train_accelerate; train_accelerate.main(sys.argv[1:])"
    )
    run = tmp_path / "run"
    with FolderLock(run) as first:
        first.acquire()
        first.announce_stop()
        wait_until(lambda: json.loads((run / LOCK_FILE).read_text())["stopping"])
        with warm_python.start("-c", start, *toy_flags(run, shards), **CPU_FP32) as (second, errors):
            wait_until(lambda: errors.exists() and "which is stopping: waiting up to 240 s." in errors.read_text())
            os.kill(second.pid, stop)
            second.join(PATIENCE_SECONDS)
            assert second.exitcode == code
            assert "Traceback" not in errors.read_text()


# Stops itself, as SIGSTOP does, the first time that it is where the argument says.
STOPPED_WHILE_PREPARING = """
import os, signal, sys
import prepare_data
from modeling_gpt2repro.data.prepare import assemble, local, workspace

def stop_first(module, name):
    original = getattr(module, name)

    def stopped(*arguments, **options):
        setattr(module, name, original)
        os.kill(os.getpid(), signal.SIGSTOP)
        return original(*arguments, **options)

    setattr(module, name, stopped)

moments = {
    "before the spec": (workspace, "write_spec"),
    "while tokenizing": (local, "write_partition"),
    "before the shards": (assemble, "write_shards"),
    "before the manifest": (assemble, "write_manifest"),
    "before clearing up": (workspace.shutil, "rmtree"),
}
stop_first(*moments[sys.argv[1]])
prepare_data.main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def text_flags(tmp_path_factory, tiny_texts, tiny_tokenizer) -> list[str]:
    folder = tmp_path_factory.mktemp("texts")
    pq.write_table(pa.table({"text": tiny_texts}), folder / "texts.parquet", row_group_size=40)
    tiny_tokenizer.save_pretrained(folder / "tiny")
    flags = ["--train_files", str(folder / "texts.parquet"), "--tokenizer", str(folder / "tiny"), "--workers", "1"]
    return [*flags, "--shard_tokens", "8000"]


def prepare(folder: Path, flags: list[str]) -> int:
    try:
        prepare_data.main(["--output_dir", str(folder), *flags])
    except SystemExit as end:
        return end.code
    return 0


def is_stopped(process: Process) -> bool:
    return psutil.Process(process.pid).status() == psutil.STATUS_STOPPED


MOMENTS = ["before the spec", "while tokenizing", "before the shards", "before the manifest", "before clearing up"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_preparation_beside_another_is_refused_at_any_moment_until_that_is_killed(
    text_flags, tmp_path, warm_python, capsys, moment
):
    out = tmp_path / "out"
    flags = ["--output_dir", out, *text_flags]
    with warm_python.start("-c", STOPPED_WHILE_PREPARING, moment, *flags) as (first, _):
        wait_until(lambda: is_stopped(first))
        before = content(out)
        assert prepare(out, text_flags) == 2
        assert in_use(capsys.readouterr().err, out, first)
        assert prepare(out, [*text_flags, "--max_tokens", "9000"]) == 2
        assert in_use(capsys.readouterr().err, out, first)
        assert content(out) == before
        first.kill()
        first.join()
        assert (out / LOCK_FILE).exists()
        assert prepare(out, text_flags) == 0
    assert "which may be dead" in capsys.readouterr().err
    assert verify_shards(out) == []
    assert not (out / LOCK_FILE).exists()


@pytest.mark.parametrize("moment", ["before the manifest", "before clearing up"])
def test_a_preparation_that_waited_for_one_that_ended_uses_its_shards(
    text_flags, tmp_path, warm_python, capsys, monkeypatch, when_waiting, moment
):
    monkeypatch.setattr(lock, "RUNNING_PATIENCE_SECONDS", PATIENCE_SECONDS)
    out = tmp_path / "out"
    flags = ["--output_dir", out, *text_flags]
    with warm_python.start("-c", STOPPED_WHILE_PREPARING, moment, *flags) as (first, errors):
        wait_until(lambda: is_stopped(first))
        when_waiting(lambda: os.kill(first.pid, signal.SIGCONT))
        assert prepare(out, text_flags) == 2
        assert f"{out} holds prepared shards already: use them, or give" in capsys.readouterr().err
        first.join()
        assert first.exitcode == 0, errors.read_text()
    assert prepare(tmp_path / "alone", text_flags) == 0
    assert content(out) == content(tmp_path / "alone")


# Each turn is what a run does when it starts, and then a save.
CLEAN_AND_SAVE = """
import sys
from pathlib import Path

import torch
from accelerate import Accelerator

from modeling_gpt2repro.runs.read import read_metrics
from modeling_gpt2repro.storage import lock
from modeling_gpt2repro.training.checkpoints import RetentionPolicy, remove_stale_files, save_checkpoint

lock.POLL_SECONDS = 0.0005
lock.RUNNING_PATIENCE_SECONDS = lock.PATIENCE_SECONDS
folder, first_step = Path(sys.argv[1]), int(sys.argv[2])
accelerator = Accelerator(cpu=True)

def write_model(temporary):
    for part in range(10):
        (temporary / f"part{part}").write_bytes(bytes(1000))

for step in range(first_step, 200, 2):
    with lock.FolderLock(folder) as held:
        held.acquire()
        remove_stale_files(folder)
        problem = save_checkpoint(
            accelerator,
            folder / f"step-{step:06d}",
            write_model,
            optimizer={"moment": torch.zeros(10)},
            random={"0.cpu": torch.zeros(10)},
            state={},
            policy=RetentionPolicy(),
        )
        assert problem is None, problem
"""


def test_of_two_hundred_saves_beside_starting_runs_none_is_damaged(tmp_path, warm_python):
    with ThreadPoolExecutor() as pool:
        first = pool.submit(warm_python.run, "-c", CLEAN_AND_SAVE, tmp_path / "run", 0, **CPU_FP32)
        second = pool.submit(warm_python.run, "-c", CLEAN_AND_SAVE, tmp_path / "run", 1, **CPU_FP32)
        first.result()
        second.result()
    found = find_checkpoints(tmp_path / "run")
    assert [path.name for path in found] == [f"step-{step:06d}" for step in range(200)]
    files = {f"part{part}" for part in range(10)}
    files |= {f"training_state/{name}" for name in ("optimizer.safetensors", "random.safetensors", "state.json")}
    for checkpoint in found:
        assert verify_checksums(checkpoint, CHECKSUMS_FILE) is None
        assert json.loads((checkpoint / CHECKSUMS_FILE).read_text()).keys() == files
    assert len(list((tmp_path / "run").iterdir())) == 200
