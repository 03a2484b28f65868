"""Read JSON that may be damaged, or come from a stranger: whatever is wrong with its content is a ValueError."""

import json
import math
import re
import stat
from pathlib import Path

SHOWN_CHARACTERS = 80  # of a bad value, in a message
MAX_BYTES = 2**24  # of a file; those of a run, a checkpoint or a model's config are a thousand times smaller


def parse_json(text: str | bytes, **hooks) -> object:
    """`json.loads`, whose every error is a ValueError of one line, also that of 100,000 brackets."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8"), **hooks)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None


def read_json_object(path: Path, any_numbers: bool = False, max_bytes: int = MAX_BYTES) -> dict:
    """The JSON object in a file.

    Args:
        any_numbers: Whether numbers may be NaN, infinite or beyond 64 bits, which ours never are.
        max_bytes: Of the file; parsed, it takes up to 20 times as much memory.

    Raises:
        OSError: If there is no such file, or the disk refuses it.
        ValueError: With what is wrong, to be put into a sentence that names the file.
    """
    data = read_bounded(path, max_bytes)
    hooks = {} if any_numbers else {"parse_float": _finite, "parse_int": _whole, "parse_constant": _finite}
    value = parse_json(data, **hooks)
    require(type(value) is dict, f"it holds {shown(value)} instead of an object")
    return value


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """A whole file that may be a stranger's.

    Raises:
        OSError: If there is no such file, or the disk refuses it.
        ValueError: If it is larger, or not a regular file: opening a pipe would wait for a writer forever.
    """
    found = path.stat()
    require(stat.S_ISREG(found.st_mode), "it is not a file")
    require(found.st_size <= max_bytes, f"it is larger than {max_bytes:,} bytes")
    with open(path, "rb") as file:
        return file.read(max_bytes)


def require(condition: bool, problem: str):
    """Raise a ValueError with the problem unless the condition holds."""
    if not condition:
        raise ValueError(problem)


def is_count(value: object, minimum: int = 0) -> bool:
    """Whether it is a whole number from `minimum` up to what fits into 64 bits, even after some arithmetic."""
    return type(value) is int and minimum <= value < 2**53


def is_size(value: object) -> bool:
    """Whether it is a finite number of at least 0."""
    return type(value) in (int, float) and 0 <= value < math.inf


def is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 can write: JSON may hold halves of characters."""
    return type(value) is str and not re.search("[\ud800-\udfff]", value)


def shown(value: object, limit: int = SHOWN_CHARACTERS) -> str:
    """The value for a message: one line, bounded, without control characters."""
    text = ascii(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"it holds the number {text[:SHOWN_CHARACTERS]}")
    return number


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"it holds the number {text[:SHOWN_CHARACTERS]}")
    return int(text)
