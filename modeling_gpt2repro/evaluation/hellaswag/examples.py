"""HellaSwag's rows (Zellers et al. 2019), a context and four endings, and their wording under each protocol."""

import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from .official import HUB_DATASET, OFFICIAL, official_file

PROTOCOLS = ("completion", "lm-eval")  # what they are stands in hellaswag.py
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


def without_wikihow_tags(text: str) -> str:
    """'[header] How to bowl [title] Hold it. [step] Bend' -> ' How to bowl. Hold it. Bend'."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")  # one pass, as in the original: three spaces become two


def example_texts(row: Example, protocol: str) -> tuple[str, list[str]]:
    """The context and the four endings, without the space that goes between them."""
    if protocol == "completion":
        return row.ctx, list(row.endings)
    context = f"{row.activity_label}: {row.ctx_a} {row.ctx_b.capitalize()}"
    return without_wikihow_tags(context), [without_wikihow_tags(ending) for ending in row.endings]


def load_hellaswag(source: str = HUB_DATASET, limit: int | None = None) -> list[Example]:
    """Read the validation rows in their order, each one checked.

    Args:
        source: A local file in the original schema, one JSON object a line; "official", which is that file from the
            original repository, fetched once; or a dataset on the Hub.
        limit: Read the first so many rows only. The first are all video captions (ActivityNet), the harder two thirds,
            taken from WikiHow, come later: an accuracy on a part is not an estimate of the whole.

    Raises:
        FileNotFoundError: There is no such file, and the name cannot be a dataset's.
        ConnectionError: The dataset or the official file could not be reached.
        ValueError: A row is not as it should be: file, line, what was found, what is allowed.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit ({limit}) must be at least 1; leave it out to read every row.")
    check_hellaswag_source(source)
    if source == OFFICIAL:
        records = _records_of_file(str(official_file()))
    else:
        records = _records_of_file(source) if os.path.exists(source) else _records_of_hub(source)
    rows = [_checked_row(place, record) for place, record in itertools.islice(records, limit)]
    if not rows:
        raise ValueError(f"{source} has no rows: give the jsonl of HellaSwag's validation split, one object a line.")
    return rows


def check_hellaswag_source(source: str) -> None:
    """Refuse a source that cannot be one, without reading it or asking the network; raises as `load_hellaswag`."""
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


def _records_of_file(path: str) -> Iterator[tuple[str, object]]:
    # As bytes, line by line: so a character that is not UTF-8 is told with its line.
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            place = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig").strip()
                if text:
                    yield place, json.loads(text)
            except UnicodeDecodeError as error:
                found = f"byte 0x{error.object[error.start]:02x} at column {error.start + 1}"
                raise ValueError(f"{place}: {found} is not UTF-8; is this the jsonl, unpacked?") from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{place}: {text[:40]!r} is not JSON ({error.msg}, column {error.colno}); every line must be one "
                    "object, so the file may be cut short: fetch it again."
                ) from error


def _records_of_hub(name: str) -> Iterator[tuple[str, object]]:
    import datasets  # late: a local file needs neither it nor its import time

    try:
        dataset = datasets.load_dataset(name, split="validation")
    except ConnectionError as error:
        raise ConnectionError(
            f"the dataset {name} could not be reached on the Hub: check the connection, or name a local "
            "hellaswag_val.jsonl in its place."
        ) from error
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the validation split of the dataset {name} could not be loaded ({reason}): check it, or name a local "
            "hellaswag_val.jsonl in its place."
        ) from error
    for number, record in enumerate(dataset, start=1):
        yield f"{name}, row {number}", record


def _checked_row(place: str, record: object) -> Example:
    if not isinstance(record, dict):
        raise ValueError(f"{place}: found {record!r:.40}, not an object with the fields {', '.join(FIELDS)}.")
    missing = [name for name in FIELDS if name not in record]
    if missing:
        raise ValueError(f"{place}: {', '.join(missing)} missing; a row of HellaSwag has {', '.join(FIELDS)}.")
    endings = record["endings"]
    if not isinstance(endings, (list, tuple)) or len(endings) != 4:
        found = f"{len(endings)} endings" if isinstance(endings, (list, tuple)) else f"endings {endings!r:.40}"
        raise ValueError(f"{place}: found {found}; a row must have a list of 4.")
    texts = {name: record[name] for name in TEXT_FIELDS} | {f"endings[{i}]": text for i, text in enumerate(endings)}
    for name, text in texts.items():
        # Half of a surrogate pair is legal in JSON and no tokenizer takes it.
        if not isinstance(text, str) or re.search(r"[\ud800-\udfff]", text):
            raise ValueError(f"{place}: {name} is {text!r:.40}; it must be text in UTF-8.")
    # The Hub keeps the label as text, the file as a number; as text, true and 1.0 are no labels either.
    if str(record["label"]) not in ("0", "1", "2", "3"):
        raise ValueError(
            f"{place}: label is {record['label']!r}; it must be 0, 1, 2 or 3. The test split has no labels: use the "
            "validation split."
        )
    return Example(
        ind=record["ind"],
        endings=tuple(endings),
        label=int(record["label"]),
        **{name: record[name] for name in TEXT_FIELDS},
    )
