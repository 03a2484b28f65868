"""The official validation split: recognized by its checksum; its original file is downloaded once and cached."""

import http.client
import logging
import os
import shutil
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

from huggingface_hub import cached_assets_path, constants
from huggingface_hub.utils import WeakFileLock

from modeling_gpt2repro.storage.atomic import atomic_write
from modeling_gpt2repro.storage.checksums import sha256_of

HUB_DATASET = "Rowan/hellaswag"
OFFICIAL = "official"  # as a source: the file of the original repository
OFFICIAL_URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
OFFICIAL_EXAMPLES = 10_042  # of the validation split, on which all published numbers are measured
# Published checksum of hellaswag_val.jsonl, 12,246,618 bytes.
OFFICIAL_SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
DOWNLOAD_TIMEOUT_SECONDS = 30  # without receiving a byte
# Forbidden, not found, gone, unavailable for legal reasons. GitHub blocked the repository after a copyright notice:
# https://github.com/github/dmca/blob/master/2026/09/2026-09-14-wikihow.md
GONE_STATUS = {403, 404, 410, 451}

logger = logging.getLogger(__name__)


def hellaswag_sha256(source: str) -> str | None:
    """Checksum of a source that is a file; None for a dataset on the Hub."""
    if source == OFFICIAL:
        return OFFICIAL_SHA256
    return sha256_of(source) if os.path.isfile(source) else None


def is_official_split(source: str, num_examples: int) -> bool:
    """Whether `num_examples` of a source are exactly those of the published numbers: all, and no others."""
    sha256 = hellaswag_sha256(source)
    return num_examples == OFFICIAL_EXAMPLES and (
        sha256 == OFFICIAL_SHA256 or (sha256 is None and source == HUB_DATASET)
    )


def official_file() -> Path:
    """The cached validation file, downloaded and verified if there is none or it is damaged.

    Processes that need it at the same time wait for the first of them.

    Raises:
        ConnectionError: It is not in the cache and could not be downloaded; the message says whether trying again can
            help.
        ValueError: The download is another file, such as an error page; it is deleted.
    """
    path = cached_assets_path("gpt2repro", "hellaswag") / "hellaswag_val.jsonl"
    with WeakFileLock(f"{path}.lock"):
        if path.exists() and sha256_of(path) != OFFICIAL_SHA256:
            logger.warning("%s is damaged (%s): it is deleted and downloaded again.", path, describe_file(path))
            path.unlink()
        if not path.exists():
            download(OFFICIAL_URL, path)
    return path


def download(url: str, path: Path):
    """Download the validation file to `path`, atomically and verified; raises as `official_file`."""
    if constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"{url} is not in the cache and HF_HUB_OFFLINE is set: unset it, or name a local file.")
    try:
        with atomic_write(path) as file:
            with urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as response:
                shutil.copyfileobj(response, file)
            file.flush()
            temporary = Path(file.name)
            if sha256_of(temporary) != OFFICIAL_SHA256:
                raise ValueError(
                    f"{url} did not give HellaSwag's validation file but {describe_file(temporary)}; it is deleted: "
                    "try again, and check whether a proxy or a login page answers in its place."
                )
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, HTTPError) and error.code in GONE_STATUS:
            raise ConnectionError(
                f"{url} is no longer available (it answers {error.code}; GitHub blocked the original repository in "
                f"September 2026), and trying again will not help: instead of {OFFICIAL}, give {HUB_DATASET}, the same "
                "examples on the Hub, or the path of a copy of hellaswag_val.jsonl."
            ) from error
        raise ConnectionError(
            f"{url} could not be downloaded into {path.parent} ({error}): check the connection and the disk, or name a "
            "local hellaswag_val.jsonl instead."
        ) from error


def describe_file(path: Path) -> str:
    """'15 bytes that begin with b'<!DOCTYPE html>', sha256 3ad1...'."""
    with open(path, "rb") as file:
        beginning = file.read(15)
    return f"{os.path.getsize(path):,} bytes that begin with {beginning!r}, sha256 {sha256_of(path)[:12]}..."
