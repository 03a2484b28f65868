"""Prepared shards on the Hub: a dataset repository is downloaded into the Hub's cache, and every shard is checked."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub.utils.sha import git_hash

from modeling_gpt2repro.runtime.progress import SteadyBar
from modeling_gpt2repro.storage.checksums import sha256_of
from modeling_gpt2repro.storage.hub_files import dataset_commit, retry_hub_read
from modeling_gpt2repro.storage.retry import describe_error, without_signatures

from .dataset import MANIFEST, MAX_MANIFEST_BYTES, SPLITS, read_manifest
from .nanogpt_format import NANOGPT_NAME
from .verify import content_problems

# hf://owner/name, hf://owner/name@revision; as elsewhere on the Hub, datasets/ may stand before the name. A revision
# becomes a path in the cache; git, too, allows no ".." in one.
ADDRESS = re.compile(r"hf://(?:datasets/)?([\w-][\w.-]*/[\w-][\w.-]*)(?:@(?!\S*\.\.)([\w-][\w.+/-]*?))?/?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
DOWNLOADS = 4  # files at a time
TRIES = 3  # of a shard that arrives damaged
CHECKED = "checked"  # folder beside the cache's blobs, with an empty file for each blob that was found intact
MARGIN_BYTES = 2**30  # of the disk, left free

Check = Callable[[Path], str | None]  # what is wrong with a file; None if nothing is


def parse_address(address: str) -> tuple[str, str | None]:
    """'hf://owner/name@main' -> ('owner/name', 'main').

    Raises:
        ValueError: If it is not of this form.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"{address} is not of the form hf://OWNER/NAME or hf://OWNER/NAME@REVISION.")
    return match[1], match[2]


def pin_address(address: str) -> str:
    """Name the commit: 'hf://owner/name' -> 'hf://owner/name@5f0c...'; offline, that of the last download.

    Raises:
        ValueError: If there is no such dataset or revision, or the Hub cannot be reached.
    """
    name, revision = parse_address(address)
    if revision is not None and COMMIT.fullmatch(revision):
        return address
    if constants.is_offline_mode():
        return f"hf://{name}@{cached_folder(address).name}"
    try:
        commit = dataset_commit(name, revision)
    except ConnectionError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the Hub cannot be reached for {address} ({reason}): try again where it can.") from error
    except (OSError, ValueError, HTTPError) as error:
        reason = without_signatures(" ".join(str(error).split()))
        raise ValueError(f"{address} cannot be opened: {reason}") from error
    # Where the client looks for it when it is offline.
    reference = cache_folder(name) / "refs" / (revision or constants.DEFAULT_REVISION)
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    return f"hf://{name}@{commit}"


def cache_folder(name: str) -> Path:
    """The folder of a dataset in the Hub's cache: blobs/, refs/, snapshots/, and our `CHECKED`."""
    return Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset"))


def cached_folder(address: str) -> Path:
    """Where an earlier download of this revision is.

    Raises:
        ValueError: If there was none.
    """
    name, revision = parse_address(address)
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{address} is not in the Hub's cache, and HF_HUB_OFFLINE is set: download it where there is a network."
        ) from error


def download_shards(address: str) -> Path:
    """Download what is missing of a repository of shards, check it, and return its folder in the Hub's cache.

    Only the manifest, the shards that it names and the tokenizer are taken: whatever else there is, such as code, stays
    where it is. A shard that was found intact once is not read again, so an interrupted download continues with the
    next file.

    Raises:
        ValueError: If the address is wrong, the repository holds no shards or other ones than its manifest says, the
            Hub cannot be reached, or the disk is too small.
        KeyboardInterrupt: With a sentence, after Ctrl-C.
    """
    if constants.is_offline_mode():
        return cached_folder(address)
    address = pin_address(address)
    name, commit = parse_address(address)
    checked = cache_folder(name) / CHECKED
    if (checked / commit).exists():  # all of it
        return cached_folder(address)
    try:
        files = retry_hub_read(lambda: list_files(name, commit))
        repository = Repository(name, commit, files, checked)
        folder = repository.folder()
        repository.fetch_all(repository.contents(folder))
    except (OSError, ValueError, HTTPError) as error:
        raise ValueError(f"{address} cannot be downloaded: {describe_error(error)}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"the download of {address} was interrupted: the same command continues it; files that are whole are kept."
        ) from None
    mark(checked / commit)
    return folder


def list_files(name: str, commit: str) -> dict[str, RepoFile]:
    """Path -> size and hash of every file in the repository."""
    tree = HfApi().list_repo_tree(name, recursive=True, revision=commit, repo_type="dataset")
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def mark(path: Path):
    """Create an empty file, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@dataclass(frozen=True)
class Repository:
    """A dataset repository at one commit."""

    name: str
    commit: str
    files: dict[str, RepoFile]
    checked: Path

    def folder(self) -> Path:
        """The folder of the cache, with the manifest, if there is one.

        Raises:
            ValueError: If there are no shards.
        """
        if MANIFEST in self.files:
            if self.files[MANIFEST].size > MAX_MANIFEST_BYTES:
                raise ValueError(f"its {MANIFEST} has more than {MAX_MANIFEST_BYTES:,} bytes.")
            self.fetch_intact(MANIFEST, partial(self.check_hash, MANIFEST))
            return self.fetch(MANIFEST).parent
        others = [file for file in self.files if NANOGPT_NAME.fullmatch(file)]
        if not others:
            raise ValueError(f"it has neither {MANIFEST} nor shards of build-nanogpt or llm.c.")
        return self.fetch(others[0]).parent

    def contents(self, folder: Path) -> dict[str, Check]:
        """The files to download, each with the check of its content: what is wrong with it, or None."""
        if MANIFEST not in self.files:
            return {file: partial(self.check_hash, file) for file in self.files if NANOGPT_NAME.fullmatch(file)}
        manifest = read_manifest(folder)
        entries = {entry["file"]: entry for split in SPLITS for entry in manifest["splits"][split]["shards"]}
        tokenizer = {f"tokenizer/{file}" for file in TOKENIZER_FILES} & self.files.keys()
        return {file: partial(self.check_hash, file) for file in tokenizer} | {
            file: lambda path, entry=entry: next(content_problems(path.parent, manifest, [entry]), None)
            for file, entry in entries.items()
        }

    def check_hash(self, file: str, path: Path) -> str | None:
        """What is wrong with a file that no manifest describes."""
        found = git_hash(path.read_bytes()) if self.files[file].lfs is None else sha256_of(path)
        return None if found == self.blob(file) else f"{path} arrived damaged."

    def fetch_all(self, checks: dict[str, Check]):
        """Download and check what is missing, several files at a time.

        Raises:
            ValueError: If one is not in the repository or stays damaged, or the disk has too little room.
        """
        if missing := sorted(checks.keys() - self.files.keys()):
            raise ValueError(f"it lacks {missing[0]}, which its {MANIFEST} names: it was not pushed completely.")
        blobs = self.checked.parent / "blobs"
        needed = sum(self.files[file].size for file in checks if not (blobs / self.blob(file)).exists())
        free = shutil.disk_usage(self.checked.parent).free
        if needed + MARGIN_BYTES > free:
            raise ValueError(
                f"{needed / 1e9:,.1f} GB are to be downloaded, and {self.checked.parent} has {free / 1e9:,.1f} GB "
                "free: make room, or set HF_HUB_CACHE to a larger disk."
            )
        self.delete_partial_files()
        total = sum(self.files[file].size for file in checks)
        bar = SteadyBar(total=total, desc="downloading", unit="B", unit_scale=True, dynamic_ncols=True, file=sys.stderr)
        # Of daemon threads: a program that Ctrl-C ends does not wait for what they are downloading.
        with bar, without_bars_of_the_client(), ThreadPool(DOWNLOADS) as pool:
            for size in pool.imap_unordered(lambda file: self.fetch_intact(file, checks[file]), checks):
                bar.update(size)

    def delete_partial_files(self):
        """Delete what killed downloads have left: the client begins a file anew, under a name that no other has."""
        locks = Path(constants.HF_HUB_CACHE, ".locks", self.checked.parent.name)
        for path in (self.checked.parent / "blobs").glob("*.*.incomplete"):
            with suppress(Timeout, OSError), FileLock(locks / f"{path.name.split('.')[0]}.lock", timeout=0):
                path.unlink()  # nobody is downloading it, or the client would hold this lock

    def fetch_intact(self, file: str, check: Check) -> int:
        """Download a file, again if it arrives damaged, and return its size; one of an earlier commit is only linked.

        Raises:
            ValueError: If it stays damaged.
        """
        for attempt in range(TRIES):
            path = self.fetch(file, again=attempt > 0)
            problem = None if (self.checked / self.blob(file)).exists() else check(path)
            if problem is None:
                mark(self.checked / self.blob(file))
                return self.files[file].size
        raise ValueError(f"{problem} It was downloaded {TRIES} times.")

    def fetch(self, file: str, again: bool = False) -> Path:
        """The file in the cache, downloaded unless it is there; a Hub that is away is asked again for minutes.

        `again` replaces the one that is there, in one step: another program may be reading it.
        """
        return retry_hub_read(lambda: download(self.name, file, self.commit, again), is_known=True)

    def blob(self, file: str) -> str:
        """The hash under which the cache keeps a file."""
        entry = self.files[file]
        return entry.blob_id if entry.lfs is None else entry.lfs.sha256


def download(name: str, file: str, commit: str, again: bool = False) -> Path:
    """As `hf_hub_download`, with the error that lies behind its 'cannot be located'; one that may pass is HTTPError."""
    try:
        return Path(hf_hub_download(name, file, repo_type="dataset", revision=commit, force_download=again))
    except LocalEntryNotFoundError as error:
        if error.__cause__ is None:
            raise
        cause = error.__cause__
    except OSError as error:
        if type(error) is not OSError or error.errno is not None:
            raise
        cause = HTTPError(str(error).splitlines()[0])  # of the client's own: what arrived has another size
    raise cause


@contextmanager
def without_bars_of_the_client() -> Iterator[None]:
    """The Hub's client shows a bar for each file."""
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
