"""Push a folder of prepared shards to a dataset repository on the Hub, with a card; interrupted, it continues."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCardData, HfApi
from huggingface_hub.errors import HTTPError

from modeling_gpt2repro.data.contamination import describe_contamination
from modeling_gpt2repro.data.shards.dataset import MANIFEST, SPLITS, read_manifest
from modeling_gpt2repro.data.shards.nanogpt_format import SHARD_NAME
from modeling_gpt2repro.data.shards.verify import verify_shards
from modeling_gpt2repro.runs.read import HUB_ID
from modeling_gpt2repro.storage.retry import without_signatures

from .client import HUB_ERRORS, FilesDiffer, Patience, ask_storage, connect, diagnose_hub_error
from .model_card import inherited_metadata, plain_text
from .push import check_write_access, open_repository
from .pushed_files import files_to_push, ignored_by_repository, refuse_links

COMMIT_FILES = 25  # of a commit at most: a push that is interrupted continues after the last one
COMMIT_BYTES = 5 * 10**9
CARD = """---
{metadata}
---
# {title}

{train:,} training tokens and {validation:,} for validation, of {documents}, as 16-bit ids in `.npy` files for
gpt2repro: each document begins with the id {end_of_text}, end-of-text, and whole documents are held out for
validation{share}. `{manifest}` has the SHA-256 of each shard's ids.

| | |
|---|---|
{rows}

## Train on it

```bash
accelerate launch --config_file accelerate_configs/single_gpu.yaml train_accelerate.py --shards hf://{repository}
```

The shards are downloaded once, into the Hub's cache, and checked; `hf://{repository}@REVISION` names a commit. In
Python, one of them is `numpy.load("{first}")`, and `tokenizer/` holds the tokenizer that made the ids.
"""


def push_shards_with_patience(
    folder: Path,
    repository: str,
    private: bool | None,
    seconds: float,
    show: Callable[[str], None],
    check: bool = False,
) -> tuple[int, str]:
    """Push, or with `check` only find out whether it would work, and try again while the Hub is away.

    Returns:
        The exit code, 0 if it worked, and a sentence.
    """

    def attempt() -> str:
        if check:
            return f"can be written: {check_write_access(api, repository, private, 'dataset')}"
        return f"pushed to {push_shards(api, folder, repository, private, show)}"

    diagnose = partial(diagnose_hub_error, repository=repository, flag="--hub_dataset_id")
    patience = Patience(seconds)
    try:
        api = connect(patience)
        return 0, patience.retry(attempt, diagnose, show)
    except HUB_ERRORS as error:
        message, exit_code, _ = diagnose(error)
        return exit_code, f"{message}."
    except ValueError as error:
        return 2, " ".join(str(error).split())


def push_shards(
    api: HfApi, folder: Path, repository: str, private: bool | None = None, show: Callable[[str], None] = print
) -> str:
    """Push shards in commits of bounded size, then the manifest, which makes them readable, tokenizer and card.

    Shards that are there already are not sent again. A manifest of other shards is deleted first, so that nobody reads
    a mixture of both.

    Args:
        private: Visibility of a new repository; None takes the default of its owner's settings.

    Returns:
        The repository's address, with the commit.

    Raises:
        ValueError: If the folder is not what its manifest says, or the push cannot work.
        FilesDiffer: If what arrived differs from the folder.
        HUB_ERRORS: From the client.
    """
    if problems := verify_shards(folder, quick=True):
        raise ValueError(problems[0])
    manifest = read_manifest(folder)
    names = [entry["file"] for split in SPLITS for entry in manifest["splits"][split]["shards"]]
    if not manifest["splits"]["train"]["shards"]:
        raise ValueError(
            f"{folder / MANIFEST} names no training shards, and nobody could train on them: nothing is pushed."
        )
    refuse_links(folder, [])
    tokenizer = [name for name in files_to_push(folder, []) if name.startswith("tokenizer/")]
    repository, notes = open_repository(api, repository, private, "dataset")
    ignored_by_repository(api, repository, "main", [*names, *tokenizer, MANIFEST], repo_type="dataset")
    ask_storage(api, repository, "main", "dataset")
    commit = partial(api.create_commit, repository, repo_type="dataset")
    there = {entry.path for entry in api.list_repo_tree(repository, recursive=True, repo_type="dataset")}
    if MANIFEST in there and api.verify_repo_checksums(repository, repo_type="dataset", local_dir=folder).mismatches:
        commit([CommitOperationDelete(MANIFEST)], commit_message=f"Take back {MANIFEST} while shards are replaced")
    groups = list(commit_groups(folder, names))
    for number, group in enumerate(groups, start=1):
        commit(
            [CommitOperationAdd(name, folder / name) for name in group], commit_message=f"Push {', '.join(group[:1])}"
        )
        show(f"{number} of {len(groups)} parts are on the Hub.")
    card = dataset_card(manifest, repository, source_metadata(api, manifest["source"]))
    operations = [CommitOperationAdd(name, folder / name) for name in [*tokenizer, MANIFEST]]
    operations.append(CommitOperationAdd("README.md", card.encode()))
    operations += [CommitOperationDelete(name) for name in there if SHARD_NAME.fullmatch(name) and name not in names]
    last = commit(operations, commit_message=f"Push {MANIFEST}")
    found = api.verify_repo_checksums(repository, repo_type="dataset", revision=last.oid, local_dir=folder)
    different = {mismatch["path"] for mismatch in found.mismatches} | set(found.extra_paths)
    if different := sorted(different & {*names, *tokenizer, MANIFEST}):
        raise FilesDiffer(f"files in {repository} differ from those in {folder}: {', '.join(different[:3])}")
    address = without_signatures(f"{api.endpoint}/datasets/{repository}")
    return "; ".join([f"{address} (commit {last.oid[:7]})", *notes])


def commit_groups(folder: Path, names: list[str]) -> Iterator[list[str]]:
    """Split the shards into groups of at most COMMIT_FILES files and COMMIT_BYTES bytes."""
    group, size = [], 0
    for name in names:
        bytes_ = (folder / name).stat().st_size
        if group and (len(group) == COMMIT_FILES or size + bytes_ > COMMIT_BYTES):
            yield group
            group, size = [], 0
        group.append(name)
        size += bytes_
    if group:
        yield group


def source_metadata(api: HfApi, source: dict) -> dict:
    """Licence and language of the dataset that the tokens were made of; {} if it is not on the Hub or not reached."""
    name, revision = source.get("dataset"), source.get("revision")
    if not isinstance(name, str) or not re.fullmatch(HUB_ID, name, re.ASCII):
        return {}
    try:
        card = api.dataset_info(name, revision=revision if isinstance(revision, str) else None).card_data
    except (HTTPError, OSError, ValueError):
        return {"source_datasets": [name]}
    kept = inherited_metadata(card.to_dict() if card else {})
    return {name: kept[name] for name in kept if name != "base_model"} | {"source_datasets": [name]}


def dataset_card(manifest: dict, repository: str, metadata: dict) -> str:
    """The text of README.md: what the manifest says, for people; names in it may be somebody else's."""
    source, splits, tokenizer = manifest["source"], manifest["splits"], manifest["tokenizer"]
    documents = sum(splits[split].get("documents", 0) for split in SPLITS)
    files = source.get("files")
    rows = {
        "source": source.get("dataset") or (", ".join(map(str, files)) if isinstance(files, list) else None),
        "configuration": source.get("config"),
        "split": source.get("split"),
        "revision": source.get("revision"),
        "licence": metadata.get("license", "that of the source"),
        "documents": f"{documents:,}" if documents else None,
        "tokens": ", ".join(f"{splits[split]['tokens']:,} {split}" for split in SPLITS),
        "shards": ", ".join(f"{len(splits[split]['shards']):,} {split}" for split in SPLITS),
        "tokenizer": f"{tokenizer.get('name')}, {tokenizer['vocab_size']:,} ids, sha256 {tokenizer['sha256'][:12]}",
        "contamination": describe_contamination(manifest),
    }
    share = manifest.get("validation_share")
    return CARD.format(
        metadata=DatasetCardData(task_categories=["text-generation"], tags=["gpt2repro"], **metadata).to_yaml(),
        title=plain_text(repository.split("/")[-1]),
        train=splits["train"]["tokens"],
        validation=splits["validation"]["tokens"],
        documents=f"{documents:,} documents" if documents else "documents",
        end_of_text=manifest["end_of_text_id"],
        share=f", {share:.4g} of all" if isinstance(share, float) else "",
        manifest=MANIFEST,
        rows="\n".join(f"| {name} | {plain_text(value).replace('|', ' ')} |" for name, value in rows.items() if value),
        repository=repository,
        first=splits["train"]["shards"][0]["file"],
    )
