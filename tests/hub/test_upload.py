"""The push command: what arrives on the Hub, refusals and retries."""

import re
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import HfApi, constants
from pushing import UNREACHABLE_HUB, files_in, push_in_process, run_push

from modeling_gpt2repro.hub import client
from modeling_gpt2repro.hub.push import check_write_access, connect, main, push_folder
from modeling_gpt2repro.storage.lock import FolderLock


def commits(hub, name: str) -> int:
    return sum(bool(re.search(f"{name}/commit/", line["path"])) and line["status"] == 200 for line in hub.log())


def uploads(hub, name: str) -> int:
    return sum(line["method"] == "PUT" and f"/lfs/{name}/" in line["path"] for line in hub.log())


def check_branches(hub, name: str) -> list[str]:
    return [branch.name for branch in (hub.root / "branches/models" / name).glob("*")]


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


def test_a_token_that_cannot_be_read_is_a_problem_of_this_machine(on_hub, folder, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN_PATH", str(folder))
    result = run_push("--check", "--hub_model_id", "user/any")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "a problem on this machine prevents pushing ([Errno 21] Is a directory" in result.stderr


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


def test_checks_at_the_same_time_all_succeed_and_leave_no_branch(here):
    api = connect(client.Patience(60))
    name = "user/checked-by-many"
    with ThreadPoolExecutor(max_workers=3) as threads:
        for _ in range(8):
            checks = [threads.submit(check_write_access, api, name) for _ in range(3)]
            assert {check.result() for check in checks} == {f"{here.endpoint}/{name}"}
    assert check_branches(here, name) == []
    assert commits(here, name) == 3 * 8


def test_a_check_leaves_a_branch_that_somebody_else_made(here):
    here.new_repository("models/user/with-branches")
    kept = here.root / "branches/models/user/with-branches/write-check"
    kept.mkdir(parents=True)
    (kept / "config.json").write_text("mine")
    assert push_in_process("--check", "--hub_model_id", "user/with-branches").returncode == 0
    assert files_in(kept) == {"config.json": b"mine"}
    assert check_branches(here, "user/with-branches") == ["write-check"]


def test_a_branch_that_a_check_cannot_delete_is_named(here):
    with here.faults({"match": "DELETE .*/branch/", "status": 503}):
        result = push_in_process("--check", "--hub_model_id", "user/undeleted")
    (branch,) = check_branches(here, "user/undeleted")
    assert result.returncode == 0
    assert f"the check's branch {branch} could not be deleted: delete it yourself" in result.stdout


@pytest.mark.parametrize(
    "conflict",
    [
        {"status": 409},
        {"status": 412},
        {"status": 404, "headers": {"X-Error-Code": "RevisionNotFound"}},
        {"status": 404, "headers": {"X-Error-Code": "EntryNotFound"}},
    ],
)
@pytest.mark.parametrize("is_check", [True, False])
def test_a_change_at_the_same_time_is_no_missing_right_and_is_retried(here, folder, conflict, is_check):
    words = ["--check" if is_check else folder, "--hub_model_id", "user/busy"]
    here.new_repository("models/user/busy")
    with here.faults({"match": "POST .*/commit/", **conflict, "times": 1}):
        result = push_in_process(*words)
    assert result.returncode == 0, result.stderr
    assert "user/busy is being changed by someone else (" in result.stderr
    here.new_repository("models/user/busy")
    with here.faults({"match": "POST .*/commit/", **conflict}):
        result = push_in_process(*words, "--patience_seconds", 0)
    assert result.returncode == 3
    assert "may not write" not in result.stderr
    assert check_branches(here, "user/busy") == []


@pytest.mark.parametrize("rules", ["*.txt\n*.png\n", "figures/loss.png\nnotes.txt\n"])
def test_what_a_gitignore_leaves_out_is_named_and_the_rest_is_pushed(here, folder, rules):
    repository = here.new_repository("models/user/ignoring")
    (repository / ".gitignore").write_text(rules)
    (repository / "notes.txt").write_text("from before .gitignore")
    (folder / "notes.txt").write_text("notes")
    (folder / "figures").mkdir()
    (folder / "figures" / "loss.png").write_bytes(b"curve")
    expected = files_in(folder) | files_in(repository)
    del expected["figures/loss.png"], expected["training_state/optimizer.safetensors"]
    result = push_in_process(folder, "--hub_model_id", "user/ignoring")
    assert (result.returncode, result.stderr.count("trying again")) == (0, 0)
    assert result.stdout.endswith(
        "; left out, because .gitignore in the repository names them: figures/loss.png, notes.txt\n"
    )
    assert files_in(repository) == expected


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        ("*.json", "config.json"),
        ("*.safetensors", "model.safetensors, training_state/optimizer.safetensors"),
        ("model*", "model.safetensors"),
        ("training_state/*", "training_state/optimizer.safetensors"),
        ("*", "config.json, model.safetensors, training_state/optimizer.safetensors"),
    ],
)
def test_a_gitignore_that_leaves_out_what_a_model_needs_is_refused(here, folder, rules, named):
    repository = here.new_repository("models/user/ignoring-models")
    (repository / ".gitignore").write_text(rules)
    before = files_in(repository)
    committed, uploaded = commits(here, "user/ignoring-models"), uploads(here, "user/ignoring-models")
    result = push_in_process(folder, "--hub_model_id", "user/ignoring-models", "--with_training_state")
    assert result.returncode == 2
    assert f"such as {named}: remove the matching patterns from it" in result.stderr
    assert result.stderr.count("\n") == 1
    assert push_in_process("--check", "--hub_model_id", "user/ignoring-models").returncode == (
        0 if rules.startswith("training_state") else 2
    )
    assert files_in(repository) == before
    assert check_branches(here, "user/ignoring-models") == []
    if not rules.startswith("training_state"):
        assert commits(here, "user/ignoring-models") == committed
        assert uploads(here, "user/ignoring-models") == uploaded


def test_a_gitignore_in_the_folder_replaces_the_one_in_the_repository(here, folder):
    repository = here.new_repository("models/user/other-rules")
    (repository / ".gitignore").write_text("*.json")
    (folder / ".gitignore").write_text("*.md")
    result = push_in_process(folder, "--hub_model_id", "user/other-rules")
    assert "names them: README.md\n" in result.stdout
    assert files_in(repository).keys() == {".gitignore", "config.json", "model.safetensors"}


def test_a_private_push_to_a_public_repository_is_refused_before_anything_is_uploaded(here, folder):
    repository = here.new_repository("models/user/public")
    for words in (["--check"], [folder]):
        result = push_in_process(*words, "--hub_model_id", "user/public", "--private")
        assert (result.returncode, result.stdout) == (2, "")
        assert "user/public exists and is public: make it private" in result.stderr
    assert files_in(repository) == {}
    assert (commits(here, "user/public"), uploads(here, "user/public")) == (0, 0)


def test_a_new_repository_is_private_where_that_is_asked_for(here, folder):
    assert push_in_process(folder, "--hub_model_id", "user/hidden", "--private").returncode == 0
    assert HfApi(here.endpoint).repo_info("user/hidden").private
    result = push_in_process(folder, "--hub_model_id", "user/hidden", "--private")
    assert (result.returncode, result.stdout.count("private")) == (0, 0)
    result = push_in_process(folder, "--hub_model_id", "user/hidden", "--no-private")
    assert (result.returncode, result.stdout.endswith("; the repository is private and stays private\n")) == (0, True)


def test_a_private_repository_that_the_owners_settings_make_public_is_refused(here, folder):
    class PublicOnly(HfApi):
        def create_repo(self, name, private, **options):
            return super().create_repo(name, private=False, **options)

    with pytest.raises(ValueError, match="user/open exists and is public"):
        push_folder(PublicOnly(here.endpoint), folder, "user/open", private=True)
    assert uploads(here, "user/open") == 0


def test_a_folder_without_a_model_is_refused(folder):
    with pytest.raises(ValueError, match="give model/ or step"):
        push_folder(HfApi(), folder.parent, "user/any")
    with pytest.raises(SystemExit, match="2"):
        main(["--hub_model_id", "user/any"])


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


def test_an_unreachable_hub_has_an_exit_code_of_its_own(folder, on_hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", UNREACHABLE_HUB)
    result = run_push(folder, "--hub_model_id", "user/away", "--patience_seconds", 0)  # the older name
    assert result.returncode == 3
    assert "the Hub cannot be reached (" in result.stderr


def test_an_expired_address_is_asked_for_again(here, folder):
    with here.faults({"match": "PUT /lfs/", "status": 403, "times": 1}):
        result = push_in_process(folder, "--hub_model_id", "user/expired")
    assert result.returncode == 0, result.stderr
    assert f"{here.cdn.removeprefix('http://')}, where the Hub stores large files, refuses" in result.stderr
    assert "model.safetensors" in files_in(here.root / "models/user/expired")


def test_a_storage_that_always_refuses_is_named_and_is_no_missing_right(here, folder):
    with here.faults({"match": "PUT /lfs/", "status": 403}):
        result = push_in_process(folder, "--hub_model_id", "user/firewall")
    assert result.returncode == 2
    assert "refuses an upload with status 403" in result.stderr
    assert "token" not in result.stderr
    assert "/lfs/" not in result.stderr.replace("PUT /lfs/", "")
    assert uploads(here, "user/firewall") == 3


@pytest.mark.parametrize(
    "where", ["repos/create", "preupload", "validate-yaml", "objects/batch", "PUT /lfs/", "commit/main", "/tree/"]
)
def test_a_hub_that_never_answers_is_given_up(here, folder, where, monkeypatch):
    monkeypatch.setattr(client, "MIN_ANSWER_SECONDS", 0.2)
    name = f"user/silent-{re.sub('[^a-z]', '', where)}"
    with here.faults({"match": where, "hang": True}):
        result = push_in_process(folder, "--hub_model_id", name, "--patience_seconds", 0.2)
    assert result.returncode == 3
    who = f"{here.cdn.removeprefix('http://')}, where the Hub stores large files," if "PUT" in where else "the Hub"
    assert f"{who} does not answer (" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("is_check", [True, False])
def test_a_silent_storage_is_noticed_before_xet_uploads_to_it(here, folder, is_check, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setattr(client, "MIN_ANSWER_SECONDS", 0.2)
    with socket.create_server(("localhost", 0)) as silent:
        host = f"localhost:{silent.getsockname()[1]}"
        token = {"casUrl": f"http://{host}", "accessToken": "any", "exp": 4102444800}
        with here.faults({"match": "xet-write-token", "status": 200, "body": token}):
            words = ["--check" if is_check else folder, "--hub_model_id", "user/silent-xet", "--patience_seconds", 0.2]
            result = push_in_process(*words)
    assert result.returncode == 3
    assert f"{host}, where the Hub stores large files, does not answer (" in result.stderr


@pytest.mark.parametrize(
    ("where", "answer"),
    [
        ("validate-yaml", {"status": 503, "body": "<html>busy</html>"}),
        ("repos/create", {"status": 200, "body": {"welcome": "to this hotel"}}),
        ("repos/create", {"status": 200, "body": []}),
        ("preupload", {"status": 200, "body": {"files": [{}]}}),
        ("commit/main", {"status": 200, "body": {}}),
    ],
)
def test_an_answer_that_is_not_from_the_hub_is_retried(here, folder, where, answer):
    with here.faults({"match": where, **answer, "times": 1}):
        result = push_in_process(folder, "--hub_model_id", "user/behind-a-proxy")
    assert result.returncode == 0, result.stderr
    assert "the Hub cannot be reached (the answer is not as a Hub's: " in result.stderr
    shutil.rmtree(here.root / "models/user/behind-a-proxy")


def test_no_message_has_the_signature_of_an_address(here, folder, caplog):
    """Of a busy storage, which says nothing of its own; in place of a signature, addresses here have a size."""
    with here.faults({"match": "PUT /lfs/", "status": 503, "body": "", "times": 1}):
        result = push_in_process(folder, "--hub_model_id", "user/signed")
    assert result.returncode == 0
    warnings = [record.getMessage() for record in caplog.records if "PUT http" in record.getMessage()]
    assert len(warnings) == 1
    assert f"{here.cdn}/lfs/user/signed/" in warnings[0]
    assert "size=" not in warnings[0] + result.stderr


@pytest.mark.parametrize("times", [1, 3])
def test_files_that_did_not_arrive_are_named(here, folder, times):
    """A Hub that reports a commit which it did not make."""
    here.new_repository("models/user/never-arrived")
    before = {
        "commitOid": HfApi(here.endpoint).repo_info("user/never-arrived").sha,
        "commitUrl": f"{here.endpoint}/user/never-arrived/commit/0",
    }
    with here.faults({"match": "commit/main", "status": 200, "body": before, "times": times}):
        result = push_in_process(folder, "--hub_model_id", "user/never-arrived")
    message = f"files in user/never-arrived differ from those in {folder}: README.md, config.json, model.safetensors"
    assert message in result.stderr
    assert "cannot be reached" not in result.stderr
    assert result.returncode == (0 if times == 1 else 4)


def test_a_push_that_is_overtaken_by_another_has_arrived(here, folder):
    class Overtaken(HfApi):
        def create_commit(self, repo_id, operations, **options):
            commit = super().create_commit(repo_id, operations, **options)
            if len(operations) > 1:  # not for the call in `upload_file`
                self.upload_file(repo_id=repo_id, path_or_fileobj=b"other", path_in_repo="config.json")
            return commit

    address = push_folder(Overtaken(here.endpoint), folder, "user/overtaken")
    assert address.startswith(f"{here.endpoint}/user/overtaken (commit ")
    assert files_in(here.root / "models/user/overtaken")["config.json"] == b"other"


@pytest.mark.parametrize("link", ["key.txt", "figures/key.txt", "figures"])
def test_a_link_out_of_the_folder_is_refused(here, folder, tmp_path, link):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "key.txt").write_text("secret")
    if "/" in link:
        (folder / link).parent.mkdir()
    (folder / link).symlink_to(outside if link == "figures" else outside / "key.txt")
    result = push_in_process(folder, "--hub_model_id", "user/linked")
    assert result.returncode == 2
    assert f"{folder / link} is a link " in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (here.root / "models/user/linked").exists()


def test_a_link_to_nothing_is_refused_because_its_file_would_be_left_out(here, folder):
    (folder / "tokenizer.json").symlink_to(folder / "gone.json")
    assert push_in_process(folder, "--hub_model_id", "user/broken").returncode == 2


def test_links_within_the_folder_and_those_that_are_not_pushed_are_allowed(here, folder, tmp_path):
    (folder / "LICENSE.md").symlink_to("README.md")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "elsewhere").symlink_to(tmp_path)
    moments = (folder / "training_state").rename(tmp_path / "moments")
    (folder / "training_state").symlink_to(moments)
    result = push_in_process(folder, "--hub_model_id", "user/inside")
    assert result.returncode == 0, result.stderr
    assert files_in(here.root / "models/user/inside") == {
        name: (folder / name).read_bytes() for name in ("LICENSE.md", "README.md", "config.json", "model.safetensors")
    }
    assert push_in_process(folder, "--hub_model_id", "user/inside", "--with_training_state").returncode == 2


def test_a_snapshot_in_the_hubs_cache_is_pushed_but_no_link_to_elsewhere(here, tmp_path):
    cached = tmp_path / "models--owner--name"
    snapshot = cached / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    (cached / "blobs" / "1234").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    result = push_in_process(snapshot, "--hub_model_id", "user/from-cache")
    assert result.returncode == 0, result.stderr
    assert files_in(here.root / "models/user/from-cache") == {"config.json": b"{}"}
    (tmp_path / "token").write_text("secret")
    (snapshot / "token").symlink_to(tmp_path / "token")
    assert push_in_process(snapshot, "--hub_model_id", "user/from-cache").returncode == 2


def test_git_and_cache_folders_are_not_pushed_at_any_depth(here, folder):
    pushed = {name for name in files_in(folder) if not name.startswith("training_state")} | {"lora/adapter.bin"}
    for place in (folder, folder / "lora"):
        for name in (".git/config", ".cache/other/x", ".cache/huggingface/x"):
            (place / name).parent.mkdir(parents=True)
            (place / name).write_text("not for the Hub")
    (folder / "lora" / "adapter.bin").write_bytes(b"1")
    result = push_in_process(folder, "--hub_model_id", "user/clean")
    assert result.returncode == 0, result.stderr
    assert files_in(here.root / "models/user/clean").keys() == pushed
