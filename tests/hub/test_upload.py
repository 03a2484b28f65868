"""The push command: what arrives on the Hub, refusals and retries."""

import re
import socket
import time
from threading import Timer
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from patience import PATIENCE_SECONDS
from pushing import UNREACHABLE_HUB, files_in, run_push

from modeling_gpt2repro.hub.upload import check_write_access, connect, explain_hub_error, main, push_folder
from modeling_gpt2repro.storage.lock import FolderLock
from modeling_gpt2repro.storage.retry import backoff_seconds, is_transient, retry


def commits(hub, name: str) -> int:
    return sum(bool(re.search(f"{name}/commit/", line["path"])) and line["status"] == 200 for line in hub.log())


def test_a_push_replaces_earlier_weights_and_keeps_other_files(on_hub, folder):
    repository = on_hub.new_repository("models/user/taken")
    for earlier in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "training_state/state.json"):
        (repository / earlier).parent.mkdir(exist_ok=True)
        (repository / earlier).write_bytes(b"of other weights")
    other_files = {"notes.md": b"1", "lora/adapter_model.safetensors": b"2"}
    (repository / "lora").mkdir()
    for name, content in other_files.items():
        (repository / name).write_bytes(content)
    result = run_push(folder, "--hub_model_id", "taken", "--message", "the tenth")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(rf"pushed to {on_hub.endpoint}/user/taken \(commit \w{{7}}\)\n", result.stdout)
    model = {name: content for name, content in files_in(folder).items() if not name.startswith("training_state")}
    assert files_in(repository) == {**model, **other_files}
    assert commits(on_hub, "user/taken") == 1
    assert run_push(folder, "--hub_model_id", "user/taken").returncode == 0
    assert commits(on_hub, "user/taken") == 1  # nothing is sent twice


def test_a_checkpoint_with_its_training_state_goes_to_its_branch_only(on_hub, folder):
    words = ("--hub_model_id", "user/branched", "--branch", "last-checkpoint", "--with_training_state")
    result = run_push(folder, *words)
    assert result.returncode == 0, result.stderr
    assert files_in(on_hub.root / "branches/models/user/branched/last-checkpoint") == files_in(folder)
    assert files_in(on_hub.root / "models/user/branched") == {}


@pytest.mark.parametrize(
    ("environment", "repository", "message"),
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
def test_a_check_finds_out_that_a_push_would_be_refused(on_hub, monkeypatch, environment, repository, message):
    on_hub.new_repository("models/user/there")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run_push("--check", "--hub_model_id", repository)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert "hf_" not in result.stderr + result.stdout
    assert files_in(on_hub.root / "models/user/there") == {}


def test_the_lock_of_a_folder_in_use_is_not_pushed(on_hub, folder):
    pushed = files_in(folder)
    with FolderLock(folder) as lock:
        lock.acquire()
        result = run_push(folder, "--hub_model_id", "user/in-use", "--with_training_state")
    assert result.returncode == 0, result.stderr
    assert files_in(on_hub.root / "models/user/in-use") == pushed


def test_a_check_leaves_nothing_but_the_repository(on_hub):
    result = run_push("--check", "--hub_model_id", "checked")
    assert (result.returncode, result.stdout) == (0, f"can be written: {on_hub.endpoint}/user/checked\n")
    assert files_in(on_hub.root / "models/user/checked") == {}
    assert not list((on_hub.root / "branches/models/user/checked").glob("*"))
    assert commits(on_hub, "user/checked") == 1  # nothing less proves it
    assert any("/lfs/user/checked/" in line["path"] for line in on_hub.log())  # by way of the large file storage
    with on_hub.faults({"match": "commit/write-check", "status": 403}):
        assert run_push("--check", "--hub_model_id", "checked").returncode == 2
    assert not list((on_hub.root / "branches/models/user/checked").glob("*"))


def test_a_public_repository_is_refused_where_a_private_one_is_asked_for():
    created = []

    class Api:
        def create_repo(self, name, private, exist_ok):
            created.append(private)
            return SimpleNamespace(repo_id=name)

        def repo_info(self, name):
            return SimpleNamespace(private=False)

    with pytest.raises(ValueError, match="user/any exists and is public"):
        check_write_access("user/any", private=True, api=Api())
    assert created == [True]


@pytest.mark.parametrize(("status", "transient"), [(400, False), (409, True), (412, True), (429, True), (500, True)])
def test_some_answers_of_the_hub_are_worth_a_retry(status, transient):
    error = HfHubHTTPError("no", response=SimpleNamespace(status_code=status, headers={}, request=None))
    assert is_transient(error) is transient


def test_a_folder_without_a_model_is_refused(folder):
    with pytest.raises(ValueError, match="give model/ or step"):
        push_folder(folder.parent, "user/any")
    with pytest.raises(SystemExit, match="2"):
        main(["--hub_model_id", "user/any"])


def with_cause(error: BaseException, cause: BaseException | None) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "transient"),
    [
        (with_cause(RuntimeError("while uploading"), with_cause(HTTPError("failed"), OSError(113, "No route"))), True),
        (ConnectionError("by Xet"), True),
        (RuntimeError("by Xet"), True),
        (PermissionError(13, "Permission denied", "model.safetensors"), False),
        (with_cause(RuntimeError("while uploading"), OSError(5, "Input/output error")), False),
    ],
)
def test_connection_errors_are_transient_and_errors_of_this_machine_are_not(error, transient):
    assert is_transient(error) is transient
    if not transient:
        assert "a problem on this machine prevents pushing (" in explain_hub_error(error, "user/any")


@pytest.mark.parametrize("where", ["repos/create", "validate-yaml", "commit/main", "drop the answer"])
def test_a_push_is_retried_while_the_hub_is_unavailable(on_hub, folder, where):
    rule = {"match": "commit/main", "drop": 0} if where == "drop the answer" else {"match": where, "status": 503}
    name = f"user/patient-{len(where)}"
    with on_hub.faults({**rule, "times": 1}):
        result = run_push(folder, "--hub_model_id", name)
    assert result.returncode == 0, result.stderr
    assert "trying again in 1 s" in result.stderr
    assert "model.safetensors" in files_in(on_hub.root / "models" / name)
    assert commits(on_hub, name) == (0 if where == "drop the answer" else 1)  # a lost answer has no status


@pytest.mark.parametrize(
    ("mismatches", "extra", "reported"),
    [
        ([{"path": "model.safetensors"}], [], "model.safetensors"),
        ([], ["README.md", "training_state/optimizer.safetensors"], "README.md"),
        ([], ["training_state/optimizer.safetensors", ".cache/huggingface/download/x.lock"], None),
    ],
)
def test_files_that_arrived_damaged_are_reported(folder, mismatches, extra, reported):
    class Api:
        endpoint = "https://hub"

        def create_repo(self, name, **options):
            return SimpleNamespace(repo_id=name)

        def upload_folder(self, **options):
            return SimpleNamespace(oid="0" * 40)

        def verify_repo_checksums(self, name, **options):
            return SimpleNamespace(mismatches=mismatches, extra_paths=extra)

    if reported is None:
        assert push_folder(folder, "user/any", api=Api()) == "https://hub/user/any (commit 0000000)"
    else:
        with pytest.raises(RuntimeError, match=f"differ from those in .*: {reported}$"):
            push_folder(folder, "user/any", api=Api())


def test_an_unreachable_hub_has_an_exit_code_of_its_own(folder, on_hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", UNREACHABLE_HUB)
    result = run_push(folder, "--hub_model_id", "user/away", "--patience_seconds", 0)  # the older name
    assert result.returncode == 3
    assert "the Hub cannot be reached (" in result.stderr


def test_a_hub_that_never_answers_times_out(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setenv("HF_TOKEN", "hf_any")
        later = Timer(PATIENCE_SECONDS, silent.close)  # ends the test whatever the client does, in another error
        later.start()
        try:
            with pytest.raises(HTTPError) as raised:
                check_write_access("user/any", api=connect(endpoint=address, timeout_seconds=0.1))
        finally:
            later.cancel()
            close_session()
    assert "Timeout" in type(raised.value).__name__


def test_retries_back_off_until_the_patience_is_over(monkeypatch):
    now = [0.0]
    messages = []
    tried = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def attempt():
        tried.append(now[0])
        raise ConnectionError("no route")

    with pytest.raises(ConnectionError):
        retry(attempt, 200, on_retry=messages.append)
    assert tried == [0, 1, 3, 7, 15, 31, 63, 123, 183]
    assert len(messages) == len(tried) - 1
    endless = backoff_seconds()
    assert [next(endless) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
