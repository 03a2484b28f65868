"""Exponential backoff, and what errors of the Hub mean."""

import re
from collections.abc import Iterator

# httpx's HTTPError is the base of the Hub's errors, too.
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

FIRST_BACKOFF_SECONDS = 1.0
MAX_BACKOFF_SECONDS = 60.0
# Timeout, concurrent commit (conflict, precondition), too early, rate limit, and every fault of the server itself.
TRANSIENT_STATUS = {408, 409, 412, 425, 429, *range(500, 600)}
REFUSED_STATUS = {401, 403, 404}


def backoff_seconds() -> Iterator[float]:
    """Yield 1, 2, 4, ... seconds, at most a minute, forever."""
    pause = FIRST_BACKOFF_SECONDS
    while True:
        yield pause
        pause = min(2 * pause, MAX_BACKOFF_SECONDS)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later: the connection or the server failed, not this machine."""
    chain = exception_chain(error)
    for cause in chain:
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status in TRANSIENT_STATUS
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
    line = next(iter(message.strip().splitlines()), type(root_cause).__name__)
    if isinstance(answer, RepositoryNotFoundError):  # or gated; without a token the Hub does not say which
        line = f"{line.rstrip('.')}; if it is private or gated, log in with hf auth login"
    return without_signatures(line)


def without_signatures(text: str) -> str:
    """'503 for url https://s3/x?signature=1' -> '503 for url https://s3/x': those who have it may use the address.

    The same for a password: 'https://me:secret@mirror' -> 'https://mirror'.
    """
    text = re.sub(r"(https?://)[^\s/?]*@", r"\1", text)
    return re.sub(r"(https?://[^\s?]*)\?[^\s')]*", r"\1", text)
