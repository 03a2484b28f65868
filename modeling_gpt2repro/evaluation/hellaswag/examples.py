"""HellaSwag's examples (Zellers et al. 2019), a context and four endings, and their wording in each protocol."""

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from modeling_gpt2repro.runtime.command_line import explain_missing_package

from .official import HUB_DATASET, OFFICIAL, official_file

PROTOCOLS = ("completion", "lm-eval")  # score.py has a table of their differences
TEXT_FIELDS = ("activity_label", "ctx_a", "ctx_b", "ctx")
FIELDS = ("ind", *TEXT_FIELDS, "endings", "label")


@dataclass(frozen=True)
class Example:
    """One question. `ctx` is `ctx_a`, a space and `ctx_b`, the beginning of a sentence that the endings finish.

    Example: ctx_a "A man is sitting on a roof.", ctx_b "he", endings ("is ripping level tiles off.", ...), label 3.
    """

    ind: int
    activity_label: str
    ctx_a: str
    ctx_b: str
    ctx: str
    endings: tuple[str, str, str, str]
    label: int


def strip_wikihow_tags(text: str) -> str:
    """'[header] How to bowl [title] Hold it. [step] Bend' -> ' How to bowl. Hold it. Bend'."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")  # one pass, as in the harness: three spaces become two


def example_texts(example: Example, protocol: str) -> tuple[str, list[str]]:
    """The context and the four endings, without the space that goes between them."""
    if protocol == "completion":
        return example.ctx, list(example.endings)
    # process_docs in lm_eval/tasks/hellaswag/utils.py. capitalize() also lowers all but the first letter, as there.
    context = f"{example.activity_label}: {example.ctx_a} {example.ctx_b.capitalize()}"
    return strip_wikihow_tags(context), [strip_wikihow_tags(ending) for ending in example.endings]


def load_hellaswag(source: str = HUB_DATASET, limit: int | None = None) -> list[Example]:
    """Read the validation examples in their order, each one checked.

    Args:
        source: A local file in the original schema, one JSON object a line; "official", which is that file from the
            original repository, downloaded once; or a dataset on the Hub.
        limit: Read only the first examples. They are all video captions (ActivityNet); the harder two thirds, taken
            from WikiHow, come later, so an accuracy on the first ones does not estimate that on all.

    Raises:
        FileNotFoundError: There is no such file, and the name cannot be a dataset's.
        ConnectionError: The dataset or the official file could not be reached.
        ValueError: An example is malformed: the message has file, line, what was found and what is allowed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit ({limit}) must be at least 1; leave it out to read every example.")
    check_hellaswag_source(source)
    if source == OFFICIAL:
        records = _read_file(str(official_file()))
    elif os.path.exists(source):
        records = _read_file(source)
    else:
        records = _read_hub_dataset(source)
    examples = [_parse_example(location, record) for location, record in itertools.islice(records, limit)]
    if not examples:
        raise ValueError(
            f"{source} has no examples: give the jsonl of HellaSwag's validation split, one object a line."
        )
    return examples


def check_hellaswag_source(source: str) -> None:
    """Raise as `load_hellaswag` for a source that cannot be one, without reading it and without network."""
    if source == OFFICIAL:
        return
    if os.path.isdir(source):
        raise ValueError(f"{source} is a folder: give the jsonl file in it.")
    if os.path.exists(source):
        if not os.access(source, os.R_OK):
            raise PermissionError(f"{source} cannot be read: its permissions do not allow it.")
    elif source.endswith((".json", ".jsonl")) or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise FileNotFoundError(
            f"there is no file {source}: give a local jsonl, official, or a Hub dataset such as {HUB_DATASET}."
        )


def _read_file(path: str) -> Iterator[tuple[str, object]]:
    # As bytes, line by line, so that the message about a character that is not UTF-8 can name its line.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            location = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig").strip()
                if text:
                    yield location, json.loads(text)
            except UnicodeDecodeError as error:
                found = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
                raise ValueError(f"{location}: {found} is not UTF-8; is this the jsonl, unpacked?") from error
            except RecursionError:
                raise ValueError(
                    f"{location}: this is nested too deeply, and every line must be one example."
                ) from None
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{location}: {text[:40]!r} is not JSON ({error.msg}, column {error.colno}); every line must be "
                    "one object, so the file may be truncated: download it again."
                ) from error


def _read_hub_dataset(name: str) -> Iterator[tuple[str, object]]:
    with explain_missing_package(f"the Hub's dataset {name}", ", or give official or a local hellaswag_val.jsonl"):
        import datasets  # here, because it takes a second to import, and a local file does not need it

    try:
        dataset = datasets.load_dataset(name, split="validation")
    except ConnectionError as error:
        raise ConnectionError(
            f"the dataset {name} could not be reached on the Hub: check the connection, or name a local "
            "hellaswag_val.jsonl instead."
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the validation split of the dataset {name} could not be loaded ({reason}): check it, or name a local "
            "hellaswag_val.jsonl instead."
        ) from error
    for number, record in enumerate(dataset, start=1):
        yield f"{name}, example {number}", record


def _parse_example(location: str, record: object) -> Example:
    if not isinstance(record, dict):
        raise ValueError(f"{location}: found {record!r:.40}, not an object with the fields {', '.join(FIELDS)}.")
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise ValueError(f"{location}: {', '.join(missing)} missing; an example of HellaSwag has {', '.join(FIELDS)}.")
    endings = record["endings"]
    if not isinstance(endings, (list, tuple)) or len(endings) != 4:
        found = f"{len(endings)} endings" if isinstance(endings, (list, tuple)) else f"endings {endings!r:.40}"
        raise ValueError(f"{location}: found {found}; there must be a list of 4.")
    texts = {name: record[name] for name in TEXT_FIELDS} | {f"endings[{i}]": text for i, text in enumerate(endings)}
    for name, text in texts.items():
        # Half of a surrogate pair is legal in JSON, but no tokenizer accepts it.
        if not isinstance(text, str) or re.search(r"[\ud800-\udfff]", text):
            raise ValueError(f"{location}: {name} is {text!r:.40}; it must be text in UTF-8.")
    # The Hub has the label as text, the file as a number. Compared as text, true and 1.0 are refused.
    if str(record["label"]) not in ("0", "1", "2", "3"):
        raise ValueError(
            f"{location}: label is {record['label']!r}; it must be 0, 1, 2 or 3. The test split has no labels: use the "
            "validation split."
        )
    return Example(
        ind=record["ind"],
        endings=tuple(endings),
        label=int(record["label"]),
        **{name: record[name] for name in TEXT_FIELDS},
    )
