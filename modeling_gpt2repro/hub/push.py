"""Push a model, or a run with its report, to the Hub in one commit, verify what arrived, and retry while it is away.

    python -m modeling_gpt2repro.hub.push runs/gpt2-124m --hub_model_id owner/name
    python -m modeling_gpt2repro.hub.push runs/gpt2-124m --hub_model_id owner/name --dry_run
    python -m modeling_gpt2repro.hub.push runs/gpt2-124m/model --hub_model_id owner/name
    python -m modeling_gpt2repro.hub.push --check --hub_model_id owner/name

The first pushes what a run has to show: its final model (or its last checkpoint's), the loss curve, a report, samples
and the certificate. The second lists the files and sends nothing. The third pushes the model's folder alone. The fourth
only finds out whether pushing would work.

An interrupted push continues when the same command is run again: files that have arrived are not sent twice. A training
run pushes with this command, too, in a separate process (see background_upload.py).
"""

import argparse
import os
import sys
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache, partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HTTPError
from huggingface_hub.hf_api import RepoFile

from modeling_gpt2repro.runs.folder import EVAL_RESULTS
from modeling_gpt2repro.runtime.command_line import as_typed, console_script, end
from modeling_gpt2repro.runtime.progress import escape_controls
from modeling_gpt2repro.storage.retry import without_signatures

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
from .push_run import TWIN_SUFFIX, Push, card_to_push, prepare_pushes, read_text, with_address
from .pushed_files import NEVER_PUSHED, TRAINING_STATE, files_to_push, ignored_by_repository, matches_any, refuse_links

# Deleted in the commit that pushes new weights: an earlier model may have had another number of files, or results that
# are not this one's. Precise names, because subfolders may hold weights or results that people have added themselves.
REPLACED = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"]
REPLACED += [TRAINING_STATE, EVAL_RESULTS.format("*")]
CHECK_BRANCH_PREFIX = "write-check-"
END_WITH_STDIN = "GPT2REPRO_END_WITH_STDIN"  # set by a training for the pushes that it starts
CHECK_FILE = "check.safetensors"  # takes the way of weights, to the storage behind the Hub


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog=console_script() or "python -m modeling_gpt2repro.hub.push",
        description=as_typed(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="RUN", help="A run's --output_dir, or a model: its model/ or step-..."
    )
    parser.add_argument("--hub_model_id", required=True, help="owner/name, or a name alone for one of your own.")
    parser.add_argument("--branch", default="main", help="Created from main if it does not exist.")
    parser.add_argument("--message", help="Commit message.")
    parser.add_argument(
        "--private", action=argparse.BooleanOptionalAction, help="Of a new repository; one that is public is refused."
    )
    parser.add_argument("--with_training_state", action="store_true", help="Push a checkpoint that can be resumed.")
    parser.add_argument(
        "--stock_twin", action="store_true", help=f"Push the model as plain GPT-2, too, to NAME{TWIN_SUFFIX}."
    )
    parser.add_argument("--dry_run", action="store_true", help="Push nothing, only list the files and their sizes.")
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
    if args.check and args.dry_run:
        parser.error("--check asks the Hub and --dry_run does not: give one of them")
    if not args.hub_wait_seconds >= 0:  # not a number either
        parser.error(f"--hub_wait_seconds ({args.hub_wait_seconds}) must be at least 0")

    def show(text: str):  # the process that started this one may follow its log file
        print(escape_controls(text, kept="\n"), file=sys.stderr, flush=True)

    diagnose = partial(diagnose_hub_error, repository=args.hub_model_id)
    try:
        with ExitStack() as temporary:
            # Once, however many attempts there are.
            prepare = cache(partial(prepare_pushes, args.folder, args.stock_twin, temporary, show))
            if args.dry_run:
                for push in prepare(args.hub_model_id):
                    print(escape_controls(list_files(push, args.branch, args.with_training_state), kept="\n"))
                return
            patience = Patience(args.hub_wait_seconds)
            attempt = partial(check if args.check else push_all, connect(patience), args, prepare)
            print(escape_controls(patience.retry(attempt, diagnose, show), kept="\n"))
    except HUB_ERRORS as error:
        message, exit_code, _ = diagnose(error)
        advice = ": try again later" if exit_code == EXIT_CODE_HUB_UNREACHABLE else ""
        end(f"{message}{advice}.", exit_code)
    except ValueError as error:
        end(error, EXIT_CODE_REFUSED)
    except KeyboardInterrupt:
        end(f"{args.folder or 'The check'} was interrupted: run the same command again to continue.", 130)


def check(api: HfApi, args: argparse.Namespace, *_) -> str:
    """Find out whether each repository can be written; returns a sentence."""
    suffixes = ["", TWIN_SUFFIX] if args.stock_twin else [""]
    addresses = [check_write_access(api, f"{args.hub_model_id}{suffix}", args.private) for suffix in suffixes]
    return f"can be written: {', '.join(addresses)}"


def push_all(api: HfApi, args: argparse.Namespace, prepare: Callable[[str], list[Push]]) -> str:
    """Push the model and, if it was asked for, its twin, whose card needs the whole name; returns a line for each."""
    is_short = args.stock_twin and "/" not in args.hub_model_id
    repository = api.get_full_repo_name(args.hub_model_id) if is_short else args.hub_model_id
    addresses = [
        push_folder(
            api,
            push.folder,
            push.repository,
            branch=args.branch,
            message=args.message,
            private=args.private,
            with_training_state=args.with_training_state,
            extra=push.extra,
        )
        for push in prepare(repository)
    ]
    return "\n".join(f"pushed to {address}" for address in addresses)


def list_files(push: Push, branch: str, with_training_state: bool) -> str:
    """What a push would send, a line for each file."""
    files = find_files(push.folder, push.extra, with_training_state)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if "README.md" in files:
        sizes["README.md"] = len(with_address(read_text(files["README.md"]), push.repository, branch).encode())
    lines = [f"{size:>15,} bytes  {name}" for name, size in sizes.items()]
    head = f"To {push.repository}, branch {branch}, unless they are there already (nothing was sent):"
    return "\n".join([head, *lines, f"{sum(sizes.values()):>15,} bytes  in {len(sizes)} files"])


def push_folder(
    api: HfApi,
    folder: Path,
    repository: str,
    branch: str = "main",
    message: str | None = None,
    private: bool | None = None,
    with_training_state: bool = False,
    extra: Path | None = None,
) -> str:
    """Push a model folder in one commit; the repository and the branch are created if they do not exist.

    Args:
        repository: 'owner/name', or a name alone for a repository of the token's owner.
        private: Visibility of a new repository; None takes the default of its owner's settings.
        with_training_state: Push `training_state/`, too, which resuming needs.
        extra: Another folder whose files are pushed in the same commit; they replace those with the same names.

    Returns:
        The address of the branch, the commit, and what is not as the caller may expect.

    Raises:
        ValueError: If the push cannot work, however often it is tried.
        FilesDiffer: If what arrived differs from the folder.
        HUB_ERRORS: From the client; see `diagnose_hub_error`.
    """
    files = find_files(folder, extra, with_training_state)
    repository, notes = open_repository(api, repository, private)
    if branch != "main":
        api.create_branch(repository, branch=branch, exist_ok=True)
    rules = read_text(files[".gitignore"]) if ".gitignore" in files else None
    left_out = ignored_by_repository(api, repository, branch, list(files), rules)
    ask_storage(api, repository, branch)
    operations = [CommitOperationAdd(name, path) for name, path in files.items() if name not in left_out]
    if any(folder.glob("*.safetensors")):
        tree = api.list_repo_tree(repository, revision=branch, recursive=True)
        there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        if card := card_to_push(api, repository, branch, there, operations):
            operations = [file for file in operations if file.path_in_repo != "README.md"]
            operations.append(CommitOperationAdd("README.md", card.encode()))
            del files["README.md"]  # which is not what is sent, and not compared below
        operations += [
            CommitOperationDelete(name) for name in there if matches_any(name, REPLACED) and name not in files
        ]
    # Not upload_folder, which makes several commits of some hundred files.
    message = message or f"Push {folder.name}"
    commit = api.create_commit(repository, operations, commit_message=message, revision=branch)
    # Compared at the commit, not on the branch: someone else may have pushed to it since.
    different = set()
    for root in filter(None, (folder, extra)):
        found = api.verify_repo_checksums(repository, revision=commit.oid, local_dir=root)
        names = {mismatch["path"] for mismatch in found.mismatches} | set(found.extra_paths)
        different |= {name for name in names if files.get(name) == root / name}
    if different := sorted(different - set(left_out)):
        raise FilesDiffer(f"files in {repository} differ from those in {folder}: {', '.join(different)}")
    address = without_signatures(f"{api.endpoint}/{repository}")
    if branch != "main":
        address += f"/tree/{branch}"
    if left_out:
        notes.append(f"left out, because .gitignore in the repository names them: {', '.join(left_out)}")
    return "; ".join([f"{address} (commit {commit.oid[:7]})", *notes])


def find_files(folder: Path, extra: Path | None, with_training_state: bool) -> dict[str, Path]:
    """Path in the repository -> file; raises ValueError if the folder holds no model, or links that lead elsewhere."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a model folder (it has no config.json): give model/ or step-... of a run.")
    excluded = NEVER_PUSHED if with_training_state else [*NEVER_PUSHED, TRAINING_STATE]
    refuse_links(folder, excluded)
    roots = filter(None, (folder, extra))
    return dict(sorted({name: root / name for root in roots for name in files_to_push(root, excluded)}.items()))


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
    return "; ".join([without_signatures(f"{api.endpoint}/{repository}"), *notes])


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
