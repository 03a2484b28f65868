"""The official validation rows: which data are they, and their original file, fetched once, checked and cached."""

import http.client
import logging
import os
import shutil
from pathlib import Path
from urllib.request import urlopen

from huggingface_hub import cached_assets_path, constants
from huggingface_hub.utils import WeakFileLock

from modeling_gpt2repro.storage.atomic import atomic_write
from modeling_gpt2repro.storage.checksums import sha256_of

HUB_DATASET = "Rowan/hellaswag"
OFFICIAL = "official"  # as a source: the file of the original repository
OFFICIAL_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
OFFICIAL_ROWS = 10_042  # the validation split, which every published number is of
# Published checksum of hellaswag_val.jsonl, 12,246,618 bytes.
OFFICIAL_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
SECONDS_WITHOUT_A_BYTE = 30

logger = logging.getLogger(__name__)


def hellaswag_sha256(source: str) -> str | None:
    """Checksum of the file that a source is; None for a dataset on the Hub."""
    if source == OFFICIAL:
        return OFFICIAL_SHA256
    return sha256_of(source) if os.path.isfile(source) else None


def are_official(source: str, num_rows: int) -> bool:
    """Whether so many rows of a source are those that the published numbers are of: all, and no others."""
    sha256 = hellaswag_sha256(source)
    return num_rows == OFFICIAL_ROWS and (sha256 == OFFICIAL_SHA256 or (sha256 is None and source == HUB_DATASET))


def official_file() -> Path:
    """The validation file in the cache: without network where a good one is there, else fetched and checked.

    Processes that want it at the same time wait for the first of them.

    Raises:
        ConnectionError: It is not in the cache and could not be fetched.
        ValueError: What came is another file, such as an error page; nothing of it is kept.
    """
    path = cached_assets_path("gpt2repro", "hellaswag") / "hellaswag_val.jsonl"
    with WeakFileLock(f"{path}.lock"):
        if path.exists() and sha256_of(path) != OFFICIAL_SHA256:
            logger.warning("%s is damaged (%s): it is removed and fetched again.", path, description_of(path))
            path.unlink()
        if not path.exists():
            fetch(OFFICIAL_URL, path)
    return path


def fetch(url: str, path: Path):
    """Download the validation file to `path`, which is there whole and checked or not at all; raises as above."""
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"{url} is not in the cache and HF_HUB_OFFLINE is set: unset it, or name a local file.")
    try:
        with atomic_write(path) as file:
            with urlopen(url, timeout=SECONDS_WITHOUT_A_BYTE) as response:
                shutil.copyfileobj(response, file)
            file.flush()
            aside = Path(file.name)
            if sha256_of(aside) != OFFICIAL_SHA256:
                raise ValueError(
                    f"{url} did not give HellaSwag's validation file but {description_of(aside)}; it is removed: try "
                    "again, and look whether a proxy or a login page answers in its place."
                )
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(
            f"{url} could not be fetched into {path.parent} ({error}): check the connection and the disk, or name a "
            "local hellaswag_val.jsonl in its place."
        ) from error


def description_of(path: Path) -> str:
    """'15 bytes that begin with b'<!DOCTYPE html>', sha256 3ad1...'."""
    with open(path, "rb") as file:
        beginning = file.read(15)
    return f"{os.path.getsize(path):,} bytes that begin with {beginning!r}, sha256 {sha256_of(path)[:12]}..."
