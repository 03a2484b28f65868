"""Which failed reads from the Hub are repeated, and for how long."""

from dataclasses import dataclass

import pytest
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from modeling_gpt2repro.storage import hub_files
from modeling_gpt2repro.storage.hub_files import retry_hub_read
from modeling_gpt2repro.storage.retry import backoff_seconds


class Failing:
    """Fails with the errors it is given, one after another, then returns 7."""

    def __init__(self, *errors):
        self.errors, self.calls = list(errors), 0

    def __call__(self):
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return 7


def http_error(status):
    @dataclass
    class Answer:
        status_code: int
        headers: dict
        request: None = None
        history: tuple = ()

    return HfHubHTTPError("the Hub says no", response=Answer(status, {}))


@pytest.fixture(autouse=True)
def pauses(monkeypatch) -> list[float]:
    """The pauses between attempts, on a clock that only they move."""
    taken = []
    monkeypatch.setattr(hub_files.time, "monotonic", lambda: sum(taken))
    monkeypatch.setattr(hub_files.time, "sleep", taken.append)
    return taken


def test_a_busy_or_unreachable_hub_is_asked_again(pauses):
    work = Failing(http_error(503), HTTPError("connection lost"), http_error(429))
    assert (retry_hub_read(work), work.calls) == (7, 4)
    assert sum(pauses) == 1 + 2 + 4


def test_eight_attempts_of_23_seconds_each_fit_into_the_patience(pauses, monkeypatch):
    """23 seconds are what the Hub's client takes by itself before it gives up."""
    calls = []

    def slow_attempt():
        calls.append(23.0)
        raise HTTPError("connection lost")

    monkeypatch.setattr(hub_files.time, "monotonic", lambda: sum(pauses) + sum(calls))
    with pytest.raises(ConnectionError):
        retry_hub_read(slow_attempt)
    assert len(calls) == 8


def test_pauses_grow_to_a_minute():
    endless = backoff_seconds()
    assert [next(endless) for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_the_patience_ends_in_a_sentence(one_sentence, monkeypatch):
    monkeypatch.setattr(hub_files, "READ_PATIENCE_SECONDS", 3.0)
    work = Failing(*[HTTPError("connection lost")] * 9)
    with pytest.raises(ConnectionError, match=r"the Hub did not answer for 3 s \(connection lost\)") as error:
        retry_hub_read(work)
    one_sentence(error)
    assert work.calls == 3


def test_refusals_and_errors_of_our_own_are_not_repeated():
    for refusal in (http_error(401), http_error(404), ValueError("damaged"), RuntimeError("a script")):
        work = Failing(refusal)
        with pytest.raises(type(refusal)):
            retry_hub_read(work)
        assert work.calls == 1
