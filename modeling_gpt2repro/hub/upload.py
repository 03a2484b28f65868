"""Push a model folder to the Hub in one commit, verify what arrived, and retry while the Hub is unreachable.

    python -m modeling_gpt2repro.hub.push runs/gpt2-124m/model --hub_model_id owner/name
    python -m modeling_gpt2repro.hub.push --check --hub_model_id owner/name

An interrupted push continues when the same command is run again: files that have arrived are not sent twice. The second
command only finds out whether the first one would work. A training run pushes with this command, too, in a separate
process (see background_upload.py).
"""

import argparse
import os
import sys
import uuid
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, get_session, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HTTPError

from modeling_gpt2repro.runtime.progress import count_down
from modeling_gpt2repro.storage.lock import LOCK_FILE
from modeling_gpt2repro.storage.retry import XET_TOKEN_REFUSED, describe_error, http_status, is_transient, retry

EXIT_CODE_REFUSED = 2  # trying again is no use before somebody changes something
EXIT_CODE_HUB_UNREACHABLE = 3  # the same command may succeed later
TRAINING_STATE = "training_state/*"
# Deleted in the commit that pushes new weights, because an earlier model may have had another number of files. Precise
# names: in the Hub's patterns * matches / as well, and subfolders may hold weights that people have added themselves.
REPLACED = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", TRAINING_STATE]
# Downloading creates the folders, which the client skips anyway; the check after a push must skip them, too.
NEVER_PUSHED = [".git/*", ".cache/*", LOCK_FILE]
CHECK_BRANCH = "write-check"
RESPONSE_TIMEOUT_SECONDS = 120.0  # without one, the client waits forever for a Hub that accepts but never answers
DEFAULT_HUB_WAIT_SECONDS = 300.0
# By itself, Xet's client repeats a request five times, which takes five minutes or more and shows nothing. Twice takes
# some 15 seconds, and then the push is retried as a whole, with a message.
XET_RETRIES = {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2"}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m modeling_gpt2repro.hub.push",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", help="A model folder: model/ or step-... of a run.")
    parser.add_argument("--hub_model_id", required=True, help="owner/name, or a name alone for one of your own.")
    parser.add_argument("--branch", default="main", help="Created from main if it does not exist.")
    parser.add_argument("--message", help="Commit message.")
    parser.add_argument("--private", action=argparse.BooleanOptionalAction, help="If the repository must be created.")
    parser.add_argument("--with_training_state", action="store_true", help="Push a checkpoint that can be resumed.")
    parser.add_argument("--check", action="store_true", help="Push nothing, only find out whether pushing would work.")
    parser.add_argument(
        "--hub_wait_seconds",
        type=float,
        default=DEFAULT_HUB_WAIT_SECONDS,
        help="How long to retry while the Hub is away (default: %(default)g).",
    )
    older_name = {"dest": "hub_wait_seconds", "type": float, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
    parser.add_argument("--patience_seconds", **older_name)
    args = parser.parse_args(argv)
    if (args.folder is None) != args.check:
        parser.error("give either a folder or --check")
    if not args.hub_wait_seconds >= 0:  # not a number either
        parser.error(f"--hub_wait_seconds ({args.hub_wait_seconds}) must be at least 0")

    def attempt() -> str:
        if args.check:
            return f"can be written: {check_write_access(args.hub_model_id, args.private)}"
        address = push_folder(
            args.folder,
            args.hub_model_id,
            branch=args.branch,
            message=args.message,
            private=args.private,
            with_training_state=args.with_training_state,
        )
        return f"pushed to {address}"

    try:
        # Flushed, because the process that started this one may follow its log file.
        show = partial(print, file=sys.stderr, flush=True)
        print(retry(attempt, args.hub_wait_seconds, on_retry=show, sleep=count_down))
    except (HTTPError, OSError, RuntimeError) as error:
        if is_transient(error):
            message = f"the Hub cannot be reached ({describe_error(error)}): try again later."
            parser.exit(EXIT_CODE_HUB_UNREACHABLE, message + "\n")
        parser.exit(EXIT_CODE_REFUSED, explain_hub_error(error, args.hub_model_id) + "\n")
    except ValueError as error:
        parser.exit(EXIT_CODE_REFUSED, " ".join(str(error).split()) + "\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{args.folder} was not pushed: run the same command again to continue.\n")


def push_folder(
    folder: Path,
    repository: str,
    branch: str = "main",
    message: str | None = None,
    private: bool | None = None,
    with_training_state: bool = False,
    api: HfApi | None = None,
) -> str:
    """Push a model folder in one commit; the repository and the branch are created if they do not exist.

    Args:
        repository: 'owner/name', or a name alone for a repository of the token's owner.
        private: Visibility of a new repository; None takes the default of its owner's settings.
        with_training_state: Push `training_state/`, too, which resuming needs.

    Returns:
        The address of the branch, and the commit.

    Raises:
        ValueError: If the push cannot work, however often it is tried.
        HTTPError, OSError, RuntimeError: From the client, or if what arrived differs from the folder; see
            `is_transient`.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder (it has no config.json): give model/ or step-... of a run.")
    api = api or connect()
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if branch != "main":
        api.create_branch(repository, branch=branch, exist_ok=True)
    ignored = NEVER_PUSHED if with_training_state else [*NEVER_PUSHED, TRAINING_STATE]
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        revision=branch,
        commit_message=message or f"Push {folder.name}",
        ignore_patterns=list(ignored),  # a copy, because the client appends to it
        delete_patterns=REPLACED if any(folder.glob("*.safetensors")) else None,
    )
    found = api.verify_repo_checksums(repository, revision=branch, local_dir=folder)
    different = [mismatch["path"] for mismatch in found.mismatches]
    missing = [path for path in found.extra_paths if not any(fnmatchcase(path, pattern) for pattern in ignored)]
    if different or missing:
        raise RuntimeError(f"files on the Hub differ from those in {folder}: {', '.join(different + missing)}")
    address = f"{api.endpoint}/{repository}"
    if branch != "main":
        address += f"/tree/{branch}"
    return f"{address} (commit {commit.oid[:7]})"


def check_write_access(repository: str, private: bool | None = None, api: HfApi | None = None) -> str:
    """Find out whether this token may push, by a commit to a branch that is then deleted.

    Nothing less proves it: creating a repository that exists "succeeds" with a read-only token, too.

    Returns:
        The repository's address; it is created if it does not exist.

    Raises:
        ValueError, HTTPError, OSError, RuntimeError: As `push_folder`.
    """
    api = api or connect()
    repository = api.create_repo(repository, private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repository).private:
        raise ValueError(
            f"{repository} exists and is public: make it private in its settings, or give another --hub_model_id."
        )
    api.create_branch(repository, branch=CHECK_BRANCH, exist_ok=True)
    try:
        api.upload_file(
            path_or_fileobj=uuid.uuid4().hex.encode(),  # new content, or the Hub would have nothing to commit
            path_in_repo="check.safetensors",  # takes the way of weights, to the storage behind the Hub
            repo_id=repository,
            revision=CHECK_BRANCH,
        )
    finally:
        api.delete_branch(repository, branch=CHECK_BRANCH)
    return f"{api.endpoint}/{repository}"


def connect(endpoint: str | None = None, timeout_seconds: float = RESPONSE_TIMEOUT_SECONDS) -> HfApi:
    """Create a Hub client that gives up on a request without an answer.

    Raises:
        ValueError: If this machine is set to offline mode or has no token.
    """
    if is_offline_mode():
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or do not push.")
    if get_token() is None:
        raise ValueError("there is no token to push with: log in with `hf auth login`, or set HF_TOKEN.")
    get_session().timeout = timeout_seconds
    for name, value in XET_RETRIES.items():  # read when the first upload begins
        os.environ.setdefault(name, value)
    return HfApi(endpoint=endpoint)


def explain_hub_error(error: BaseException, repository: str) -> str:
    """Say what has to change, on the Hub or on this machine, before a push can succeed."""
    status = http_status(error)
    if status is None:
        return f"a problem on this machine prevents pushing ({describe_error(error)})."
    if status == 404 and XET_TOKEN_REFUSED.search(str(error)):
        return "this Hub does not know Xet, which its client uploads by: set HF_HUB_DISABLE_XET=1."
    if status == 401:
        return "the Hub does not accept this token: log in again with `hf auth login`, or set HF_TOKEN."
    if status in (403, 404):
        return (
            f"this token may not write to {repository} ({describe_error(error)}): use a token with the role 'write', "
            "or another --hub_model_id."
        )
    return f"the Hub refuses {repository} ({describe_error(error)})."


if __name__ == "__main__":
    main()
