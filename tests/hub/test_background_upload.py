"""The upload queue of a run, and training runs that push."""

import json
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from patience import PATIENCE_SECONDS, wait_until
from pushing import UNREACHABLE_HUB, as_pushed, files_in, run_push
from toy_runs import logged_values, train_here

from modeling_gpt2repro.hub import background_upload
from modeling_gpt2repro.hub.background_upload import UploadQueue, snapshot
from modeling_gpt2repro.pretrain import setup
from modeling_gpt2repro.pretrain.checkpointing import Checkpointer
from modeling_gpt2repro.training.arguments import TrainArguments


def push_to_file(log: Path) -> list[str]:
    """A stand-in for the push command: appends its flags to a file, as a JSON list, and prints the folder's files."""
    program = """
import json, os, sys
log, folder, *flags = sys.argv[1:]
open(log, "a").write(json.dumps(flags) + "\\n")
print(sorted(os.listdir(folder)))
"""
    return [sys.executable, "-c", program, str(log)]


def shell(script: str) -> list[str]:
    return ["sh", "-c", script]


ENDLESS_PUSH = shell(f"exec sleep {PATIENCE_SECONDS}")


def wait_for(queue: UploadQueue) -> list[str]:
    """All messages until nothing is left to push."""
    messages = []
    wait_until(lambda: messages.extend(queue.poll()) or not (queue._running or queue._pending))
    return messages


def copy_checkpoint(folder: Path, step: int) -> Path:
    return Path(shutil.copytree(folder, folder.parent / "run" / f"step-{step:06d}"))


def raise_disk_full(source, target):
    raise OSError(28, "disk full")


def raise_not_supported(source, target):
    raise OSError(95, "not supported")


def never() -> bool:
    return False


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
def test_a_new_checkpoint_replaces_what_is_pending_for_its_branch(folder, tmp_path, strategy, expected):
    log = tmp_path / "flags.jsonl"
    log.touch()
    queue = UploadQueue("user/any", strategy, tmp_path, command=push_to_file(log))
    for step in (10, 20, 30):
        checkpoint = copy_checkpoint(folder, step)
        queue.enqueue(checkpoint)
        shutil.rmtree(checkpoint)  # as --save_total_limit does while it is being pushed
    messages = wait_for(queue)
    pushes = [json.loads(line) for line in log.read_text().splitlines()]
    assert [flags[0::2][:2] for flags in pushes] == [["--branch", "--message"]] * len(expected)
    pushed = [f"{flags[3].removeprefix('Training in progress, ')}: {flags[1]}" for flags in pushes]
    assert sorted(pushed) == expected
    with_state = ["--with_training_state" in flags for flags in pushes]
    assert with_state == [flags[1] == "last-checkpoint" for flags in pushes]
    assert len(messages) == len(expected)
    assert all("'model.safetensors'" in message for message in messages)  # complete, although the checkpoint is gone
    assert [("training_state" in message) for message in messages] == with_state
    assert not list(tmp_path.glob(".push-*"))


def test_a_snapshot_is_copied_only_where_there_are_no_hard_links(folder, tmp_path, monkeypatch):
    snapshot(folder, tmp_path / "linked", with_training_state=False)
    assert (tmp_path / "linked" / "model.safetensors").samefile(folder / "model.safetensors")
    monkeypatch.setattr(background_upload.os, "link", raise_not_supported)
    snapshot(folder, tmp_path / "copied", with_training_state=False)
    assert not (tmp_path / "copied" / "model.safetensors").samefile(folder / "model.safetensors")
    assert files_in(tmp_path / "copied") == files_in(tmp_path / "linked")


@pytest.mark.parametrize("name", ["figures", "key.txt"])
def test_a_checkpoint_with_a_link_to_elsewhere_is_not_pushed(on_hub, folder, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "key.txt").write_text("secret")
    (folder / name).symlink_to(outside if name == "figures" else outside / name)
    (tmp_path / "run").mkdir()
    queue = UploadQueue("user/linking", "every_save", tmp_path / "run")
    queue.enqueue(folder)
    (message,) = wait_for(queue)
    assert f"not pushed, because {tmp_path}/run/.push-main-step-000010/{name} is a link " in message
    assert not (on_hub.root / "models/user/linking").exists()


def test_a_folder_whose_name_begins_like_a_flag_is_pushed(folder, tmp_path, monkeypatch):
    """As of a run with --output_dir=-x, of which the queue is given a relative path."""
    monkeypatch.chdir(tmp_path)
    folder.rename("-x")
    log = tmp_path / "given.jsonl"
    program = "import json, sys; print(json.dumps(sys.argv[2:]), file=open(sys.argv[1], 'a'))"
    queue = UploadQueue("user/any", "all_checkpoints", Path(), command=[sys.executable, "-c", program, str(log)])
    queue.enqueue(Path(shutil.copytree("-x", "step-000010")))
    wait_for(queue)
    assert queue.push_final(Path("-x"), print, never) == 0
    folders = [json.loads(line)[0] for line in log.read_text().splitlines()]
    names = (".push-main-step-000010", ".push-step-000010-step-000010", "-x")
    assert folders == [str(tmp_path / name) for name in names]


def test_a_final_push_that_cannot_be_started_shows_its_command(folder, tmp_path):
    shown = []
    queue = UploadQueue("user/any", "end", tmp_path, command=["/there/is/no/such/program", "push"])
    assert queue.push_final(folder, shown.append, never) == 3
    assert shown[-2] == "The push cannot be started (No such file or directory)."
    assert f"python push {folder} --message 'End of training' --hub_model_id user/any\n" in shown[-1]


def test_a_failed_upload_is_a_message_and_never_an_exception(folder, tmp_path, monkeypatch):
    queue = UploadQueue("user/any", "checkpoint", tmp_path, command=["/there/is/no/such/program"])
    queue.enqueue(folder)
    expected = "Training in progress, step 10: not pushed to {} (No such file or directory)"
    assert queue.poll() == [expected.format(branch) for branch in ("main", "last-checkpoint")]

    queue = UploadQueue("user/any", "every_save", tmp_path, command=[sys.executable, "-c", "exit('no rights')"])
    queue.enqueue(folder)
    assert wait_for(queue) == ["Training in progress, step 10: not pushed, because no rights"]

    queue = UploadQueue("user/any", "every_save", tmp_path, command=shell("kill -9 $$"))
    queue.enqueue(folder)
    assert wait_for(queue) == ["Training in progress, step 10: not pushed, because it ended with -9"]

    monkeypatch.setattr(background_upload, "link_or_copy", raise_disk_full)
    queue.enqueue(folder)
    assert queue.poll() == ["Training in progress, step 10: not pushed to main ([Errno 28] disk full)"]
    assert not list(tmp_path.glob(".push-*"))


def test_the_final_model_does_not_wait_for_a_checkpoint_that_it_replaces(folder, tmp_path):
    queue = UploadQueue("user/any", "every_save", tmp_path, command=ENDLESS_PUSH)
    queue.enqueue(folder)
    process = queue._running.process
    queue.command = shell("exit 0")
    assert queue.push_final(folder, print, never) == 0
    assert process.returncode < 0
    assert not list(tmp_path.glob(".push-*"))


def test_the_final_push_drops_the_rest_of_the_queue_once_the_hub_is_unreachable(folder, tmp_path):
    shown = []
    given_up = tmp_path / "given_up"
    command = shell(f"until [ -e {shlex.quote(str(given_up))} ]; do sleep 0.01; done; exit 3")
    queue = UploadQueue("user/any", "all_checkpoints", tmp_path, command=command)
    for step in (10, 20, 30):
        queue.enqueue(copy_checkpoint(folder, step))
    # It is asked between two looks at the first upload, which gives up then.
    assert queue.push_final(folder, shown.append, should_stop=given_up.touch) == 3
    dropped = [re.search(r"not pushed to (\S+), dropped", line) for line in shown]
    assert [match[1] for match in dropped if match] == ["step-000020", "step-000030"]
    assert not list(tmp_path.glob(".push-*"))


def test_a_save_that_fails_drops_pending_uploads(folder, shards, tmp_path, monkeypatch):
    queue = UploadQueue("user/any", "all_checkpoints", tmp_path, command=ENDLESS_PUSH)
    for step in (10, 20):
        queue.enqueue(copy_checkpoint(folder, step))
    queue.drop_pending()
    assert len(list(tmp_path.glob(".push-*"))) == 1  # the running one
    queue.close()

    dropped = []
    monkeypatch.setattr(Checkpointer, "write", lambda *given: None if dropped else "No space left")
    monkeypatch.setattr(UploadQueue, "drop_pending", lambda self: dropped.append(True))
    assert train_here(tmp_path / "run", shards, train_tokens=3 * 256, save_steps=1) == 0
    assert len(dropped) == 1


def test_closing_kills_an_upload_that_ignores_signals(folder, tmp_path):
    command = shell(f"trap '' TERM; echo started; exec sleep {PATIENCE_SECONDS}")
    queue = UploadQueue("user/any", "every_save", tmp_path, command=command)
    queue.enqueue(folder)
    wait_until(lambda: "started" in (tmp_path / "push.log").read_text())
    process = queue._running.process
    queue.close()
    assert process.returncode == -signal.SIGKILL  # 0 if it had been waited for


def test_a_run_that_has_to_stop_waits_for_no_upload(folder, tmp_path):
    shown = []
    queue = UploadQueue("user/any", "all_checkpoints", tmp_path, command=ENDLESS_PUSH)
    queue.enqueue(folder)
    assert queue.push_final(folder, shown.append, should_stop=lambda: True) == 3
    assert "Push it with" in shown[-1]
    assert str(folder) in shown[-1]
    queue.close()
    assert queue._running is None
    assert not list(tmp_path.glob(".push-*"))


def test_only_a_resumed_run_starts_while_the_hub_is_unreachable(on_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", UNREACHABLE_HUB)
    queue = UploadQueue("user/any", "every_save", tmp_path, hub_wait_seconds=0)
    assert "The run continues, and pushes once the Hub can be reached again." in queue.check_access(is_resume=True)
    with pytest.raises(ValueError, match="push_to_hub: the Hub cannot be reached"):
        queue.check_access(is_resume=False)
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ValueError, match="push_to_hub: there is no token"):  # waiting does not help
        queue.check_access(is_resume=True)


def test_a_check_that_hangs_or_is_killed_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(background_upload, "MAX_CHECK_SECONDS", 0.2)
    queue = UploadQueue("user/any", "every_save", tmp_path, command=ENDLESS_PUSH)
    assert queue.check_access(is_resume=True).startswith("the Hub did not answer within 0.2 s. The run continues")
    with pytest.raises(ValueError, match="push_to_hub: the Hub did not answer"):
        queue.check_access(is_resume=False)
    queue.command = shell("kill -9 $$")
    with pytest.raises(ValueError, match="push_to_hub: it ended with -9"):
        queue.check_access(is_resume=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hub_strategy": "often"}, "hub_strategy (often) must be one of end, every_save, checkpoint, all_checkpoints"),
        ({"hub_model_id": "me/mine"}, "add --push_to_hub"),
        ({"stock_twin": True}, "stock_twin is a second repository, but nothing is pushed: add --push_to_hub"),
        ({"hub_wait_seconds": -1.0}, "hub_wait_seconds (-1.0) must be at least 0."),
        ({"push_to_hub": True, "output_dir": "runs/my run"}, "'my run' cannot be the name"),
        ({"push_to_hub": True, "hub_model_id": "a/b/c"}, "'a/b/c' cannot be the name"),
    ],
)
def test_wrong_arguments_for_pushing_are_refused(given, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TrainArguments(**given)


def test_a_twin_is_checked_and_pushed_with_the_final_model_only(folder, tmp_path, monkeypatch):
    args = TrainArguments(push_to_hub=True, hub_model_id="me/mine", output_dir=str(tmp_path), stock_twin=True)
    with monkeypatch.context() as patch:
        patch.setattr(UploadQueue, "check_access", lambda self, is_resume: "")
        patch.setattr(setup, "run_on_main_and_broadcast", lambda accelerator, work: work())
        queue = setup.build_upload_queue(args, SimpleNamespace(is_main_process=True, print=print))
    queue.command = ["sh", "-c", f'echo "$@" >> {tmp_path}/pushes', "sh"]
    queue.check_access(is_resume=False)
    queue.enqueue(folder)
    wait_until(lambda: queue.poll())
    assert queue.push_final(folder, print, lambda: False) == 0
    check, checkpoint, final = (tmp_path / "pushes").read_text().splitlines()
    assert check.startswith("--check --stock_twin --hub_model_id me/mine")
    assert "--stock_twin" not in checkpoint
    assert "--message End of training --stock_twin --hub_model_id me/mine" in final


@pytest.mark.slow
def test_a_training_pushes_the_twin_of_its_final_model(on_hub, finished, shards, tmp_path):
    shutil.copytree(finished[0], tmp_path / "twofold")
    given = {"push_to_hub": True, "stock_twin": True, "resume_from_checkpoint": "latest"}
    assert train_here(tmp_path / "twofold", shards, **given) == 0
    assert "user/twofold-gpt2)" in (on_hub.root / "models/user/twofold/README.md").read_text()
    card = (on_hub.root / "models/user/twofold-gpt2/README.md").read_text()
    assert "base_model: user/twofold\n" in card


def test_only_the_main_process_pushes_and_a_resume_is_recognized(tmp_path, monkeypatch):
    checks = []

    def check_access(self, is_resume):
        checks.append((self.repository, is_resume))

    monkeypatch.setattr(UploadQueue, "check_access", check_access)
    monkeypatch.setattr(setup, "run_on_main_and_broadcast", lambda accelerator, work: work())
    args = TrainArguments(push_to_hub=True, hub_model_id="me/mine", output_dir=str(tmp_path))
    main_process = SimpleNamespace(is_main_process=True, print=print)
    other_process = SimpleNamespace(is_main_process=False, print=print)
    queues = [setup.build_upload_queue(args, accelerator) for accelerator in (main_process, other_process)]
    (tmp_path / "run.json").touch()
    setup.build_upload_queue(args, main_process)
    assert [queue.repository for queue in queues] == ["me/mine", None]
    assert checks == [("me/mine", False), (None, False), ("me/mine", True)]


def test_a_preflight_says_whether_the_hub_can_be_written(on_hub, shards, tmp_path, monkeypatch, capsys):
    given = {"preflight": True, "push_to_hub": True, "hub_model_id": "user/preflight"}
    assert train_here(tmp_path / "run", shards, **given) == 0
    assert f"Hub          can be written: {on_hub.endpoint}/user/preflight" in capsys.readouterr().out
    assert files_in(on_hub.root / "models/user/preflight") == {}
    assert train_here(tmp_path / "run", shards, **given, hub_private_repo=True) == 2
    assert "push_to_hub: user/preflight exists and is public: make it private" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", on_hub.read_only_token)
    assert train_here(tmp_path / "run", shards, **given) == 2
    assert "push_to_hub: this token may not write to user/preflight" in capsys.readouterr().err
    assert list((tmp_path / "run").iterdir()) == []


def test_a_training_pushes_its_model_and_a_checkpoint_to_resume_from(on_hub, shards, tmp_path, capsys):
    run = tmp_path / "talkative"
    assert train_here(run, shards, push_to_hub=True, hub_strategy="checkpoint", train_tokens=20 * 256) == 0
    output = capsys.readouterr().out
    assert "Training in progress, step 20: pushed to" in output
    # To main by the checkpoint's push or, if the run had ended before it began, by the final one, which needs no log.
    assert f"pushed to {on_hub.endpoint}/user/talkative (commit" in (run / "push.log").read_text() + output
    assert files_in(on_hub.root / "models/user/talkative") == as_pushed(run / "model", "user/talkative")
    assert files_in(on_hub.root / "branches/models/user/talkative/last-checkpoint") == files_in(run / "step-000020")
    for name in ("metrics.jsonl", "loss.png"):
        assert (run / "model" / name).read_bytes()
    card = (run / "model" / "README.md").read_text()
    assert f"validation loss | {logged_values(run, 'validation_loss')[-1]:.4f} nats per token" in card
    assert "after | step 20, 5,120 tokens" in card
    assert on_hub.token not in "".join(path.read_text(errors="replace") for path in run.rglob("*.json*"))


def test_a_training_whose_final_push_fails_shows_the_command_that_pushes_later(
    on_hub, finished, shards, tmp_path, capsys
):
    given = {"push_to_hub": True, "hub_strategy": "end", "hub_wait_seconds": 0}
    with on_hub.faults({"match": "POST .*commit/main", "status": 503}):
        assert train_here(tmp_path / "unlucky", shards, **given) == 3
    output = capsys.readouterr().out
    command = re.search(r"^    python (-m modeling_gpt2repro.hub.push .*)$", output, re.MULTILINE)[1]
    assert logged_values(tmp_path / "unlucky") == logged_values(finished[0])  # the training itself is complete
    result = run_push(*command.replace("'", "").split()[2:3], "--hub_model_id", "user/unlucky")
    assert result.returncode == 0, result.stderr
    assert files_in(on_hub.root / "models/user/unlucky") == as_pushed(tmp_path / "unlucky/model", "user/unlucky")


def test_resuming_a_finished_run_pushes_the_model_that_could_not_be_pushed(on_hub, finished, shards, tmp_path):
    shutil.copytree(finished[0], tmp_path / "later")
    assert train_here(tmp_path / "later", shards, push_to_hub=True, resume_from_checkpoint="latest") == 0
    assert files_in(on_hub.root / "models/user/later") == as_pushed(finished[0] / "model", "user/later")
