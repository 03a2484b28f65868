"""Pushing to the Hub and reading from it over Xet, the client's default protocol."""

import json
import os
import re
import subprocess
import sys

import pytest
from patience import PATIENCE_SECONDS
from pushing import as_pushed, files_in, run_push
from toy_runs import CPU_FP32, ROOT, TOKENS_PER_STEP, logged_values, train_here

pytest.importorskip("hf_xet")


@pytest.fixture
def on_xet_hub(xet_hub, point_to_hub):
    """A Hub that speaks Xet, which processes started by the test talk to."""
    point_to_hub(xet_hub)
    return xet_hub


def requests(hub, pattern: str, seen: int = 0) -> list[str]:
    lines = [f"{line['method']} {line['path']}" for line in hub.log()[seen:]]
    return [line for line in lines if re.search(pattern, line)]


def test_a_checkpoint_arrives_whole_in_one_commit_and_is_not_sent_twice(on_xet_hub, folder):
    for _ in range(2):
        result = run_push(folder, "--hub_model_id", "user/sent", "--with_training_state")
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(f"pushed to {on_xet_hub.endpoint}/user/sent (commit ")
        assert files_in(on_xet_hub.root / "models/user/sent") == files_in(folder)
        assert len(requests(on_xet_hub, "user/sent/commit/")) == 1
    assert requests(on_xet_hub, "user/sent/xet-write-token/") != []
    assert requests(on_xet_hub, "user/sent.git/info/lfs") == []


def test_a_folder_of_many_files_is_one_commit(on_xet_hub, folder):
    for number in range(300):
        (folder / f"{number}.txt").write_text(str(number))
    result = run_push(folder, "--hub_model_id", "user/many", "--with_training_state")
    assert result.returncode == 0, result.stderr
    assert files_in(on_xet_hub.root / "models/user/many") == files_in(folder)
    assert len(requests(on_xet_hub, "user/many/commit/")) == 1


@pytest.mark.parametrize(
    "fault",
    [
        {"match": "POST /v1/xorbs", "status": 503},
        {"match": "POST /v1/xorbs", "drop": 0},
        {"match": "POST /v1/shards", "status": 429},
        {"match": "POST /v1/shards", "drop": 0},
    ],
)
def test_the_client_itself_repeats_what_the_storage_did_not_take(on_xet_hub, folder, fault):
    seen = len(on_xet_hub.log())
    (folder / "model.safetensors").write_bytes(json.dumps(fault).encode() * 100)  # not yet known to the storage
    with on_xet_hub.faults({**fault, "times": 2}):
        result = run_push(folder, "--hub_model_id", "user/busy")
    assert (result.returncode, "trying again" in result.stderr) == (0, False), result.stderr
    assert len(requests(on_xet_hub, fault["match"], seen)) == 3
    pushed = on_xet_hub.root / "models/user/busy/model.safetensors"
    assert pushed.read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("fault", [{"status": 503}, {"drop": 0}])
def test_a_storage_that_stays_away_has_the_exit_code_of_an_unreachable_hub(on_xet_hub, folder, fault):
    name = f"user/{'-'.join(fault)}-away"
    (folder / "model.safetensors").write_bytes(name.encode() * 1000)
    words = (folder, "--hub_model_id", name)
    seen = len(on_xet_hub.log())
    with on_xet_hub.faults({"match": "POST /v1/", **fault}):
        result = run_push(*words, "--hub_wait_seconds", 0)
    assert result.returncode == 3
    assert len(requests(on_xet_hub, "POST /v1/", seen)) <= 3  # the client waits up to minutes between further ones
    assert re.search(r"the Hub cannot be reached \(.*/v1/.*\): try again later\.\n$", result.stderr)
    assert files_in(on_xet_hub.root / "models" / name) == {}  # no commit of a part
    assert run_push(*words).returncode == 0
    assert "model.safetensors" in files_in(on_xet_hub.root / "models" / name)


@pytest.mark.parametrize("words", [("--check",), ()])
def test_a_hub_without_xet_is_refused_in_one_sentence_that_names_the_way_out(
    hub, point_to_hub, monkeypatch, folder, words
):
    point_to_hub(hub)
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    result = run_push(*(words or [folder]), "--hub_model_id", "user/lfs-only")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "this Hub does not support Xet, the client's default protocol: set HF_HUB_DISABLE_XET=1."
    )
    assert "trying again" not in result.stderr
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    assert run_push(*(words or [folder]), "--hub_model_id", "user/lfs-only").returncode == 0


@pytest.mark.parametrize(
    ("status", "message"), [(401, "does not accept this token"), (403, "may not write to user/any")]
)
def test_a_refused_xet_token_is_a_refusal_of_the_users_token(on_xet_hub, folder, status, message):
    with on_xet_hub.faults({"match": "xet-write-token", "status": status}):
        result = run_push(folder, "--hub_model_id", "user/any")
    assert result.returncode == 2
    assert message in result.stderr
    assert "trying again" not in result.stderr


def test_the_check_of_rights_goes_the_way_of_weights(on_xet_hub, monkeypatch):
    result = run_push("--check", "--hub_model_id", "checked")
    assert (result.returncode, result.stdout) == (0, f"can be written: {on_xet_hub.endpoint}/user/checked\n")
    assert files_in(on_xet_hub.root / "models/user/checked") == {}
    assert not list((on_xet_hub.root / "branches/models/user/checked").glob("*"))
    assert len(requests(on_xet_hub, "user/checked/commit/")) == 1
    assert requests(on_xet_hub, "user/checked/xet-write-token/") != []
    monkeypatch.setenv("HF_TOKEN", on_xet_hub.read_only_token)
    refused = run_push("--check", "--hub_model_id", "user/checked")
    assert refused.returncode == 2
    assert "this token may not write to user/checked" in refused.stderr


READ = """
import sys
from pathlib import Path

import torch
from toy_runs import train_here
from transformers import AutoModelForCausalLM

run, shards = map(Path, sys.argv[1:])
assert train_here(run, shards, resume_from_checkpoint="user/xet@last-checkpoint") == 0
model = AutoModelForCausalLM.from_pretrained("user/xet")
torch.save(model.state_dict(), run / "from_hub.pt")
"""


def run_program(program: str, *words, **environment: str) -> str:
    """In a fresh interpreter, because the clients read HF_ENDPOINT when they are imported."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    process = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        env={**os.environ, "PYTHONPATH": paths, **CPU_FP32, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_a_run_pushes_in_the_background_and_is_resumed_and_loaded_from_the_hub(on_xet_hub, shards, tmp_path, capsys):
    import torch
    from safetensors.torch import load_file

    run = tmp_path / "xet"
    given = {"push_to_hub": True, "hub_strategy": "checkpoint", "train_tokens": 20 * TOKENS_PER_STEP}
    assert train_here(run, shards, **given) == 0
    assert "Training in progress, step 20: pushed to" in capsys.readouterr().out
    assert files_in(on_xet_hub.root / "models/user/xet") == as_pushed(run / "model", "user/xet")
    assert files_in(on_xet_hub.root / "branches/models/user/xet/last-checkpoint") == files_in(run / "step-000020")

    seen = len(on_xet_hub.log())
    faults = [
        {"match": "xet-read-token", "status": 503, "times": 1},
        {"match": "GET /v1/reconstructions", "status": 503, "times": 2},
        {"match": "GET /xorbs/", "drop": 700, "times": 1},
        {"match": "GET /xorbs/", "status": 403, "times": 1},  # the address has expired
    ]
    with on_xet_hub.faults(*faults):
        output = run_program(READ, tmp_path / "resumed", shards)
    assert "resuming from step 20" in output
    assert len(requests(on_xet_hub, "GET /xorbs/", seen)) >= 4
    assert train_here(tmp_path / "local", shards, resume_from_checkpoint=run / "step-000020") == 0
    assert logged_values(tmp_path / "resumed") == logged_values(tmp_path / "local") != []
    loaded = torch.load(tmp_path / "resumed" / "from_hub.pt")
    pushed = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(loaded[name], weight) for name, weight in pushed.items())


STREAM = """
import functools
import sys
from pathlib import Path

import datasets
import huggingface_hub.hf_file_system as files
from toy_runs import TOKENS_PER_STEP, train_here

datasets.config.STREAMING_READ_RETRY_INTERVAL = 0.01  # no pauses
files.http_backoff = functools.partial(files.http_backoff, base_wait_time=0.01)
folder, tokenizer = map(Path, sys.argv[1:])
for name in ("parquet", "jsonl"):
    stream = {"dataset_name": f"toy/{name}", "tokenizer": tokenizer, "train_tokens": 8 * TOKENS_PER_STEP}
    assert train_here(folder / name, None, **stream, eval_steps=0, num_samples=0, save_steps=100) == 0
"""


def write_datasets(hub, prose):
    """The rows of a file of JSON lines in two files each, all of which the Hub keeps in LFS."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [json.loads(line) for line in prose.read_text().splitlines()]
    tables = hub.new_repository("datasets/toy/parquet")
    lines = hub.new_repository("datasets/toy/jsonl")
    for part in range(2):
        half = rows[part::2]
        pq.write_table(pa.table({"text": [row["text"] for row in half]}), tables / f"{part}.parquet", row_group_size=8)
        wide = [json.dumps(row | {"more": "x" * 280_000}) for row in half]  # files up to 10 MiB may be regular ones
        (lines / f"{part}.jsonl").write_text("\n".join(wide))


def test_a_stream_gives_the_same_ids_over_either_protocol_and_asks_no_storage_of_xet(
    on_xet_hub, hub, warm_python, shards, tmp_path
):
    """Byte ranges of files come from the CDN by their address, whether or not the client speaks Xet."""
    for each in (hub, on_xet_hub):
        write_datasets(each, shards.parent / "prose.jsonl")
    warm_python.run("-c", STREAM, tmp_path / "lfs", shards / "tokenizer", **CPU_FP32)
    seen = len(on_xet_hub.log())
    faults = [
        {"match": f"GET /lfs/.*{kind}", "times": 1, **fault}
        for kind in ("parquet", "jsonl")
        for fault in ({"status": 503}, {"drop": 700}, {"status": 429}, {"drop": 0})
    ]
    # When both footers have been read: an address that has expired.
    faults += [
        {"match": "GET /lfs/.*parquet", **fault} for fault in ({"drop": 10**9, "times": 2}, {"status": 403, "times": 1})
    ]
    with on_xet_hub.faults({"match": " /v1/", "status": 503}, *faults):
        run_program(STREAM, tmp_path / "xet", shards / "tokenizer")
    log = on_xet_hub.log()[seen:]
    assert {line["origin"] for line in log} == {"hub", "cdn"}
    for kind in ("parquet", "jsonl"):
        statuses = [line["status"] for line in log if line["origin"] == "cdn" and line["path"].endswith(kind)]
        assert {503, 429, 206, None} <= set(statuses)
        assert (403 in statuses) is (kind == "parquet")
        assert logged_values(tmp_path / "xet" / kind) == logged_values(tmp_path / "lfs" / kind) != []
