"""Pushing to the Hub: the command, the pushes of a run beside it, and a training that pushes."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, close_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from toy_runs import ROOT, rows_of, train_here

from modeling_gpt2repro.hub import background_upload as pushes
from modeling_gpt2repro.hub import upload as push_command
from modeling_gpt2repro.hub.background_upload import UploadQueue
from modeling_gpt2repro.hub.upload import explain_hub_error
from modeling_gpt2repro.pretrain import setup
from modeling_gpt2repro.pretrain.checkpointing import Checkpointer
from modeling_gpt2repro.storage.retry import backoff_seconds, is_transient, retry
from modeling_gpt2repro.training.arguments import TrainArguments

AWAY = "http://127.0.0.1:9"  # nobody listens there


@pytest.fixture
def on_hub(hub, tmp_path, monkeypatch):
    """The processes that this one starts talk to the loopback Hub, and may write to it."""
    environment = {**hub.environment(tmp_path / "home"), "HF_TOKEN": hub.token}
    for name in os.environ.keys() - environment:  # such as HF_HUB_OFFLINE
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return hub


@pytest.fixture
def folder(tmp_path):
    """A folder as a checkpoint has it, in small."""
    made = tmp_path / "step-000010"
    (made / "training_state").mkdir(parents=True)
    (made / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights" * 1000)
    (made / "training_state" / "optimizer.safetensors").write_bytes(b"moments" * 2000)
    return made


def run_push(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "modeling_gpt2repro.hub.push", *map(str, words)]
    return subprocess.run(command, env=pushes.environment(), cwd=ROOT, capture_output=True, text=True, timeout=60)


def files_in(folder: Path) -> dict[str, bytes]:
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in files.items() if name != ".gitattributes"}


def commits(hub, name: str) -> int:
    return sum(bool(re.search(f"{name}/commit/", line["path"])) and line["status"] == 200 for line in hub.log())


def test_a_pushed_folder_is_what_lies_there_and_takes_the_place_of_earlier_weights(on_hub, folder):
    repository = on_hub.new_repository("models/user/taken")
    for earlier in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "training_state/state.json"):
        (repository / earlier).parent.mkdir(exist_ok=True)
        (repository / earlier).write_bytes(b"of other weights")
    of_a_person = {"notes.md": b"1", "lora/adapter_model.safetensors": b"2"}
    (repository / "lora").mkdir()
    for name, content in of_a_person.items():
        (repository / name).write_bytes(content)
    result = run_push(folder, "--hub_model_id", "taken", "--message", "the tenth")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(rf"pushed to {on_hub.endpoint}/user/taken \(commit \w{{7}}\)\n", result.stdout)
    model = {name: content for name, content in files_in(folder).items() if not name.startswith("training_state")}
    assert files_in(repository) == {**model, **of_a_person}
    assert commits(on_hub, "user/taken") == 1
    assert run_push(folder, "--hub_model_id", "user/taken").returncode == 0
    assert commits(on_hub, "user/taken") == 1  # nothing is sent twice


def test_a_whole_checkpoint_goes_to_a_branch_and_leaves_main_alone(on_hub, folder):
    words = ("--hub_model_id", "user/branched", "--branch", "last-checkpoint", "--with_training_state")
    result = run_push(folder, *words)
    assert result.returncode == 0, result.stderr
    assert files_in(on_hub.root / "branches/models/user/branched/last-checkpoint") == files_in(folder)
    assert files_in(on_hub.root / "models/user/branched") == {}


@pytest.mark.parametrize(
    ("environment", "words", "said"),
    [
        ({"HF_TOKEN": "hf_reader"}, "user/there", "this token may not write to user/there (You don't have the rights"),
        ({"HF_TOKEN": "hf_reader"}, "user/not-there", "this token may not write to user/not-there"),
        ({}, "somebody/else", "another --hub_model_id"),
        ({"HF_TOKEN": "hf_nonsense"}, "user/there", "does not accept this token"),
        ({"HF_TOKEN": ""}, "user/there", "no token"),
        ({"HF_HUB_OFFLINE": "1"}, "user/there", "HF_HUB_OFFLINE is set"),
        ({}, "user/no such name", "alphanumeric"),
    ],
)
def test_what_cannot_be_pushed_to_is_found_out_by_a_check(on_hub, monkeypatch, environment, words, said):
    on_hub.new_repository("models/user/there")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run_push("--check", "--hub_model_id", words)
    assert result.returncode == 2
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert "hf_" not in result.stderr + result.stdout
    assert files_in(on_hub.root / "models/user/there") == {}


def test_a_check_leaves_nothing_behind_but_the_repository(on_hub):
    result = run_push("--check", "--hub_model_id", "checked")
    assert (result.returncode, result.stdout) == (0, f"can be written: {on_hub.endpoint}/user/checked\n")
    assert files_in(on_hub.root / "models/user/checked") == {}
    assert not list((on_hub.root / "branches/models/user/checked").glob("*"))
    assert commits(on_hub, "user/checked") == 1  # only a commit proves it
    assert any("/lfs/user/checked/" in line["path"] for line in on_hub.log())  # and only data the way to their store
    with on_hub.faults({"match": "commit/write-check", "status": 403}):
        assert run_push("--check", "--hub_model_id", "checked").returncode == 2
    assert not list((on_hub.root / "branches/models/user/checked").glob("*"))


def test_a_repository_that_is_public_is_not_taken_for_a_private_one(monkeypatch):
    asked = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            asked.append(private)
            return SimpleNamespace(repo_id=name)

        def repo_info(self, name):
            return SimpleNamespace(private=False)

    monkeypatch.setattr(push_command, "HfApi", Api)
    monkeypatch.setattr(push_command, "get_token", lambda: "hf_any")
    with pytest.raises(ValueError, match="user/any is there already, and public"):
        push_command.check_rights("user/any", private=True)
    assert asked == [True]


@pytest.mark.parametrize(("status", "passing"), [(400, False), (409, True), (412, True), (429, True), (500, True)])
def test_what_the_hub_refuses_for_now_is_told_from_what_it_refuses(status, passing):
    error = HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))
    assert is_transient(error) is passing


def test_a_folder_above_the_model_is_not_taken_for_it(folder):
    with pytest.raises(ValueError, match="give model/ or step"):
        push_command.push(folder.parent, "user/any")
    with pytest.raises(SystemExit, match="2"):
        push_command.main(["--hub_model_id", "user/any"])


def raised(error: BaseException, cause: BaseException | None) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (
            raised(RuntimeError("while uploading"), raised(HTTPError("no route"), OSError(113, "No route to host"))),
            True,
        ),
        (ConnectionError("by Xet"), True),
        (RuntimeError("by Xet"), True),
        (PermissionError(13, "Permission denied", "model.safetensors"), False),
        (raised(RuntimeError("while uploading"), OSError(5, "Input/output error")), False),
    ],
)
def test_a_fault_of_this_machine_is_told_from_one_of_the_connection(error, passing):
    assert is_transient(error) is passing
    if not passing:
        assert "because of this machine (" in explain_hub_error(error, "user/any")


@pytest.mark.parametrize("where", ["repos/create", "validate-yaml", "commit/main", "drop the answer"])
def test_a_hub_that_is_away_for_a_moment_is_waited_for(on_hub, folder, where):
    rule = {"match": "commit/main", "drop": 0} if where == "drop the answer" else {"match": where, "status": 503}
    name = f"user/patient-{len(where)}"
    with on_hub.faults({**rule, "times": 1}):
        result = run_push(folder, "--hub_model_id", name)
    assert result.returncode == 0, result.stderr
    assert "trying again in 1 s" in result.stderr
    assert "model.safetensors" in files_in(on_hub.root / "models" / name)
    assert commits(on_hub, name) == (0 if where == "drop the answer" else 1)  # an answer that is lost has no status


@pytest.mark.parametrize(
    ("mismatches", "extra", "told"),
    [
        ([{"path": "model.safetensors"}], [], "model.safetensors"),
        ([], ["README.md", "training_state/optimizer.safetensors"], "README.md"),
        ([], ["training_state/optimizer.safetensors", ".cache/huggingface/download/x.lock"], None),
    ],
)
def test_what_arrived_otherwise_is_found_out(folder, monkeypatch, mismatches, extra, told):
    class Api:
        endpoint = "https://hub"

        def upload_folder(self, **given):
            return SimpleNamespace(oid="0" * 40)

        def verify_repo_checksums(self, *given, **more):
            return SimpleNamespace(mismatches=mismatches, extra_paths=extra)

    monkeypatch.setattr(push_command, "open_repository", lambda name, private: (Api(), name))
    if told is None:
        assert push_command.push(folder, "user/any") == "https://hub/user/any (commit 0000000)"
    else:
        with pytest.raises(RuntimeError, match=f"are not those of .*: {told}$"):
            push_command.push(folder, "user/any")


def test_a_hub_that_stays_away_is_told_from_a_refusal(folder, on_hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", AWAY)
    result = run_push(folder, "--hub_model_id", "user/away", "--patience_seconds", 0)
    assert result.returncode == 3
    assert "the Hub cannot be reached (" in result.stderr


def test_a_hub_that_does_not_answer_is_not_waited_for_for_ever(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(push_command, "HfApi", partial(HfApi, endpoint=address))
        monkeypatch.setattr(push_command, "get_token", lambda: "hf_any")
        monkeypatch.setattr(push_command, "ANSWER_SECONDS", 0.1)
        later = Timer(5, silent.close)  # so that this ends whatever the client does
        later.start()
        started = time.monotonic()
        try:
            with pytest.raises(HTTPError):
                push_command.check_rights("user/any")
        finally:
            later.cancel()
            close_session()
    assert time.monotonic() - started < 4


def test_patience_ends_and_refusals_are_not_tried_again(monkeypatch):
    now, said, tried = [0.0], [], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def attempt():
        tried.append(now[0])
        raise ConnectionError("no route")

    with pytest.raises(ConnectionError):
        retry(attempt, 200, on_retry=said.append)
    assert tried == [0, 1, 3, 7, 15, 31, 63, 123, 183]
    assert len(said) == len(tried) - 1
    endless = backoff_seconds()
    assert [next(endless) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


def waits(seconds: float):
    """In place of a push: a process that takes its time, then names the folder's files."""
    program = "import sys, time, os; time.sleep(float(sys.argv[1])); print(sorted(os.listdir(sys.argv[2])))"
    return lambda self, *words: [sys.executable, "-c", program, str(seconds), *words]


def news_of(running: UploadQueue) -> list[str]:
    news = []
    while running._running or running._waiting:
        news += running.news()
        time.sleep(0.01)
    return news + running.news()


def checkpoint(folder: Path, step: int) -> Path:
    return Path(shutil.copytree(folder, folder.parent / "run" / f"step-{step:06d}"))


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("end", []),
        ("every_save", ["step 10: main", "step 30: main"]),
        ("checkpoint", ["step 10: main", "step 30: last-checkpoint", "step 30: main"]),
        (
            "all_checkpoints",
            ["step 10: main", *(f"step {n}0: step-0000{n}0" for n in (1, 2)), "step 30: main", "step 30: step-000030"],
        ),
    ],
)
def test_the_newest_waits_what_it_outdates_does_not(folder, tmp_path, monkeypatch, strategy, expected):
    started = []
    stand_in = waits(0.1)

    def command(self, place, *words):
        started.append(words)
        return stand_in(self, place)

    monkeypatch.setattr(UploadQueue, "_command", command)
    running = UploadQueue("user/any", strategy, tmp_path)
    for step in (10, 20, 30):
        made = checkpoint(folder, step)
        running.offer(made)
        shutil.rmtree(made)  # as --save_total_limit does, while it is being pushed
    news = news_of(running)
    told = [f"{words[3].removeprefix('Training in progress, ')}: {words[1]}" for words in started]
    assert sorted(told) == expected
    with_state = [("--with_training_state" in words) for words in started]
    assert with_state == [words[1] == "last-checkpoint" for words in started]
    assert len(news) == len(expected)
    assert all("'model.safetensors'" in sentence for sentence in news)  # whole, although the checkpoint is gone
    assert all(("training_state" in line) == state for line, state in zip(news, with_state, strict=True))
    assert not list(tmp_path.glob(".push-*"))


def test_a_snapshot_takes_time_and_room_only_where_the_disk_has_no_hard_links(folder, tmp_path, monkeypatch):
    pushes.take_snapshot(pushes.UploadJob(folder, "main", "any"), tmp_path / "linked")
    assert (tmp_path / "linked" / "model.safetensors").samefile(folder / "model.safetensors")
    monkeypatch.setattr(pushes.os, "link", lambda source, target: (_ for _ in ()).throw(OSError(95, "not supported")))
    pushes.take_snapshot(pushes.UploadJob(folder, "main", "any"), tmp_path / "copied")
    assert files_in(tmp_path / "copied") == files_in(tmp_path / "linked")


def test_a_push_beside_the_run_never_ends_it(folder, tmp_path, monkeypatch):
    running = UploadQueue("user/any", "every_save", tmp_path)
    monkeypatch.setattr(UploadQueue, "_command", lambda self, *words: ["/there/is/no/such/program"])
    running.strategy = "checkpoint"
    running.offer(folder)
    told = "Training in progress, step 10: not pushed to {} (No such file or directory)"
    assert running.news() == [told.format(branch) for branch in ("main", "last-checkpoint")]  # none stops the next one
    running.strategy = "every_save"
    monkeypatch.setattr(UploadQueue, "_command", lambda self, *words: [sys.executable, "-c", "exit('no rights')"])
    running.offer(folder)
    assert news_of(running) == ["Training in progress, step 10: not pushed, because no rights"]
    monkeypatch.setattr(UploadQueue, "_command", lambda self, *words: ["sh", "-c", "kill -9 $$"])
    running.offer(folder)
    assert news_of(running) == ["Training in progress, step 10: not pushed, because it ended with -9"]
    monkeypatch.setattr(pushes, "link_or_copy", lambda source, target: (_ for _ in ()).throw(OSError(28, "disk full")))
    running.offer(folder)
    assert running.news() == ["Training in progress, step 10: not pushed to main ([Errno 28] disk full)"]
    assert not list(tmp_path.glob(".push-*"))


def test_the_final_model_does_not_wait_for_what_it_makes_up_for(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(UploadQueue, "_command", waits(60))
    running = UploadQueue("user/any", "every_save", tmp_path)
    running.offer(folder)
    (_, process, _) = running._running
    monkeypatch.setattr(UploadQueue, "_command", waits(0))
    assert running.finish(folder, print, lambda: False) == 0
    assert process.returncode < 0
    assert not list(tmp_path.glob(".push-*"))


def test_the_last_push_waits_for_a_slow_hub_but_not_for_each_push_that_finds_none(folder, tmp_path, monkeypatch):
    said = []
    running = UploadQueue("user/any", "all_checkpoints", tmp_path)
    monkeypatch.setattr(UploadQueue, "_command", lambda self, *words: ["sh", "-c", "sleep 0.1; exit 3"])
    for step in (10, 20, 30):
        running.offer(checkpoint(folder, step))
    assert running.finish(folder, said.append, lambda: False) == 3
    given_up = [line for line in said if "but given up" in line]
    assert [line.split()[-4] for line in given_up] == ["step-000020,", "step-000030,"]
    assert not list(tmp_path.glob(".push-*"))


def test_what_waits_to_be_pushed_gives_way_to_a_save_that_fails(folder, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(UploadQueue, "_command", waits(60))
    running = UploadQueue("user/any", "all_checkpoints", tmp_path)
    for step in (10, 20):
        running.offer(checkpoint(folder, step))
    running.make_room()
    assert len(list(tmp_path.glob(".push-*"))) == 1  # of the one that is under way
    running.close()

    asked, write = [], Checkpointer.write
    monkeypatch.setattr(Checkpointer, "write", lambda *given: None if asked else "No space left")
    monkeypatch.setattr(UploadQueue, "make_room", lambda self: asked.append(write))
    assert train_here(tmp_path / "run", shards, train_tokens=3 * 256, save_steps=1) == 0
    assert len(asked) == 1


def test_a_push_is_ended_by_whoever_ignores_signals_too(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(
        UploadQueue, "_command", lambda self, *words: ["sh", "-c", "trap '' TERM; echo begun; sleep 60"]
    )
    running = UploadQueue("user/any", "every_save", tmp_path)
    running.offer(folder)
    while "begun" not in (tmp_path / "push.log").read_text():
        time.sleep(0.01)
    started = time.monotonic()
    running.close()
    assert time.monotonic() - started < 10


def test_who_is_told_to_stop_waits_for_no_push(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(UploadQueue, "_command", waits(60))
    said = []
    running = UploadQueue("user/any", "all_checkpoints", tmp_path)
    running.offer(folder)
    assert running.finish(folder, said.append, lambda: True) == 3
    assert "Push it with" in said[-1]
    assert str(folder) in said[-1]
    running.close()
    assert running._running is None
    assert not list(tmp_path.glob(".push-*"))


def test_a_run_that_goes_on_does_not_wait_for_the_hub(on_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", AWAY)
    monkeypatch.setattr(pushes, "CHECK_SECONDS", 0)
    running = UploadQueue("user/any", "every_save", tmp_path)
    assert "The run goes on, and pushes when it is back." in running.check(goes_on=True)
    with pytest.raises(ValueError, match="push_to_hub: the Hub cannot be reached"):
        running.check(goes_on=False)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ValueError, match="push_to_hub: there is no token"):  # which waiting does not mend
        running.check(goes_on=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"hub_strategy": "often"}, "hub_strategy (often) must be one of end, every_save, checkpoint, all_checkpoints"),
        ({"hub_model_id": "me/mine"}, "add --push_to_hub"),
        ({"push_to_hub": True, "output_dir": "runs/my run"}, "'my run' cannot be the name"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "'a/b/c' cannot be the name"),
    ],
)
def test_arguments_that_do_not_fit_are_told(given, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        TrainArguments(**given)


def test_only_the_main_process_pushes_and_a_run_that_has_begun_waits_for_no_hub(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setattr(UploadQueue, "check", lambda self, goes_on: checked.append((self.repository, goes_on)))
    monkeypatch.setattr(setup, "run_on_main_and_broadcast", lambda accelerator, work: work())
    args = TrainArguments(push_to_hub=True, hub_model_id="me/mine", output_dir=str(tmp_path))
    main, other = (SimpleNamespace(is_main_process=is_main, print=print) for is_main in (True, False))
    opened = [setup.build_upload_queue(args, accelerator) for accelerator in (main, other)]
    (tmp_path / "run.json").touch()
    setup.build_upload_queue(args, main)
    assert [pushes.repository for pushes in opened] == ["me/mine", None]
    assert checked == [("me/mine", False), (None, False), ("me/mine", True)]


def test_a_preflight_says_whether_the_hub_can_be_written(on_hub, shards, tmp_path, monkeypatch, capsys):
    given = {"preflight": True, "push_to_hub": True, "hub_model_id": "user/preflight"}
    assert train_here(tmp_path / "run", shards, **given) == 0
    assert f"Hub          can be written: {on_hub.endpoint}/user/preflight" in capsys.readouterr().out
    assert files_in(on_hub.root / "models/user/preflight") == {}
    assert train_here(tmp_path / "run", shards, **given, hub_private_repo=True) == 2
    assert "push_to_hub: the Hub refuses user/preflight (The loopback Hub creates public" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", on_hub.read_only_token)
    assert train_here(tmp_path / "run", shards, **given) == 2
    assert "push_to_hub: this token may not write to user/preflight" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []


def test_a_training_pushes_what_it_saves_a_checkpoint_to_go_on_from_too(on_hub, shards, tmp_path, capsys):
    run = tmp_path / "trained"
    assert train_here(run, shards, push_to_hub=True, hub_strategy="checkpoint", train_tokens=20 * 256) == 0
    said = capsys.readouterr().out
    assert "Training in progress, step 20: pushed to" in said
    assert f"pushed to {on_hub.endpoint}/user/trained (commit" in (run / "push.log").read_text()
    assert files_in(on_hub.root / "models/user/trained") == files_in(run / "model")
    assert files_in(on_hub.root / "branches/models/user/trained/last-checkpoint") == files_in(run / "step-000020")
    for name in ("metrics.jsonl", "loss.png"):
        assert (run / "model" / name).read_bytes()
    card = (run / "model" / "README.md").read_text()
    assert f"validation loss | {rows_of(run, 'validation_loss')[-1]:.4f} nats per token" in card
    assert "after | step 20, 5,120 tokens" in card
    assert on_hub.token not in "".join(path.read_text(errors="replace") for path in run.rglob("*.json*"))


def test_a_model_that_cannot_be_pushed_is_there_and_the_command_too(
    on_hub, finished, shards, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(pushes, "LAST_SECONDS", 0)
    with on_hub.faults({"match": "POST .*commit/main", "status": 503}):
        assert train_here(tmp_path / "unlucky", shards, push_to_hub=True, hub_strategy="end") == 3
    said = capsys.readouterr().out
    command = re.search(r"^    python (-m modeling_gpt2repro.hub.push .*)$", said, re.MULTILINE)[1]
    assert rows_of(tmp_path / "unlucky") == rows_of(finished[0])  # nothing of the training is lost
    result = run_push(*command.replace("'", "").split()[2:3], "--hub_model_id", "user/unlucky")
    assert result.returncode == 0, result.stderr
    assert files_in(on_hub.root / "models/user/unlucky") == files_in(tmp_path / "unlucky" / "model")
