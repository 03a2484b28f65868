"""What the tests of the lock share."""

import pytest

from modeling_gpt2repro.storage import lock


@pytest.fixture
def short_times(monkeypatch):
    """Beats and waits of the lock take milliseconds."""
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lock, "GONE_SECONDS", 0.0)
    monkeypatch.setattr(lock, "RUNNING_PATIENCE_SECONDS", 0.6)
