"""Reading files on the Hub by byte range, with retries while the Hub is busy or unreachable."""

from collections.abc import Callable
from typing import BinaryIO, TypeVar

from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HTTPError

from .retry import describe_error, is_transient, retry

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


def retry_hub_read(work: Callable[[], Result], patience_seconds: float | None = None) -> Result:
    """Call `work`, and call it again while the Hub is busy or unreachable; READ_PATIENCE_SECONDS by default.

    Raises:
        ConnectionError: If it still is when the patience is over.
    """
    patience = READ_PATIENCE_SECONDS if patience_seconds is None else patience_seconds
    try:
        return retry(work, patience, errors=(HTTPError,))
    except HTTPError as error:
        if not is_transient(error):
            raise  # a refusal: the next answer would be the same
        raise ConnectionError(
            f"the Hub did not answer for {patience:.0f} s ({describe_error(error)}): try again later."
        ) from error
