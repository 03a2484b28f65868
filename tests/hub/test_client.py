"""What errors of the Hub's client mean for a push, and how long it is tried again."""

import json
import time
from types import SimpleNamespace

import pytest
from huggingface_hub import close_session, constants, get_session
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from modeling_gpt2repro.hub.client import Diagnosis, FilesDiffer, Patience, connect, diagnose_hub_error

HUB = "https://hub.test"
SIGNED = "https://s3.test/x?signature=1&more=2"


def answer(status: int, address: str = HUB, message: str = "no") -> HfHubHTTPError:
    request = SimpleNamespace(url=address)
    return HfHubHTTPError(message, response=SimpleNamespace(status_code=status, headers={}, request=request))


def with_cause(error: BaseException, cause: BaseException | None) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "exit_code", "attempts", "message"),
    [
        (
            with_cause(RuntimeError("uploading"), with_cause(HTTPError("failed"), OSError(113, "No route"))),
            3,
            float("inf"),
            "the Hub cannot be reached ([Errno 113] No route)",
        ),
        # Of a refusal, whose cause may be a token that has expired, Xet's client says the same.
        (ConnectionError("403 by Xet"), 3, float("inf"), "the Hub cannot be reached (403 by Xet)"),
        (RuntimeError("by Xet"), 3, float("inf"), "the Hub cannot be reached (by Xet)"),
        (
            with_cause(RuntimeError("uploading"), TimeoutError("no answer")),
            3,
            float("inf"),
            "the Hub does not answer (",
        ),
        (PermissionError(13, "Permission denied"), 2, 1, "a problem on this machine prevents pushing ("),
        (with_cause(RuntimeError("uploading"), OSError(5, "Input/output error")), 2, 1, "a problem on this machine"),
        (json.JSONDecodeError("no JSON", "<html>", 0), 3, float("inf"), "the Hub cannot be reached (the answer"),
        *((answer(status), 3, float("inf"), "the Hub cannot be reached (no)") for status in (429, 500, 503)),
        (answer(400), 2, 1, "the Hub refuses user/any (no)"),
        *((answer(status), 3, float("inf"), "user/any is being changed by someone else (no)") for status in (409, 412)),
        (answer(401), 2, 1, "the Hub does not accept this token"),
        (answer(403), 2, 1, "this token may not write to user/any (no)"),
        (answer(404), 2, 1, "the Hub refuses user/any (no)"),
        (answer(403, SIGNED), 2, 3, "s3.test, where the Hub stores large files, refuses"),
        (
            answer(503, SIGNED, f"Server error '503 Busy' for url '{SIGNED}'\nFor more information, see x"),
            3,
            float("inf"),
            "s3.test, where the Hub stores large files, cannot be reached (Server error '503 Busy' for url "
            "'https://s3.test/x')",
        ),
        (KeyError("url"), 3, float("inf"), "the Hub cannot be reached (the answer is not as a Hub's: KeyError: 'url')"),
        (FilesDiffer("files in user/any differ from those in model: a, b"), 4, 3, "files in user/any differ"),
    ],
)
def test_an_error_has_its_sentence_exit_code_and_number_of_attempts(monkeypatch, error, exit_code, attempts, message):
    monkeypatch.setattr(constants, "ENDPOINT", "https://Hub.test")
    diagnosis = diagnose_hub_error(error, repository="user/any")
    assert diagnosis[1:] == (exit_code, attempts)
    assert diagnosis.message.startswith(message)
    assert "signature" not in diagnosis.message


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """A clock of one number, which pauses and tests move."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


class FakeClient:
    """Sends requests as the Hub's client does: with a pause, again and again, until an error of ours gets through."""

    def __init__(self, clock: list[float], patience: Patience):
        self.clock = clock
        self.patience = patience

    def request(
        self,
        status: int | None,
        seconds: float = 0.0,
        method: str = "POST",
        attempts: int = 6,
        headers: dict[str, str] | None = None,
        url: str = HUB,
    ):
        """A request that is answered after `seconds`, or never if `status` is None, as often as the client sends it."""
        for _ in range(attempts):
            request = SimpleNamespace(url=url, extensions={}, method=method)
            self.patience.limit(request)
            if status is None:
                self.clock[0] += request.extensions["timeout"]["read"]
            else:
                self.clock[0] += seconds
                self.patience.note(
                    SimpleNamespace(status_code=status, request=request, is_success=status < 300, headers=headers or {})
                )
                if status < 300:
                    return
            self.clock[0] += 1
        raise ConnectionError(f"ended with {status}")


def diagnose_transient(error: Exception) -> Diagnosis:
    return Diagnosis(str(error), exit_code=3)


@pytest.mark.parametrize("patience_seconds", [10, 60, 600])
def test_silence_takes_no_longer_than_the_patience(clock, patience_seconds):
    patience = Patience(patience_seconds)
    fake = FakeClient(clock, patience)
    with pytest.raises(TimeoutError, match="no answer for"):
        patience.retry(lambda: fake.request(None, attempts=100), diagnose_transient, show=lambda message: None)
    assert patience_seconds <= clock[0] <= patience_seconds + 2


def test_silence_after_an_answer_takes_at_most_twice_the_patience(clock):
    patience = Patience(30)
    fake = FakeClient(clock, patience)

    def attempt():
        fake.request(200)
        fake.request(None)

    with pytest.raises(TimeoutError):
        patience.retry(attempt, diagnose_transient, show=lambda message: None)
    assert clock[0] <= 2 * 30 + 4


def test_a_hub_that_is_busy_within_the_client_is_not_called_silent(clock):
    patience = Patience(10)
    fake = FakeClient(clock, patience)
    with pytest.raises(ConnectionError, match="status 503"):
        patience.retry(lambda: fake.request(503, seconds=2), diagnose_transient, show=lambda message: None)
    assert clock[0] <= 10 + 4


def test_a_wait_that_the_hub_asks_for_must_fit_into_the_patience(clock):
    patience = Patience(60)
    fake = FakeClient(clock, patience)
    with pytest.raises(ConnectionError, match="status 429: try again in 3600 s"):
        fake.request(429, headers={"Retry-After": "3600"})
    with pytest.raises(ConnectionError, match="status 429: try again in 280 s"):
        fake.request(429, headers={"ratelimit": '"api";r=0;t=280'})  # which the Hub sends, and the client heeds
    with pytest.raises(ConnectionError, match="ended with 429"):
        fake.request(429, headers={"Retry-After": "5"}, attempts=1)


def test_a_client_that_starts_anew_after_a_refused_connection_keeps_to_the_patience(here):
    patience = Patience(60)
    connect(patience)
    connect(patience)
    close_session()
    assert get_session().event_hooks["request"].count(patience.limit) == 1
    assert get_session().event_hooks["response"] == [patience.note]


@pytest.mark.parametrize("protocol", ["lfs", "xet"])
def test_a_long_upload_renews_the_patience(clock, protocol):
    """A Hub that is busy for a moment, an hour of sending, then a Hub that is busy again."""
    patience = Patience(20)
    fake = FakeClient(clock, patience)
    answers = iter([503, 200, 503, 503, 200, 200])
    sent = []

    def attempt() -> str:
        fake.request(next(answers), attempts=1)
        if not sent:
            if protocol == "lfs":
                fake.request(200, seconds=3600, method="PUT")
            else:  # of which the patience sees nothing
                clock[0] += 3600
            sent.append(True)
        fake.request(next(answers), attempts=1, url=f"{HUB}/api/models/user/any/commit/main")
        return "pushed"

    assert patience.retry(attempt, diagnose_transient, show=lambda message: None) == "pushed"


def test_a_hub_that_takes_no_commit_is_given_up(clock):
    patience = Patience(20)
    fake = FakeClient(clock, patience)

    def attempt():
        fake.request(200)
        fake.request(503, attempts=1, url=f"{HUB}/api/models/user/any/commit/main")

    with pytest.raises(ConnectionError, match="ended with 503"):
        patience.retry(attempt, diagnose_transient, show=lambda message: None)
    assert clock[0] <= 20 + 4


def test_what_another_attempt_may_mend_is_tried_three_times(clock):
    tried = []

    def attempt():
        tried.append(clock[0])
        raise FilesDiffer("a, b")

    with pytest.raises(FilesDiffer):
        Patience(600).retry(attempt, lambda error: Diagnosis(str(error), 4, 3), show=lambda message: None)
    assert tried == [0, 1, 3]
