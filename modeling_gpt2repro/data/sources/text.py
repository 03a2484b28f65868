"""Text files on disk: the lines or the pieces of text that belong to a range of their bytes.

Ranges that follow each other give everything once, wherever they are cut.
"""

import re
from collections.abc import Iterator
from typing import BinaryIO

# A text is handed on in pieces of at least so many characters, so that a part of it can serve for validation.
PIECE_CHARACTERS = 2_000
# A longer line is not read into memory: the file is not of lines.
LONGEST_LINE_BYTES = 256 * 2**20

# Where a text may be cut: before whitespace that follows something else, at best where a line ends. GPT-2's words never
# go on across such a place (`GPT2_PATTERN` in gpt2_vocabulary.py), so the ids of the pieces are those of the whole.
# Only ASCII whitespace is listed: Python's \s has characters that GPT-2's has not.
LINE_END = re.compile(r"\S(?=[\t\v\f\r ]*\n)")
WORD_END = re.compile(r"\S(?=[\t\n\v\f\r ])")


def read_lines(path: str, start: int, stop: int) -> Iterator[tuple[int, str]]:
    """Yield the lines that begin inside the range, each after the byte it begins at.

    Raises:
        ValueError: On bytes that are not UTF-8 or a line of endless length.
    """
    with open(path, "rb") as file:
        place = start
        if place:
            file.seek(place - 1)
            place += len(_read_line(file, path)) - 1
        while place < stop and (line := _read_line(file, path)):
            yield place, _decode(line, path, place)
            place += len(line)


def read_pieces(path: str, start: int, stop: int) -> Iterator[str]:
    """Yield the text of the range, from whitespace to whitespace, in pieces.

    Raises:
        ValueError: On bytes that are not UTF-8.
    """
    with open(path, "rb") as file:
        start, stop = _text_cut(file, start), _text_cut(file, stop)
        file.seek(start)
        text = _decode(file.read(stop - start), path, start)
    begin = 0
    while begin < len(text):
        wanted = begin + PIECE_CHARACTERS
        cut = LINE_END.search(text, wanted, wanted + PIECE_CHARACTERS) or WORD_END.search(text, wanted)
        end = cut.end() if cut else len(text)
        yield text[begin:end]
        begin = end


def _read_line(file: BinaryIO, path: str) -> bytes:
    line = file.readline(LONGEST_LINE_BYTES)
    if len(line) == LONGEST_LINE_BYTES and not line.endswith(b"\n"):
        raise ValueError(f"{path} has a line of more than {LONGEST_LINE_BYTES} bytes: write one document a line.")
    return line


def _text_cut(file: BinaryIO, place: int) -> int:
    """The first place at or behind `place` where the text may be cut."""
    file.seek(place)
    ahead = file.read(2**16) if place else b""
    # Where no word ends for so long, before any byte that begins a character of UTF-8.
    found = re.search(rb"[\t\n\v\f\r ]", ahead) or re.search(rb"[^\x80-\xbf]", ahead)
    return place + (found.start() if found else 0)


def _decode(data: bytes, path: str, place: int) -> str:
    try:
        return data.decode("utf-8-sig" if place == 0 else "utf-8")  # Windows' editors begin files with a mark
    except UnicodeDecodeError as error:
        place += len(data) - len(error.object) + error.start  # the mark is not counted
        raise ValueError(
            f"{path} is not UTF-8 (byte {place} is 0x{error.object[error.start]:02x}): convert it."
        ) from error
