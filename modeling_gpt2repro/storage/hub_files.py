"""Files on the Hub, read by byte range, and patience with a Hub that is busy or gone for a while."""

import time
from collections.abc import Callable
from typing import BinaryIO, TypeVar

from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HTTPError  # httpx's: what no answer raises, and the base of the Hub's own errors

Result = TypeVar("Result")

# The Hub's client repeats a request for 23 seconds by itself; together that is some 5 minutes.
RETRIES = 7


def is_on_hub(path: str) -> bool:
    """Whether a path is an address such as hf://datasets/namespace/name@revision/file."""
    return path.startswith("hf://")


def open_hub_file(path: str) -> BinaryIO:
    """Open an `hf://` address; only the ranges that are asked for are downloaded."""
    # A cache that reads ahead would double the download: parquet readers know what they need.
    return HfFileSystem().open(path, "rb", cache_type="none")


def retrying(work: Callable[[], Result], retries: int = RETRIES, wait_seconds: float = 1.0) -> Result:
    """Call `work`; where the Hub is busy or out of reach, wait, twice as long each time, and try again.

    Raises:
        ConnectionError: If it did not come back.
    """
    for attempt in range(retries + 1):
        try:
            return work()
        except HTTPError as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status is not None and status not in (408, 429) and status < 500:
                raise  # a refusal, and the next answer would be the same
            if attempt == retries:
                raise ConnectionError(
                    f"the Hub did not answer in {retries + 1} attempts ({type(error).__name__}): try again later."
                ) from error
        time.sleep(wait_seconds * 2**attempt)
    raise AssertionError("the last attempt returns or raises")
