"""Reading files on the Hub by byte range, with retries while the Hub is busy or unreachable."""

import time
from collections.abc import Callable
from typing import BinaryIO, TypeVar

from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HTTPError

from .retry import backoff_seconds, describe_error, http_error, is_refusal, is_transient

Result = TypeVar("Result")

# Enough for 8 attempts: the Hub's client spends 23 seconds on each, and there are 127 seconds of pauses between them.
READ_PATIENCE_SECONDS = 311.0


def is_on_hub(path: str) -> bool:
    """Whether a path is an address such as hf://datasets/namespace/name@revision/file."""
    return path.startswith("hf://")


def open_hub_file(path: str) -> BinaryIO:
    """Open an `hf://` address; only the byte ranges that are read are downloaded."""
    # A cache that reads ahead would double the download: parquet readers know which ranges they need.
    return HfFileSystem().open(path, "rb", cache_type="none")


def retry_hub_read(work: Callable[[], Result], is_known: bool = False) -> Result:
    """Call `work`, and call it again while the Hub is busy or unreachable, for READ_PATIENCE_SECONDS.

    Args:
        is_known: What `work` opens has been opened before. Then a refusal (401, 403, 404) is no wrong name, but may be
            a signature that has expired or a firewall, and is tried again, too: `work` must open the file anew, which
            asks the Hub for its present address.

    Raises:
        ConnectionError: If it still is when the patience is over.
    """
    deadline = time.monotonic() + READ_PATIENCE_SECONDS
    for pause in backoff_seconds():
        try:
            return work()
        except (HTTPError, FileNotFoundError) as error:
            refused = is_refusal(error)
            if refused:
                HfFileSystem.clear_instance_cache()  # which remembers that something does not exist
            may_pass = is_known if refused else is_transient(error)
            if not may_pass:
                raise
            if time.monotonic() + pause > deadline:
                seconds = f"{READ_PATIENCE_SECONDS:.0f} s"
                if refused:
                    message = f"{describe_refusal(error)} for {seconds}, however often it was asked."
                else:
                    message = f"the Hub did not answer for {seconds} ({describe_error(error)}): try again later."
                raise ConnectionError(message) from error
        time.sleep(pause)


def describe_refusal(error: BaseException) -> str:
    """'cdn.hf.co answered 403 Forbidden to https://hf.co/datasets/.../file' without the signature of its address."""
    answer = http_error(error)
    if answer is None:
        return f"the Hub did not find it ({error})"
    response = answer.response
    asked = response.history[0].url if response.history else response.url  # redirects go to a signed address
    return f"{response.url.host} answered {response.status_code} {response.reason_phrase} to {asked}"
