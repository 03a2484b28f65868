"""Push a folder to the Hub: one commit, checked afterwards, patient with a Hub that is away.

    python -m modeling_gpt2repro.hub.push runs/gpt2-124m/model --hub_model_id owner/name
    python -m modeling_gpt2repro.hub.push --check --hub_model_id owner/name

The same command again goes on where it stood: what has arrived is not sent twice. The second only finds out whether
the first could work. A training pushes by this command, too, in a process of its own, so that an upload neither slows
it down nor ends it.
"""

import argparse
import sys
import uuid
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, get_session, get_token
from huggingface_hub.constants import is_offline_mode
from huggingface_hub.errors import HTTPError

from modeling_gpt2repro.storage.retry import describe_error, http_error, is_transient, retry

NEEDS_A_PERSON, HUB_IS_AWAY = 2, 3  # exit codes
TRAINING_STATE = "training_state/*"
# What weights replace as a whole: an earlier model may have lain in more files than this one. In the Hub's patterns, *
# goes into folders, too, where other weights may lie that are somebody's own.
REPLACED = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", TRAINING_STATE]
NEVER_PUSHED = [".git/*", ".cache/*"]  # what downloading leaves in a folder; by the client, too
CHECK_BRANCH = "write-check"
ANSWER_SECONDS = 120.0  # between two signs of life of the Hub, for which the client would wait for ever


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="What from_pretrained loads: model/ or step-... of a run.")
    parser.add_argument("--hub_model_id", required=True, help="owner/name; a name alone is one of yours.")
    parser.add_argument("--branch", default="main", help="Made from main if it is not there.")
    parser.add_argument("--message", help="Of the commit.")
    parser.add_argument("--private", action=argparse.BooleanOptionalAction, help="Where the repository has to be made.")
    parser.add_argument("--with_training_state", action="store_true", help="A whole checkpoint, to go on from.")
    parser.add_argument("--check", action="store_true", help="Push nothing that stays, only find out whether it works.")
    parser.add_argument("--patience_seconds", type=float, default=1800, help="How long to wait for a Hub that is away.")
    args = parser.parse_args(argv)

    if (args.folder is None) != args.check:
        parser.error("give a folder, or --check")

    def attempt() -> str:
        if args.check:
            return f"can be written: {check_rights(args.hub_model_id, args.private)}"
        what = (args.folder, args.hub_model_id, args.branch, args.message, args.private, args.with_training_state)
        return f"pushed to {push(*what)}"

    try:
        print(retry(attempt, args.patience_seconds, on_retry=print_now))
    except (HTTPError, OSError, RuntimeError) as error:
        if not is_transient(error):
            parser.exit(NEEDS_A_PERSON, f"{explain_hub_error(error, args.hub_model_id)}\n")
        parser.exit(HUB_IS_AWAY, f"the Hub cannot be reached ({describe_error(error)}): try again later.\n")
    except ValueError as error:
        parser.exit(NEEDS_A_PERSON, f"{' '.join(str(error).split())}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{args.folder} was not pushed: the same command goes on.\n")


def push(
    folder: Path,
    repository: str,
    branch: str = "main",
    message: str | None = None,
    private: bool | None = None,
    with_training_state: bool = False,
) -> str:
    """Make the repository and the branch where they are missing, and bring them to what the folder holds.

    Args:
        repository: 'owner/name'; a name alone is one of the token's user.
        private: Of a new repository; None leaves it to the owner's settings.
        with_training_state: Whether `training_state/`, from which a training goes on, is pushed as well.

    Returns:
        The address of what was pushed, and its commit.

    Raises:
        ValueError: If it cannot work, whenever it is tried.
        HTTPError, OSError, RuntimeError: By the client; see `is_transient`.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no folder of a model (it has no config.json): give model/ or step-... of a run.")
    api, repository = open_repository(repository, private)
    if branch != "main":
        api.create_branch(repository, branch=branch, exist_ok=True)
    left_out = NEVER_PUSHED + ([] if with_training_state else [TRAINING_STATE])
    commit = api.upload_folder(
        repo_id=repository,
        folder_path=folder,
        revision=branch,
        commit_message=message or f"Push {folder.name}",
        ignore_patterns=list(left_out),  # to which the client adds
        delete_patterns=REPLACED if any(folder.glob("*.safetensors")) else None,
    )
    found = api.verify_repo_checksums(repository, revision=branch, local_dir=folder)
    other = [mismatch["path"] for mismatch in found.mismatches]
    missing = [path for path in found.extra_paths if not any(fnmatchcase(path, pattern) for pattern in left_out)]
    if other or missing:
        raise RuntimeError(f"these files on the Hub are not those of {folder}: {', '.join(other + missing)}")
    return f"{api.endpoint}/{repository}{'' if branch == 'main' else f'/tree/{branch}'} (commit {commit.oid[:7]})"


def check_rights(repository: str, private: bool | None = None) -> str:
    """Find out whether this token may push: by a commit, to a branch that is then deleted. Less proves nothing, because
    making a repository that is there "succeeds" for a token that may only read. The file goes the way of weights, which
    are not stored where the Hub itself is.

    Returns:
        The repository's address. It is made if it was not there.

    Raises:
        ValueError, HTTPError, OSError, RuntimeError: As `push`.
    """
    api, repository = open_repository(repository, private)
    if private and not api.repo_info(repository).private:
        raise ValueError(
            f"{repository} is there already, and public: make it private in its settings, or give another "
            "--hub_model_id."
        )
    api.create_branch(repository, branch=CHECK_BRANCH, exist_ok=True)
    new = uuid.uuid4().hex.encode()
    try:
        api.upload_file(
            path_or_fileobj=new, path_in_repo="check.safetensors", repo_id=repository, revision=CHECK_BRANCH
        )
    finally:
        api.delete_branch(repository, branch=CHECK_BRANCH)
    return f"{api.endpoint}/{repository}"


def open_repository(repository: str, private: bool | None) -> tuple[HfApi, str]:
    """The client, and the repository's full name; it is made if it is not there.

    Raises:
        ValueError: Without a network that may be used, or without a token.
    """
    if is_offline_mode():
        raise ValueError("HF_HUB_OFFLINE is set, so nothing can be pushed: unset it, or do not push.")
    if get_token() is None:
        raise ValueError("there is no token to push with: `hf auth login` keeps one, or set HF_TOKEN.")
    get_session().timeout = ANSWER_SECONDS
    api = HfApi()
    return api, api.create_repo(repository, private=private, exist_ok=True).repo_id


def explain_hub_error(error: BaseException, repository: str) -> str:
    """Say what has to change, at the Hub or on this machine, before a push can succeed."""
    answer = http_error(error)
    if answer is None:
        return f"the Hub was not reached because of this machine ({describe_error(error)})."
    status = answer.response.status_code
    if status == 401:
        return "the Hub does not accept this token: log in again with `hf auth login`, or set HF_TOKEN."
    if status in (403, 404):
        return (
            f"this token may not write to {repository} ({describe_error(error)}): use one with the role 'write', or "
            "another --hub_model_id."
        )
    return f"the Hub refuses {repository} ({describe_error(error)})."


def print_now(text: str):
    """For whoever reads along in a file."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
