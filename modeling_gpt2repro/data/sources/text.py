"""Text files on disk: the lines, or the pieces of text, that belong to a range of bytes.

Ranges that follow each other give everything exactly once, wherever a file is cut: also in the middle of a line, a word
or a character. A line belongs to the range that its first byte is in, a piece of text to the one that it was cut in.
"""

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO

# A text is given in pieces of at least so many characters, so that some of them can be held out for validation.
PIECE_CHARACTERS = 2_000
# Longer lines are not read into memory: such a file is hardly one of lines.
MAX_LINE_BYTES = 256 * 2**20

# Where a text may be cut: before whitespace that follows something else, preferably at the end of a line. GPT-2's words
# never continue across such a cut (`GPT2_PATTERN` in gpt2_bpe.py), so the ids of the pieces are those of the whole.
# Only ASCII whitespace is listed: Python's \s has characters that GPT-2's has not.
LINE_END = re.compile(r"\S(?=[\t\v\f\r ]*\n)")
WORD_END = re.compile(r"\S(?=[\t\n\v\f\r ])")


def read_lines(
    path: str, start: int, stop: int, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines that begin inside the range, each after the position of its first byte.

    Of a line of `max_line_bytes` or more there is None. A byte order mark at the beginning of the file is left out.
    """
    with open(path, "rb") as file:
        position = start
        if position:
            # From one byte before, to see whether a line begins at `start`; the rest of one that does not is skipped.
            file.seek(position - 1)
            position += _read_line(file, max_line_bytes)[1] - 1
        while position < stop:
            line, size = _read_line(file, max_line_bytes)
            if not size:
                break
            yield position, line.removeprefix(codecs.BOM_UTF8) if line and not position else line
            position += size


def line_number(path: str, position: int) -> int:
    """The number of the line, from 1 on, that the byte at `position` is in."""
    number = 1
    with open(path, "rb") as file:
        while position and (data := file.read(min(position, 2**20))):
            number += data.count(b"\n")
            position -= len(data)
    return number


def read_pieces(path: str, start: int, stop: int) -> Iterator[str]:
    """Yield the text of the range in pieces, its ends moved on to where the text may be cut.

    Raises:
        ValueError: On bytes that are not UTF-8.
    """
    with open(path, "rb") as file:
        start = _next_cut(file, start)
        stop = _next_cut(file, stop)
        file.seek(start)
        text = _decode(file.read(stop - start), path, start)
    begin = 0
    while begin < len(text):
        earliest = begin + PIECE_CHARACTERS
        cut = LINE_END.search(text, earliest, earliest + PIECE_CHARACTERS) or WORD_END.search(text, earliest)
        end = cut.end() if cut else len(text)
        yield text[begin:end]
        begin = end


def _read_line(file: BinaryIO, max_line_bytes: int) -> tuple[bytes | None, int]:
    """The next line, or None if it is too long to be kept, and its number of bytes."""
    line = file.readline(max_line_bytes)
    if len(line) < max_line_bytes or line.endswith(b"\n"):
        return line, len(line)
    size = len(line)
    while line and not line.endswith(b"\n"):
        line = file.readline(max_line_bytes)
        size += len(line)
    return None, size


def _next_cut(file: BinaryIO, position: int) -> int:
    """The first byte at or after `position` before which the text may be cut."""
    file.seek(position)
    ahead = file.read(2**16) if position else b""
    # Without whitespace for so long, before any byte that begins a character: 0x80 to 0xbf continue one in UTF-8.
    found = re.search(rb"[\t\n\v\f\r ]", ahead) or re.search(rb"[^\x80-\xbf]", ahead)
    return position + (found.start() if found else 0)


def _decode(data: bytes, path: str, position: int) -> str:
    try:
        # utf-8-sig drops the byte order mark that Windows' editors put first.
        return data.decode("utf-8-sig" if position == 0 else "utf-8")
    except UnicodeDecodeError as error:
        # The error's own position counts from after the mark.
        bad_position = position + len(data) - len(error.object) + error.start
        bad_byte = error.object[error.start]
        raise ValueError(f"{path} is not UTF-8 (byte {bad_position} is 0x{bad_byte:02x}): convert it.") from error
