"""The tokenizer beside shards of a stranger: the same ids or a refusal, without network, code or endless reads."""

import shutil
import signal
import socket
from pathlib import Path

import pytest
from damage import ENDLESS, edit_json

from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.tokenizer import tokenizer_sha256

SECONDS = 30  # after which a read is taken to wait forever
CODE = "from pathlib import Path\nPath({marker!r}).touch()\nclass T: pass\n"


@pytest.fixture
def folder(tmp_path, token_shards):
    return shutil.copytree(token_shards.folder, tmp_path / "shards")


@pytest.fixture(autouse=True)
def no_network_and_no_waiting(monkeypatch):
    def connect(_, address):
        raise AssertionError(f"it asked {address}")

    def late(*_):
        raise AssertionError("it waits")

    monkeypatch.setattr(socket.socket, "connect", connect)
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


CONFIGS = {  # entries of tokenizer_config.json
    "code of another repository": {"auto_map": {"AutoTokenizer": ["owner/name--code.T", "owner/name--code.T"]}},
    "code beside it": {"auto_map": {"AutoTokenizer": ["code.T", "code.T"]}, "trust_remote_code": True},
    "a class that needs code": {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": "code.T"}},
    "another class": {"tokenizer_class": "LlamaTokenizer"},
    "another repository": {"name_or_path": "owner/name", "_name_or_path": "owner/name", "_commit_hash": "0" * 40},
    "a file without end": {"tokenizer_file": "/dev/zero"},
    "files of this machine": {"vocab_file": "/etc/passwd", "merges_file": "/etc/passwd"},
    "other files": {"fast_tokenizer_files": ["tokenizer.9.0.0.json", "../../tokenizer.json"], "gguf_file": "x.gguf"},
    "another backend": {"backend": "mistral-common", "fix_mistral_regex": True, "transformers_version": "4.57.2"},
    "a template that never ends": {
        "chat_template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    },
    "no template": {"chat_template": {"a": [1]}},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_what_a_config_asks_for_is_not_fetched_and_not_run(folder, tmp_path, monkeypatch, kind, token_shards):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "marker"
    (folder / "tokenizer/code.py").write_text(CODE.format(marker=str(marker)))
    edit_json(folder / "tokenizer/tokenizer_config.json", lambda config: config.update(CONFIGS[kind]))
    opened = open_shards(folder)
    assert tokenizer_sha256(opened.tokenizer) == token_shards.manifest["tokenizer"]["sha256"]
    assert not marker.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("put", [*ENDLESS.values(), Path.mkdir], ids=[*ENDLESS, "a folder"])
def test_something_else_in_place_of_a_file_is_named(folder, name, put, one_sentence):
    (folder / "tokenizer" / name).unlink(missing_ok=True)
    put(folder / "tokenizer" / name)
    with pytest.raises(ValueError, match=rf"its {name} (is not a file|cannot be read)") as error:
        open_shards(folder)
    one_sentence(error)


@pytest.mark.parametrize("put", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_template_is_not_read_without_end(folder, put, one_sentence):
    put(folder / "tokenizer/chat_template.jinja")
    with pytest.raises(ValueError, match=r"its chat_template\.jinja (is not a file|has more than)") as error:
        open_shards(folder)
    one_sentence(error)


def test_a_file_in_place_of_the_folder_and_no_folder(folder, one_sentence):
    shutil.rmtree(folder / "tokenizer")
    for put in (lambda: None, (folder / "tokenizer").touch):
        put()
        with pytest.raises(ValueError, match=r"tokenizer does not load \(it is not a folder\)") as error:
            open_shards(folder)
        one_sentence(error)
