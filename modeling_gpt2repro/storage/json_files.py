"""Read JSON that may be damaged, or come from a stranger: whatever is wrong with it ends in a ValueError."""

import json
import math
import re
from pathlib import Path

SHOWN_CHARACTERS = 80  # of a bad value, in a message


def parse_json(text: str | bytes) -> object:
    """`json.loads`, whose every error is a ValueError, also that of 100,000 brackets."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json_object(path: Path) -> dict:
    """The JSON object in a file of ours, in which no number is NaN, infinite or beyond 64 bits.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: With what is wrong, to be put into a sentence that names the file.
    """
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer forever
        raise ValueError("it is not a file")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"it cannot be read: {error.strerror}") from error
    try:
        value = json.loads(data.decode("utf-8"), parse_float=_finite, parse_int=_whole, parse_constant=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from None
    if type(value) is not dict:
        raise ValueError(f"it holds {shown(value)} instead of an object")
    return value


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
