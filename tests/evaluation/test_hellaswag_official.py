"""The official validation file: downloaded once, verified, cached; another file is refused and deleted."""

import hashlib
import http.server
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import pytest
from huggingface_hub import constants
from toy_runs import TOKENS_PER_STEP, train_here

import eval_hellaswag
from modeling_gpt2repro.evaluation.hellaswag import official as hellaswag_official
from modeling_gpt2repro.evaluation.hellaswag.examples import load_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.official import is_official_split, official_file

FIELDS_NOT_READ = {"split": "val", "split_type": "indomain", "source_id": "activitynet~v_-IMXSEIabMM"}
ONE_STEP = {"train_tokens": TOKENS_PER_STEP, "eval_steps": 0, "num_samples": 0}


class Server(http.server.ThreadingHTTPServer):
    """Serves `body`, which a test may replace, and counts the requests."""

    body = b""
    status = 200
    promised_more = 0  # bytes that the header announces and the body lacks
    requests = 0


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body) + self.server.promised_more))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch, hellaswag_rows):
    """A stand-in for the original repository, whose file is the seven examples, and a cache in `tmp_path`."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.body = "".join(json.dumps(asdict(row) | FIELDS_NOT_READ) + "\n" for row in hellaswag_rows).encode()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hellaswag_official, "OFFICIAL_URL", f"http://127.0.0.1:{server.server_port}/val.jsonl")
        monkeypatch.setattr(hellaswag_official, "OFFICIAL_SHA256", hashlib.sha256(server.body).hexdigest())
        monkeypatch.setattr(hellaswag_official, "OFFICIAL_EXAMPLES", len(hellaswag_rows))
        monkeypatch.setattr(hellaswag_official, "cached_assets_path", lambda *_: tmp_path)
        yield server
        server.shutdown()


def test_the_checksum_is_the_published_one():
    assert hellaswag_official.OFFICIAL_SHA256 == "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"


def files_of(folder):
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


def test_the_official_file_is_downloaded_once_and_then_cached(server, tmp_path, hellaswag_rows, monkeypatch):
    assert load_hellaswag("official") == hellaswag_rows
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load_hellaswag("official", limit=2) == hellaswag_rows[:2]
    assert server.requests == 1
    assert files_of(tmp_path) == {"hellaswag_val.jsonl"}


def test_simultaneous_processes_download_it_once(server):
    with ThreadPoolExecutor(8) as pool:
        paths = set(pool.map(lambda _: official_file(), range(8)))
    assert len(paths) == server.requests == 1


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"body": b"<!DOCTYPE html><title>Log in</title>"},
            ValueError,
            r"but 36 bytes that begin with b'<!DOCTYPE html>'",
        ),
        ({"body": b'{"ind": 24, "act'}, ValueError, "did not give HellaSwag's validation file but 16 bytes"),
        ({"promised_more": 10}, (ConnectionError, ValueError), "val.jsonl (could not be downloaded|did not give)"),
    ],
    ids=["html", "truncated", "connection lost"],
)
def test_another_file_is_refused_and_deleted(server, tmp_path, change, error, sentence, one_sentence):
    if "promised_more" in change:
        server.body = server.body[:-10]
    for name, value in change.items():
        setattr(server, name, value)
    with pytest.raises(error, match=sentence) as raised:
        official_file()
    one_sentence(raised)
    assert files_of(tmp_path) == set()


@pytest.mark.parametrize("status", [403, 404, 410, 451])
def test_a_file_that_is_gone_for_good_is_not_a_matter_of_the_connection(server, tmp_path, status, one_sentence):
    server.status = status
    with pytest.raises(ConnectionError, match=f"is no longer available .it answers {status}; ") as raised:
        official_file()
    sentence = one_sentence(raised)
    assert "instead of official, give Rowan/hellaswag, " in sentence
    assert "connection" not in sentence
    assert files_of(tmp_path) == set()


@pytest.mark.parametrize("status", [401, 407, 429, 500, 503])
def test_a_server_or_proxy_that_refuses_for_now_is_a_matter_of_the_connection(server, status, one_sentence):
    server.status = status
    with pytest.raises(ConnectionError, match=rf"could not be downloaded into .* \(HTTP Error {status}") as raised:
        official_file()
    assert "no longer" not in one_sentence(raised)


@pytest.mark.parametrize("status", [404, 451])
def test_the_evaluation_and_the_training_say_what_to_give_instead(server, tmp_path, shards, capsys, status):
    server.status = status
    with pytest.raises(SystemExit) as ended:
        eval_hellaswag.main(["--data", "official", "--device", "cpu"])
    refused = capsys.readouterr().err
    assert ended.value.code == 2
    assert "--data: http://127.0.0.1" in refused
    assert "give Rowan/hellaswag" in refused
    assert train_here(tmp_path / "run", shards, hellaswag="official", **ONE_STEP) == 0
    printed = capsys.readouterr().out
    assert "HellaSwag is left out (--hellaswag official): http://127.0.0.1" in printed
    assert "give Rowan/hellaswag" in printed


def test_a_damaged_file_in_the_cache_is_named_deleted_and_downloaded_again(server, tmp_path, caplog, monkeypatch):
    cached = tmp_path / "hellaswag_val.jsonl"
    cached.write_bytes(server.body[:100])
    with caplog.at_level(logging.WARNING):
        assert official_file().read_bytes() == server.body
    assert f"{cached} is damaged (100 bytes" in caplog.text
    cached.write_bytes(b"<html>")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="is not in the cache and HF_HUB_OFFLINE is set"):
        official_file()
    assert files_of(tmp_path) == set()


def test_the_error_without_a_network_says_what_to_do(server, monkeypatch, one_sentence):
    monkeypatch.setattr(hellaswag_official, "OFFICIAL_URL", "http://127.0.0.1:9/val.jsonl")
    with pytest.raises(ConnectionError, match=r"could not be downloaded .* name a local hellaswag_val.jsonl") as raised:
        official_file()
    one_sentence(raised)


def test_only_all_official_examples_count_as_the_official_split(server, tmp_path, hellaswag_rows):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(server.body)
    assert load_hellaswag(str(copy)) == hellaswag_rows
    for source in ("official", "Rowan/hellaswag", str(copy)):
        assert is_official_split(source, 7)
        assert not is_official_split(source, 6)
    copy.write_bytes(server.body + b"\n")
    assert not is_official_split(str(copy), 7)
    assert not is_official_split("someone/hellaswag", 7)
