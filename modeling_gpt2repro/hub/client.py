"""A client of the Hub that waits no longer than it may, and what its errors mean for a push."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from huggingface_hub import HfApi, constants, get_session, get_token, set_client_factory
from huggingface_hub.errors import EntryNotFoundError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers

from modeling_gpt2repro.runtime.progress import count_down
from modeling_gpt2repro.storage.retry import (
    TRANSIENT_STATUS,
    backoff_seconds,
    describe_error,
    exception_chain,
    http_error,
    is_transient,
    without_signatures,
)

EXIT_CODE_REFUSED = 2  # trying again is no use before somebody changes something
EXIT_CODE_HUB_UNREACHABLE = 3  # the same command may succeed later
EXIT_CODE_FILES_DIFFER = 4  # the push went through, but other files arrived

DEFAULT_HUB_WAIT_SECONDS = 300.0
MAX_ANSWER_SECONDS = 120.0  # storing a file of many GB takes the Hub's storage some time after its last byte
MIN_ANSWER_SECONDS = 10.0  # with less patience than this, a busy Hub could not be pushed to at all
# By itself, Xet's client repeats a request five times, which takes five minutes or more and shows nothing. Twice takes
# some 15 seconds, and then the push is retried as a whole, with a message.
XET_RETRIES = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2"}
LIMITED_ATTEMPTS = 3  # for what another attempt may mend, but ten would not


class FilesDiffer(RuntimeError):
    """A push went through, but the repository does not hold the folder's files."""


# What the client ends in where something else than a Hub answers, such as a proxy's page.
UNEXPECTED_ANSWERS = (json.JSONDecodeError, KeyError, TypeError)
# What a request to the Hub may end in.
HUB_ERRORS = (HTTPError, OSError, RuntimeError, *UNEXPECTED_ANSWERS)


class Diagnosis(NamedTuple):
    """What an error means for a push."""

    message: str
    exit_code: int
    attempts: float = float("inf")  # how many make sense, if the patience lasts


class Waiting(threading.local):
    """Since when a thread has had no proper answer: one may wait while another, with another file, is answered."""

    since: float | None = None
    status: int | None = None  # of the answer it had


class Patience:
    """How long a Hub that fails is asked again.

    The Hub's client repeats some requests by itself, up to five times, and waits for each answer as long as it takes.
    So the limit reaches into the client: `connect` calls `limit` before every request and `note` after every answer.
    Sending a large file does not use it up: only silence does, and attempts that fail.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._seconds_for_an_answer = max(seconds, MIN_ANSWER_SECONDS)
        self._failing_since: float | None = None  # attempts have failed since then, and no file has arrived
        self._has_sent_all = False
        self._waiting = Waiting()

    def limit(self, request):
        """Give a request, which the client may be repeating, no more time for its answer than is left."""
        now = time.monotonic()
        if self._waiting.since is None:
            self._waiting.since = now
            self._waiting.status = None
        waited = now - self._waiting.since
        if waited >= self._seconds_for_an_answer:
            status = self._waiting.status
            error = ConnectionError(f"status {status}") if status else TimeoutError(f"no answer for {waited:.0f} s")
            raise with_request(error, request)
        seconds = min(MAX_ANSWER_SECONDS, self._seconds_for_an_answer - waited)
        request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), seconds)
        if "/commit/" in str(request.url) and not self._has_sent_all:  # all files have arrived, by Xet without a PUT
            self._has_sent_all = True
            self._failing_since = None

    def note(self, response):
        """Note what a request was answered; raise ConnectionError if the client would now wait for too long."""
        self._waiting.status = response.status_code
        if response.status_code not in TRANSIENT_STATUS - {409, 412}:  # in these two cases the Hub is well
            self._waiting.since = None
        elif (wait := seconds_to_wait(response)) > self._seconds_for_an_answer:
            error = ConnectionError(f"status {response.status_code}: try again in {wait} s")
            raise with_request(error, response.request)
        if response.request.method == "PUT" and response.is_success:  # progress: this file is not sent again
            self._failing_since = None

    def retry(
        self,
        attempt: Callable[[], str],
        diagnose: Callable[[Exception], Diagnosis],
        show: Callable[[str], None],
    ) -> str:
        """Call `attempt` until it succeeds, another attempt makes no sense, or the patience is over.

        Args:
            show: Receives a sentence before each pause.

        Raises:
            HUB_ERRORS: From the last attempt.
        """
        limited_failures = 0
        for pause in backoff_seconds():
            try:
                return attempt()
            except HUB_ERRORS as error:
                message, _, attempts = diagnose(error)
                limited_failures += attempts < float("inf")
                now = time.monotonic()
                if self._failing_since is None:
                    self._failing_since = now if self._waiting.since is None else self._waiting.since
                left = self._failing_since + self.seconds - now
                if limited_failures >= attempts or pause > left:
                    raise
                show(f"{message}; trying again in {pause:.0f} s, giving up in {left:.0f} s.")
                count_down(pause, left)


def seconds_to_wait(response) -> int:
    """How long the client waits before it repeats the request, because the Hub says so."""
    limit = parse_ratelimit_headers(response.headers)
    if response.status_code == 429 and limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    seconds = response.headers.get("Retry-After", "")
    return int(seconds) if seconds.isdecimal() else 0


def with_request(error: OSError, request) -> OSError:
    """The error, which can be asked for its request, as those of the client can."""
    error.request = request
    return error


def connect(patience: Patience) -> HfApi:
    """Create a Hub client that gives up on a request without an answer.

    Raises:
        ValueError: If this machine is set to offline mode or has no token.
    """
    if constants.is_offline_mode():
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or do not push.")
    if get_token() is None:
        raise ValueError("there is no token to push with: log in with `hf auth login`, or set HF_TOKEN.")
    client_class = type(get_session())
    hooks = get_session().event_hooks["request"]  # such as the one that logs for HF_DEBUG
    hooks = [hook for hook in hooks if not isinstance(getattr(hook, "__self__", None), Patience)]
    hooks = {"request": [*hooks, patience.limit], "response": [patience.note]}
    # Not just set on the session: after a refused connection, the client makes itself another one.
    set_client_factory(lambda: client_class(follow_redirects=True, event_hooks=hooks))
    # The client warns of what it repeats, with the address.
    logging.getLogger("huggingface_hub.utils._http").addFilter(hide_signatures)
    for name, value in XET_RETRIES.items():  # read when the first upload begins
        os.environ.setdefault(name, value)
    return HfApi()


def hide_signatures(record: logging.LogRecord) -> bool:
    record.msg = without_signatures(str(record.msg))
    return True


def ask_storage(api: HfApi, repository: str, branch: str, repo_type: str = "model"):
    """Find out whether the storage that Xet uploads to answers: its client, in Rust, does not keep to any patience.

    Raises:
        ValueError: If there is none, because this Hub does not know Xet.
        HTTPError, OSError: If it does not answer.
    """
    if constants.HF_HUB_DISABLE_XET or find_spec("hf_xet") is None:
        return
    address = f"{api.endpoint}/api/{repo_type}s/{repository}/xet-write-token/{quote(branch, safe='')}"
    response = get_session().get(address, headers=build_hf_headers())
    if response.status_code == 404:
        raise ValueError("this Hub does not support Xet, the client's default protocol: set HF_HUB_DISABLE_XET=1.")
    hf_raise_for_status(response)
    get_session().head(response.json()["casUrl"])  # any answer will do


def diagnose_hub_error(error: Exception, repository: str, flag: str = "--hub_model_id") -> Diagnosis:
    """Say what has failed, whether trying again may help, and if not, what has to change, such as the `flag`."""
    if isinstance(error, FilesDiffer):
        return Diagnosis(str(error), EXIT_CODE_FILES_DIFFER, LIMITED_ATTEMPTS)
    answer = http_error(error)
    description = describe_error(error)
    host = host_asked(error)
    is_hub = host in (
        None,
        urlsplit(constants.ENDPOINT.lower()).netloc,
    )  # and not its storage, which has addresses of its own
    who = "the Hub" if is_hub else f"{host}, where the Hub stores large files,"
    if answer is None:
        # By name: which HTTP library the client uses depends on its version.
        if any("Timeout" in type(cause).__name__ for cause in exception_chain(error)):
            return Diagnosis(f"{who} does not answer ({description})", EXIT_CODE_HUB_UNREACHABLE)
        if isinstance(error, UNEXPECTED_ANSWERS):
            description = f"the answer is not as a Hub's: {description}"
        elif not is_transient(error):
            message = f"a problem on this machine prevents pushing ({description})"
            return Diagnosis(message, EXIT_CODE_REFUSED, attempts=1)
        return Diagnosis(f"{who} cannot be reached ({description})", EXIT_CODE_HUB_UNREACHABLE)
    status = answer.response.status_code
    if not is_hub and status not in TRANSIENT_STATUS:
        # The Hub signs addresses of its storage for minutes or hours; the next attempt gets new ones.
        return Diagnosis(
            f"{who} refuses an upload with status {status}: this machine's clock, or a firewall or proxy on the way, "
            "may be the cause",
            EXIT_CODE_REFUSED,
            LIMITED_ATTEMPTS,
        )
    if status in (409, 412) or isinstance(answer, RevisionNotFoundError | EntryNotFoundError):
        return Diagnosis(f"{repository} is being changed by someone else ({description})", EXIT_CODE_HUB_UNREACHABLE)
    if status in TRANSIENT_STATUS:
        return Diagnosis(f"{who} cannot be reached ({description})", EXIT_CODE_HUB_UNREACHABLE)
    if status == 401:
        message = "the Hub does not accept this token: log in again with `hf auth login`, or set HF_TOKEN"
    elif status == 403 or isinstance(answer, RepositoryNotFoundError):
        message = (
            f"this token may not write to {repository} ({description}): use a token with the role 'write', or another "
            f"{flag}"
        )
    else:
        message = f"the Hub refuses {repository} ({description})"
    return Diagnosis(message, EXIT_CODE_REFUSED, attempts=1)


def host_asked(error: Exception) -> str | None:
    """Host and port of the request that failed; None if it is not known."""
    for cause in exception_chain(error):
        # Whether answered or not: an error of the Hub's client has its request in the answer only.
        for holder in (getattr(cause, "response", None), cause):
            with suppress(AttributeError, RuntimeError):  # it has no request, or not any more
                return urlsplit(str(holder.request.url)).netloc
    return None
