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
import threading
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError

from modeling_gpt2repro.runtime.command_line import as_typed, console_script

from .client import (
    DEFAULT_HUB_WAIT_SECONDS,
    EXIT_CODE_HUB_UNREACHABLE,
    EXIT_CODE_REFUSED,
    HUB_ERRORS,
    FilesDiffer,
    Patience,
    ask_storage,
    connect,
    diagnose_hub_error,
)
from .pushed_files import NEVER_PUSHED, TRAINING_STATE, files_to_push, ignored_by_repository, matches_any, refuse_links

# Deleted in the commit that pushes new weights, because an earlier model may have had another number of files. Precise
# names: in the Hub's patterns * matches / as well, and subfolders may hold weights that people have added themselves.
REPLACED = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", TRAINING_STATE]
CHECK_BRANCH_PREFIX = "write-check-"
END_WITH_STDIN = "GPT2REPRO_END_WITH_STDIN"  # set by a training for the pushes that it starts
CHECK_FILE = "check.safetensors"  # takes the way of weights, to the storage behind the Hub


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog=console_script() or "python -m modeling_gpt2repro.hub.push",
        description=as_typed(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, nargs="?", help="A model folder: model/ or step-... of a run.")
    parser.add_argument("--hub_model_id", required=True, help="owner/name, or a name alone for one of your own.")
    parser.add_argument("--branch", default="main", help="Created from main if it does not exist.")
    parser.add_argument("--message", help="Commit message.")
    parser.add_argument(
        "--private", action=argparse.BooleanOptionalAction, help="Of a new repository; one that is public is refused."
    )
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
            return f"can be written: {check_write_access(api, args.hub_model_id, args.private)}"
        address = push_folder(
            api,
            args.folder,
            args.hub_model_id,
            branch=args.branch,
            message=args.message,
            private=args.private,
            with_training_state=args.with_training_state,
        )
        return f"pushed to {address}"

    diagnose = partial(diagnose_hub_error, repository=args.hub_model_id)
    patience = Patience(args.hub_wait_seconds)
    try:
        api = connect(patience)
        # Flushed, because the process that started this one may follow its log file.
        show = partial(print, file=sys.stderr, flush=True)
        print(patience.retry(attempt, diagnose, show))
    except HUB_ERRORS as error:
        message, exit_code, _ = diagnose(error)
        advice = ": try again later" if exit_code == EXIT_CODE_HUB_UNREACHABLE else ""
        parser.exit(exit_code, f"{message}{advice}.\n")
    except ValueError as error:
        parser.exit(EXIT_CODE_REFUSED, " ".join(str(error).split()) + "\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{args.folder or 'The check'} was interrupted: run the same command again to continue.\n")


def push_folder(
    api: HfApi,
    folder: Path,
    repository: str,
    branch: str = "main",
    message: str | None = None,
    private: bool | None = None,
    with_training_state: bool = False,
) -> str:
    """Push a model folder in one commit; the repository and the branch are created if they do not exist.

    Args:
        repository: 'owner/name', or a name alone for a repository of the token's owner.
        private: Visibility of a new repository; None takes the default of its owner's settings.
        with_training_state: Push `training_state/`, too, which resuming needs.

    Returns:
        The address of the branch, the commit, and what is not as the caller may expect.

    Raises:
        ValueError: If the push cannot work, however often it is tried.
        FilesDiffer: If what arrived differs from the folder.
        HUB_ERRORS: From the client; see `diagnose_hub_error`.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder (it has no config.json): give model/ or step-... of a run.")
    excluded = NEVER_PUSHED if with_training_state else [*NEVER_PUSHED, TRAINING_STATE]
    refuse_links(folder, excluded)
    repository, notes = open_repository(api, repository, private)
    if branch != "main":
        api.create_branch(repository, branch=branch, exist_ok=True)
    names = files_to_push(folder, excluded)
    rules = (folder / ".gitignore").read_text(encoding="utf-8") if ".gitignore" in names else None
    left_out = ignored_by_repository(api, repository, branch, names, rules)
    ask_storage(api, repository, branch)
    operations = [CommitOperationAdd(name, folder / name) for name in names if name not in left_out]
    if any(folder.glob("*.safetensors")):
        there = api.list_repo_files(repository, revision=branch)
        operations += [
            CommitOperationDelete(name) for name in there if matches_any(name, REPLACED) and name not in names
        ]
    # Not upload_folder, which makes several commits of some hundred files.
    message = message or f"Push {folder.name}"
    commit = api.create_commit(repository, operations, commit_message=message, revision=branch)
    # Compared at the commit, not on the branch: someone else may have pushed to it since.
    found = api.verify_repo_checksums(repository, revision=commit.oid, local_dir=folder)
    different = {mismatch["path"] for mismatch in found.mismatches} | set(found.extra_paths)
    if different := sorted(different & set(names) - set(left_out)):
        raise FilesDiffer(f"files in {repository} differ from those in {folder}: {', '.join(different)}")
    address = f"{api.endpoint}/{repository}"
    if branch != "main":
        address += f"/tree/{branch}"
    if left_out:
        notes.append(f"left out, because .gitignore in the repository names them: {', '.join(left_out)}")
    return "; ".join([f"{address} (commit {commit.oid[:7]})", *notes])


def check_write_access(api: HfApi, repository: str, private: bool | None = None, repo_type: str = "model") -> str:
    """Find out whether this token may push, by a commit to a branch of its own that is then deleted.

    Nothing less proves it: creating a repository that exists "succeeds" with a read-only token, too. The branch has a
    new name each time, because several runs may check the same repository at once.

    Returns:
        The repository's address, and what is not as the caller may expect. It is created if it does not exist.

    Raises:
        ValueError, HUB_ERRORS: As `push_folder`.
    """
    repository, notes = open_repository(api, repository, private, repo_type)
    branch = CHECK_BRANCH_PREFIX + uuid.uuid4().hex
    content = uuid.uuid4().hex.encode()  # new content, or the Hub would have nothing to commit
    try:
        api.create_branch(repository, branch=branch, repo_type=repo_type)
        names = ["config.json", "model.safetensors", "tokenizer.json", "modeling_gpt2repro.py", CHECK_FILE]
        ignored_by_repository(api, repository, branch, names, repo_type=repo_type)
        ask_storage(api, repository, branch, repo_type)
        api.upload_file(
            path_or_fileobj=content, path_in_repo=CHECK_FILE, repo_id=repository, revision=branch, repo_type=repo_type
        )
    except BaseException:  # also Ctrl-C
        with suppress(HTTPError, OSError):  # the first error is the one to report
            api.delete_branch(repository, branch=branch, repo_type=repo_type)
        raise
    try:
        api.delete_branch(repository, branch=branch, repo_type=repo_type)
    except (HTTPError, OSError):  # the right to push is proven all the same
        notes.append(f"the check's branch {branch} could not be deleted: delete it yourself")
    return "; ".join([f"{api.endpoint}/{repository}", *notes])


def open_repository(
    api: HfApi, repository: str, private: bool | None, repo_type: str = "model"
) -> tuple[str, list[str]]:
    """Create a repository unless it exists, and refuse a public one where a private one is asked for.

    Returns:
        'owner/name', and a note if it is private although a public one is asked for.
    """
    repository = api.create_repo(repository, private=private, exist_ok=True, repo_type=repo_type).repo_id
    # Looked up even if it is new: its owner's settings may overrule the request.
    if private is None or private == (is_private := api.repo_info(repository, repo_type=repo_type).private):
        return repository, []
    if not is_private:
        raise ValueError(f"{repository} exists and is public: make it private in its settings, or give another name.")
    return repository, ["the repository is private and stays private"]


def end_with_stdin():
    """End this process with its standard input: a pipe whose other end is the training's, and ends with it.

    However a training ends, also by `kill -9`, the system closes its files: so no push outlives it. This works on all
    systems. The Hub applies a commit completely or not at all.
    """

    def wait():
        while os.read(0, 1):  # not sys.stdin, whose lock the interpreter needs when it exits
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    if os.environ.get(END_WITH_STDIN):
        end_with_stdin()
    main()
