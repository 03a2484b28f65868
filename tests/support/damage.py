"""Damage for files that programs read: JSON that is no object of ours, no files, and random mutations with a seed."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

NOT_OBJECTS = {
    "empty": b"",
    "a list": b"[]",
    "null": b"null",
    "a string": b'"x"',
    "a number": b"3",
    "NaN": b'{"progress": NaN}',
    "infinity": b'{"progress": 1e999}',
    "a huge number": b'{"progress": ' + b"9" * 5000 + b"}",
    "brackets": b"[" * 100_000,
    "braces": b'{"a":' * 100_000,
    "not UTF-8": b'{"progress": "\xff"}',
    "cut": b'{"progress": {"step": 3',
    "empty object": b"{}",
}
NO_FILES: dict[str, Callable[[Path], object]] = {  # what to put where a file was
    "missing": lambda path: None,
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a loop of links": lambda path: path.symlink_to(path.name),
}
ENDLESS: dict[str, Callable[[Path], object]] = {  # what must not be read to its end
    "a terabyte": lambda path: (path.touch(), os.truncate(path, 2**40)),
    "a pipe": os.mkfifo,
    "zeros without end": lambda path: path.symlink_to("/dev/zero"),
}
NUMBERS = (-1, 0, 1, 2**53, 10**25, 0.5, -2.5)
OTHER_VALUES = (None, True, *NUMBERS, "", "x", "30", "\ud800", "a\nb", [], {}, [1], {"a": 1}, [[]])


def put_in_place(path: Path, kind: str):
    """Replace a file by one of NO_FILES."""
    path.unlink(missing_ok=True)
    NO_FILES[kind](path)


def edit_json(path: Path, change: Callable[[dict], object]):
    """Change the object in a JSON file in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def random_json(draw: random.Random, value: object) -> object:
    """A JSON value in which one node, wherever it is, is replaced, renamed or deleted; `value` changes, too."""
    if isinstance(value, dict | list) and value and draw.random() < 0.85:
        key = draw.choice(list(value)) if isinstance(value, dict) else draw.randrange(len(value))
        choice = draw.random()
        if choice < 0.15:
            del value[key]
        elif choice < 0.25 and isinstance(value, dict):
            value["".join(draw.choices("a./\n\\", k=5))] = value.pop(key)
        else:
            value[key] = random_json(draw, value[key])
        return value
    return draw.choice(OTHER_VALUES)


def random_bytes(draw: random.Random, data: bytes, header_bytes: int = 600) -> bytes:
    """Bytes of which some are replaced, most of them in the header, or the rest is cut off."""
    if draw.random() < 0.2:
        return data[: draw.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        end = len(data) if draw.random() < 0.3 else min(len(data), header_bytes)
        changed[draw.randrange(end)] = draw.randrange(256)
    return bytes(changed)
