"""Reading files on the Hub by byte range, with retries while the Hub is busy or unreachable."""

import time
from collections.abc import Callable
from typing import BinaryIO, TypeVar

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from .retry import backoff_seconds, describe_error, http_error, is_refusal, is_transient, without_signatures

Result = TypeVar("Result")
OnWait = Callable[[str], None]

# Enough for 8 attempts: the Hub's client spends 23 seconds on each, and there are 127 seconds of pauses between them.
READ_PATIENCE_SECONDS = 311.0
FIRST_CONTACT_TRIES = 5  # of a file that the data host refuses from the beginning: 15 seconds


def is_on_hub(path: str) -> bool:
    """Whether a path is an address such as hf://datasets/namespace/name@revision/file."""
    return path.startswith("hf://")


def open_hub_file(path: str) -> BinaryIO:
    """Open an `hf://` address; only the byte ranges that are read are downloaded."""
    # A cache that reads ahead would double the download: parquet readers know which ranges they need.
    return HfFileSystem().open(path, "rb", cache_type="none")


def dataset_commit(dataset: str, revision: str | None) -> str:
    """The commit that the revision names now. Asked for first, so that a missing network is noticed at once.

    Raises:
        ValueError: If there is no such dataset, or it has no such revision.
        ConnectionError: If the Hub cannot be reached.
    """
    return retry_hub_read(lambda: _dataset_commit(dataset, revision))


def _dataset_commit(dataset: str, revision: str | None) -> str:
    try:
        return HfApi().dataset_info(dataset, revision=revision).sha
    except RevisionNotFoundError as error:
        raise ValueError(f"it has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise ValueError("there is none of this name, or it is private: then log in with hf auth login.") from error
    except HfHubHTTPError:
        raise  # the Hub answered: `retry_hub_read` decides whether the error may pass
    except HTTPError as error:
        raise ConnectionError(type(error).__name__) from error


def retry_hub_read(work: Callable[[], Result], is_known: bool = False, on_wait: OnWait = lambda reason: None) -> Result:
    """Call `work`, and call it again while the Hub is busy or unreachable, for READ_PATIENCE_SECONDS.

    Args:
        is_known: What `work` opens has been opened before. Then a refusal (401, 403, 404) is no wrong name, but may be
            a signature that has expired or a firewall, and is tried again, too: `work` must open the file anew, which
            asks the Hub for its present address.
        on_wait: Called with why it is tried again, once for each second of a pause; what it raises ends the attempts.

    Raises:
        ConnectionError: If it still is when the patience is over.
        OSError: If the data host, to which the Hub sends its clients for a file, refuses it at first contact.
    """
    deadline = time.monotonic() + READ_PATIENCE_SECONDS
    refusals = 0
    for pause in backoff_seconds():
        try:
            return work()
        except (HTTPError, FileNotFoundError) as error:
            if is_refusal(error):
                refusals += 1
                HfFileSystem.clear_instance_cache()  # which remembers that something does not exist
                may_pass = is_known or (is_redirected(error) and refusals < FIRST_CONTACT_TRIES)
            else:
                may_pass = is_transient(error)
            if may_pass and time.monotonic() + pause <= deadline:
                reason = describe_failure(error)
            elif is_refusal(error) and is_known:
                raise ConnectionError(f"{describe_refusal(error)}, {refusals} times.") from error
            elif is_refusal(error) and is_redirected(error):
                raise OSError(
                    f"{describe_refusal(error)}, {refusals} times: the Hub has the file, so it may be a firewall that "
                    "refuses this host."
                ) from error
            elif may_pass:
                raise ConnectionError(
                    f"the Hub did not answer for {READ_PATIENCE_SECONDS:.0f} s ({describe_error(error)}): try again "
                    "later."
                ) from error
            else:
                raise  # the next answer would be the same
        while pause > 0:
            on_wait(reason)
            time.sleep(min(1.0, pause))
            pause -= 1.0


def is_redirected(error: BaseException) -> bool:
    """Whether the answer is that of a host to which the Hub sent the client: then the Hub knows what was asked for."""
    answer = http_error(error)
    return answer is not None and any(step.url.host != answer.response.url.host for step in answer.response.history)


def describe_failure(error: BaseException) -> str:
    """Why a read from the Hub is tried again."""
    return describe_refusal(error) if is_refusal(error) else f"the Hub does not answer ({describe_error(error)})"


def describe_refusal(error: BaseException) -> str:
    """'cdn.hf.co answered 403 Forbidden to https://hf.co/datasets/.../file' without the signature of its address."""
    answer = http_error(error)
    if answer is None:
        return f"the Hub did not find it ({error})"
    response = answer.response
    asked = response.history[0].url if response.history else response.url  # redirects go to a signed address
    return without_signatures(
        f"{response.url.host} answered {response.status_code} {response.reason_phrase} to {asked}"
    )
