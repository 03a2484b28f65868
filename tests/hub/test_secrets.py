"""Tokens and passwords: in the header that is for them and in the environment, and nowhere else."""

import subprocess
import sys
from contextlib import suppress

import psutil
import pytest
from huggingface_hub import HfApi
from patience import PATIENCE_SECONDS, wait_until
from toy_runs import CPU_FP32, ROOT, SCRIPT, toy_flags

from modeling_gpt2repro.hub.background_upload import upload_environment
from modeling_gpt2repro.hub.client import Patience, connect
from modeling_gpt2repro.hub.pushed_files import ignored_by_repository

PASSWORD = "open-sesame-4711"
WANDB_KEY = "0123456789abcdef" * 2 + "deadbeef"


def test_a_redirect_to_another_host_gets_no_token(here):
    repository = "user/redirected"
    here.new_repository(f"models/{repository}")
    elsewhere = {"status": 307, "headers": {"Location": f"{here.cdn}/redirected"}, "times": 1}
    connect(Patience(0.0))
    seen = len(here.log())
    posts, gets = ({"match": f"{method} .*{repository}", **elsewhere} for method in ("POST", "GET"))
    with here.faults(posts, gets):
        for ask in (
            lambda: ignored_by_repository(HfApi(), repository, "main", ["config.json"]),
            lambda: HfApi().model_info(repository),
        ):
            with pytest.raises(Exception, match="403"):
                ask()
    requests = [line for line in here.log()[seen:] if "redirected" in line["path"]]
    assert [(line["origin"], line["auth"]) for line in requests] == [("hub", True), ("cdn", False)] * 2
    assert not any(line["token_elsewhere"] for line in requests)


def watched(command, environment) -> tuple[int, str, list[str]]:
    """Exit code, output, and the command lines of all processes that it started."""
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    command_lines = set()

    def has_ended() -> bool:
        with suppress(psutil.Error):  # it has just ended
            for child in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                command_lines.add(" ".join(child.cmdline()))
        return process.poll() is not None

    wait_until(has_ended)  # the pipe holds what so short a run prints
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, output, sorted(command_lines)


@pytest.mark.slow
def test_no_secret_is_in_a_file_a_log_a_process_list_or_a_request(on_hub, shards, tmp_path):
    """A whole run with pushes of checkpoints, final model and twin; then a push that fails, with a password."""
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    temporary.mkdir()
    secrets = (on_hub.token, WANDB_KEY, PASSWORD)
    environment = {**upload_environment(), **CPU_FP32, "WANDB_API_KEY": WANDB_KEY, "TMPDIR": str(temporary)}
    seen = len(on_hub.log())
    flags = toy_flags(tmp_path / "run", shards, push_to_hub=True, hub_model_id="user/secrets", stock_twin=True)
    code, output, command_lines = watched([sys.executable, str(SCRIPT), *flags], environment)
    assert code == 0, output
    assert any("modeling_gpt2repro.hub.push" in line for line in command_lines)  # the watch has seen a push
    requests = on_hub.log()[seen:]
    assert any(line["auth"] for line in requests)
    assert not [line for line in requests if line["token_elsewhere"]]
    assert not [line for line in requests if line["auth"] and line["origin"] != "hub"]

    mirror = on_hub.endpoint.replace("://", f"://me:{PASSWORD}@")
    push = [sys.executable, "-m", "modeling_gpt2repro.hub.push", str(tmp_path / "run"), "--hub_wait_seconds", "0"]
    code, more, lines = watched([*push, "--hub_model_id", "user/secrets"], {**environment, "HF_ENDPOINT": mirror})
    assert code == 2, more
    assert "the Hub does not accept this token" in more

    texts = {"the output": output + more, "the process list": "\n".join([*command_lines, *lines])}
    pushed = [on_hub.root / "models/user" / name for name in ("secrets", "secrets-gpt2")]
    folders = (tmp_path / "run", home, temporary, *pushed)
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert {"run.json", "push.log", "README.md", "metrics.jsonl"} <= {path.name for path in files}
    texts |= {str(path): path.read_bytes().decode(errors="replace") for path in files}
    leaks = [f"{secret} in {place}" for place, text in texts.items() for secret in secrets if secret in text]
    assert leaks == []
