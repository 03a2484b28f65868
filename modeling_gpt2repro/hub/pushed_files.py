"""Which files of a folder are pushed: not all of them, and not all that a repository would take."""

from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import HfApi, get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from modeling_gpt2repro.storage.lock import LOCK_FILE

TRAINING_STATE = "training_state/*"
# The Hub takes no .git and no .cache, which downloading creates, at any depth; the client skips only some of them.
NEVER_PUSHED = [".git", ".git/*", "*/.git", "*/.git/*", ".cache/*", "*/.cache/*", LOCK_FILE]
# What programs read: without these a model or a checkpoint does not load, so a .gitignore must not leave them out.
NEEDED = ["*.json", "*.safetensors", "*.npy", "*.py", "*.jinja", "merges.txt", TRAINING_STATE]
FILES_PER_QUESTION = 256  # as the client asks


def files_to_push(folder: Path, excluded: list[str]) -> list[str]:
    """Paths within the folder, except for those that match one of the patterns."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return [name for name in names if not matches_any(name, excluded)]


def ignored_by_repository(
    api: HfApi, repository: str, branch: str, names: list[str], rules: str | None = None, repo_type: str = "model"
) -> list[str]:
    """Ask the Hub which files it would leave out, as a .gitignore in the repository says.

    Without a word: the Hub commits the others, and reports success.

    Args:
        rules: The .gitignore that is to take the place of the repository's.

    Raises:
        ValueError: If a model or shards cannot be loaded without them.
    """
    options = {} if rules is None else {"gitIgnore": rules}
    address = f"{api.endpoint}/api/{repo_type}s/{repository}/preupload/{quote(branch, safe='')}"
    ignored = []
    for start in range(0, len(names), FILES_PER_QUESTION):
        # As if they were empty: only their names matter here.
        files = [{"path": name, "size": 0, "sample": ""} for name in names[start : start + FILES_PER_QUESTION]]
        response = get_session().post(address, json={"files": files, **options}, headers=build_hf_headers())
        hf_raise_for_status(response)
        ignored += [file["path"] for file in response.json()["files"] if file["shouldIgnore"]]
    if needed := [name for name in ignored if matches_any(name, NEEDED)]:
        raise ValueError(
            f".gitignore in {repository} (branch {branch}) leaves out what is needed, such as {', '.join(needed)}: "
            "remove the matching patterns from it, and push again."
        )
    return ignored


def refuse_links(folder: Path, excluded: list[str]):
    """Refuse a folder from which a push would follow a link to elsewhere, or leave out what a link points to.

    The Hub's cache is made of links to blobs/ beside its snapshots: those are followed.

    Raises:
        ValueError: If there is such a link.
    """
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append((root.parents[1] / "blobs").resolve())
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.is_symlink() or matches_any(name, excluded) or matches_any(f"{name}/", excluded):
            continue
        if not path.is_file():
            raise ValueError(
                f"{folder / name} is a link to a folder or to nothing: put files in its place, or delete it."
            )
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise ValueError(
                f"{folder / name} is a link out of the folder, to {path.resolve()}: to push that file, put a copy in "
                "the link's place."
            )


def matches_any(name: str, patterns: list[str]) -> bool:
    """Whether a path matches a pattern as the Hub's client takes it: * matches / as well."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
