"""Retry with exponential backoff, and which errors of the Hub are transient."""

import re
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError, HTTPError  # httpx's HTTPError: base of the Hub's errors, too

Result = TypeVar("Result")

FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0
# Timeout, concurrent commit (conflict, precondition), too early, rate limit, and every fault of the server itself.
TRANSIENT_STATUS = {408, 409, 412, 425, 429, *range(500, 600)}
# Before it uploads, the Xet client asks the Hub for a token; a refusal is a ConnectionError with nothing but this text.
XET_TOKEN_REFUSED = re.compile(r"HTTP status client error \((\d{3}) .*/xet-(?:read|write)-token")
REFUSED_STATUS = {401, 403, 404}


def retry(
    attempt: Callable[[], Result],
    patience_seconds: float,
    errors: tuple[type[Exception], ...] = (HTTPError, OSError, RuntimeError),
    on_retry: Callable[[str], None] = lambda message: None,
    may_pass: Callable[[BaseException], bool] | None = None,
    sleep: Callable[[float, float], None] = lambda pause, left: time.sleep(pause),
) -> Result:
    """Call `attempt` until it succeeds, fails with an error that will not pass, or `patience_seconds` are over.

    Args:
        errors: Which errors may pass at all; others are raised at once.
        on_retry: Receives a sentence before each pause.
        may_pass: Which of them may; `is_transient` by default.
        sleep: Receives the seconds to sleep, and those until `attempt` is given up.
    """
    may_pass = may_pass or is_transient
    deadline = time.monotonic() + patience_seconds
    for pause in backoff_seconds():
        try:
            return attempt()
        except errors as error:
            left = deadline - time.monotonic()
            if not may_pass(error) or pause > left:
                raise
            seconds = f"trying again in {pause:.0f} s, giving up in {left:.0f} s."
            on_retry(f"the Hub cannot be reached ({describe_error(error)}); {seconds}")
            sleep(pause, left)


def backoff_seconds() -> Iterator[float]:
    """Yield 1, 2, 4, ... seconds, at most a minute, forever."""
    pause = FIRST_BACKOFF_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, MAX_BACKOFF_SECONDS)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: the connection or the server failed, not this machine."""
    status = http_status(error)
    if status is not None:
        return status in TRANSIENT_STATUS
    chain = exception_chain(error)
    if any(isinstance(cause, HTTPError | ConnectionError | TimeoutError) for cause in chain):
        return True
    return not any(isinstance(cause, OSError) for cause in chain)


def is_refusal(error: BaseException) -> bool:
    """Whether the Hub, or the host that it sent the client to, says that there is no such file, or not for us."""
    answer = http_error(error)
    if answer is None:
        return isinstance(error, FileNotFoundError)  # the Hub's file system says so
    return answer.response.status_code in REFUSED_STATUS


def exception_chain(error: BaseException) -> list[BaseException]:
    """The error and its causes: the client wraps whatever happens during an upload."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def http_status(error: BaseException) -> int | None:
    """The status of the Hub's answer among an error's causes; None if the Hub did not answer."""
    for cause in exception_chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status
        if refused := XET_TOKEN_REFUSED.search(str(cause)):
            return int(refused[1])
    return None


def http_error(error: BaseException) -> HfHubHTTPError | None:
    """The answer of the Hub among an error's causes; None if the Hub did not answer."""
    return next((cause for cause in exception_chain(error) if isinstance(cause, HfHubHTTPError)), None)


def describe_error(error: BaseException) -> str:
    """The first line of the Hub's message, or else of the error that lies at the bottom of the chain."""
    answer = http_error(error)
    root_cause = exception_chain(error)[-1]
    message = (answer is not None and answer.server_message) or str(root_cause)
    if isinstance(root_cause, KeyError):  # its message is a bare key
        message = f"{type(root_cause).__name__}: {message}"
    return next(iter(message.strip().splitlines()), type(root_cause).__name__)
