"""Fixtures of the tests that push."""

import os

import pytest
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils._http import default_client_factory

from modeling_gpt2repro.storage import retry


@pytest.fixture
def point_to_hub(tmp_path, monkeypatch):
    """point_to_hub(hub): processes started by the test talk to it, with a token that may write."""

    def point(hub):
        environment = {**hub.environment(tmp_path / "home"), "HF_TOKEN": hub.token}
        for name in os.environ.keys() - environment:  # such as HF_HUB_OFFLINE
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return point


@pytest.fixture
def on_hub(hub, point_to_hub):
    """The loopback Hub, which processes started by the test talk to."""
    point_to_hub(hub)
    return hub


@pytest.fixture(params=["lfs", "xet"])
def either_hub(request, point_to_hub):
    """A Hub that processes talk to over LFS or Xet."""
    hub = request.getfixturevalue("hub" if request.param == "lfs" else "xet_hub")
    point_to_hub(hub)
    return hub


@pytest.fixture
def here(on_hub, monkeypatch):
    """The loopback Hub for code in this process, where the client has been imported already; retries at once."""
    monkeypatch.setattr(constants, "ENDPOINT", on_hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(retry, "FIRST_BACKOFF_SECONDS", 0.01)
    yield on_hub
    set_client_factory(default_client_factory)


@pytest.fixture
def folder(tmp_path):
    """A small folder with the files of a checkpoint."""
    checkpoint = tmp_path / "step-000010"
    (checkpoint / "training_state").mkdir(parents=True)
    (checkpoint / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (checkpoint / "config.json").write_text("{}")
    (checkpoint / "model.safetensors").write_bytes(b"weights" * 1000)
    (checkpoint / "training_state" / "optimizer.safetensors").write_bytes(b"moments" * 2000)
    return checkpoint


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a finished run, without its model; see `write_run`."""
    from cards import write_run

    return write_run(tmp_path)
