"""Text files: the lines, pieces or documents that belong to a range of bytes.

Adjacent ranges give everything exactly once, wherever a file is cut, even in the middle of a line, a word or a
character. A line belongs to the range that its first byte is in, a piece of text to the one that it was cut in. A
compressed file has only one range, all of it.

Line endings of Windows, \\r\\n, and of old Macs, \\r, become \\n, as in Python's text mode; positions count the file's
own bytes.
"""

import codecs
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import BinaryIO

from .files import is_compressed, open_bytes

BLOCK_BYTES = 16 * 2**20  # read at a time: some 4 M tokens
LOOK_AHEAD_BYTES = 2**16  # in which a place to cut a block is looked for
# A text is split into pieces of at least this many characters, so that some of them can be held out for validation.
PIECE_CHARACTERS = 2_000
# Longer lines and documents are not read into memory: a file that has them is hardly one of lines or documents.
MAX_LINE_BYTES = 256 * 2**20
LINE_ENDS = "line_ends"  # counts the blocks or documents whose line endings became \n

# Where a text may be cut: before whitespace that follows something else, preferably at the end of a line. GPT-2's words
# never continue across such a cut (`GPT2_PATTERN` in gpt2_bpe.py), so the ids of the pieces are those of the whole.
# Only ASCII whitespace is listed: Python's \s has characters that GPT-2's has not.
LINE_END = re.compile(r"\S(?=[\t\v\f\r ]*\n)")
WORD_END = re.compile(r"\S(?=[\t\n\v\f\r ])")
# The same in bytes, never within \r\n; and, where there is no whitespace, before any byte that begins a character: 0x80
# to 0xbf continue one in UTF-8. Between lines, a bad line is left out as a whole.
BETWEEN_LINES = re.compile(rb"(?<![\t\n\v\f\r ])[\t\v\f ]*[\r\n]")
WHITESPACE = re.compile(rb"(?<!\r)\n|[\t\v\f\r ]")
CHARACTER = re.compile(rb"(?<!\r)\n|[^\x80-\xbf\n]")

# A line ending of any kind, and never half of \r\n. (Alternatives that begin with a byte each are searched faster.)
NEWLINE = rb"(?:\r\n|\r(?!\n)|\n(?<!\r\n))"
ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\"}
OnBadLine = Callable[[int, int], None]  # called with the position and the value of the line's first bad byte
BLANK_LINE = "blank_line"
WHOLE_FILE = "file"


def read_lines(
    path: str, start: int, stop: int, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines that begin in the range: (position of the first byte, line).

    For a line of `max_line_bytes` or more, None takes its place. A byte order mark at the file's beginning is left out.
    """
    with open_bytes(path) as file:
        position = start
        if position:
            # From one byte before, to see whether a line begins at `start`; the rest of one that does not is skipped.
            file.seek(position - 1)
            position += _read_line(file, max_line_bytes)[1] - 1
        while position < _end(path, stop):
            line, size = _read_line(file, max_line_bytes)
            if not size:
                break
            yield position, line.removeprefix(codecs.BOM_UTF8) if line and not position else line
            position += size


def describe_not_utf8(position: int, byte: int) -> str:
    """The end of a sentence on a line."""
    return f"is not UTF-8 (byte {position} is 0x{byte:02x}): convert it."


def line_number(path: str, position: int) -> int:
    """The number, counted from 1, of the line that the byte at `position` is in."""
    number = 1
    with open_bytes(path) as file:
        while position and (data := file.read(min(position, 2**20))):
            number += data.count(b"\n")
            position -= len(data)
    return number


def read_pieces(
    path: str,
    start: int,
    stop: int,
    counts: Counter | None = None,
    on_bad_line: OnBadLine | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, int, str]]:
    """Yield the text of the range in pieces: (start of the block, number of the piece in the block, text).

    A block is `block_bytes` of the range; both of its ends move forward to where the text may be cut.

    Args:
        counts: Counts under LINE_ENDS the blocks whose line endings were changed.
        on_bad_line: Called for each line that is not UTF-8, which is then left out.

    Raises:
        ValueError: On bytes that are not UTF-8, without `on_bad_line`.
    """
    for block_start, position, data in _read_blocks(path, start, _end(path, stop), block_bytes):
        text = _decode_text(data, position, counts, on_bad_line)
        begin = number = 0
        while begin < len(text):
            earliest = begin + PIECE_CHARACTERS
            cut = LINE_END.search(text, earliest, earliest + PIECE_CHARACTERS) or WORD_END.search(text, earliest)
            end = cut.end() if cut else len(text)
            yield block_start, number, text[begin:end]
            begin = end
            number += 1


def read_documents(
    path: str,
    start: int,
    stop: int,
    separator: re.Pattern[bytes],
    counts: Counter | None = None,
    on_bad_line: OnBadLine | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[int, str]]:
    """Yield the documents between separators, without whitespace at their ends: (position, text).

    Args:
        start: Where the file or a separator begins.
        stop: Where the file ends or a separator begins.
        separator: See `compile_separator`.
        counts: Counts under LINE_ENDS the documents whose line endings were changed.
        on_bad_line: See `read_pieces`.

    Raises:
        ValueError: On a document of more than MAX_LINE_BYTES, or, without `on_bad_line`, bytes that are not UTF-8.
    """
    for position, data in _split(path, start, _end(path, stop), separator, block_bytes):
        if data.strip(b"\r\n"):  # a newline between two separators, or after the last one, is not a document
            yield position, _decode_text(data, position, counts, on_bad_line).strip(" \t\n")


def compile_separator(document_separator: str) -> re.Pattern[bytes]:
    r"""The pattern of what separates documents: BLANK_LINE or a string, in which \n, \r, \t and \\ may be written.

    Separators that touch or overlap count as one: with "\n\n", any two or more newlines. So what separates two
    documents does not depend on where the search begins.

    Raises:
        ValueError: If the string is empty or has another escape.
    """
    if document_separator == BLANK_LINE:
        return re.compile(NEWLINE + rb"[ \t\r\n]*" + NEWLINE)
    if not re.fullmatch(r"(?:[^\\]|\\[nrt\\])+", document_separator, re.DOTALL):
        raise ValueError(
            f"document_separator ({document_separator}) must be {BLANK_LINE}, {WHOLE_FILE} or the text between two "
            r"documents, with \n for a newline, \t for a tab and \\ for a backslash."
        )
    text = re.sub(r"\\(.)", lambda match: ESCAPES[match[1]], document_separator)
    text = normalize_line_ends(text)
    if text == len(text) * text[0] and text.isascii():
        # The same as below. Of a repeated class, `re` remembers nothing; of a repeated group, 170 bytes each time.
        return re.compile(_pattern(text) + (rb"[\r\n]*" if text[0] == "\n" else re.escape(text[:1].encode()) + b"*"))
    # What completes another separator that begins within this one, or at its end.
    rests = [text[-shift:] for shift in range(1, len(text) + 1) if text.startswith(text[shift:])]
    return re.compile(_pattern(text) + b"(?:" + b"|".join(map(_pattern, rests)) + b")*")


def find_document_cut(path: str, position: int, separator: re.Pattern[bytes]) -> int | None:
    """The byte at which the second separator after `position` begins; the first one may have begun before `position`.

    None if there are not two before the file ends. The file must not be compressed.

    Raises:
        ValueError: If there are not two in MAX_LINE_BYTES.
    """
    with open_bytes(path) as file:
        file.seek(position - 1)
        data = file.read(1)  # the \n of \r\n is not a line ending of its own
        while block := file.read(max(LOOK_AHEAD_BYTES, len(data))):
            data += block
            starts = [match.start() for match in islice(separator.finditer(data, 1), 2)]
            if len(starts) == 2:
                return position - 1 + starts[1]
            _check_document_size(data, path, position)
    return None


def has_separator(path: str, separator: re.Pattern[bytes]) -> bool:
    """Whether the separator occurs in the first BLOCK_BYTES of the file."""
    with open_bytes(path) as file:
        return separator.search(file.read(BLOCK_BYTES)) is not None


def normalize_line_ends(text: str) -> str:
    r"""\r\n and \r -> \n."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def replace_lone_surrogates(text: str) -> str:
    r"""JSON can spell half of a surrogate pair, \ud83d, which UTF-8 cannot encode: U+FFFD replaces it."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _split(
    path: str, start: int, stop: int, separator: re.Pattern[bytes], block_bytes: int
) -> Iterator[tuple[int, bytes]]:
    with open_bytes(path) as file:
        if start:
            file.seek(start)
        position = start  # of the first byte of `data`
        data = b""
        is_last = False
        while not is_last:
            block = file.read(min(block_bytes, stop - position - len(data)))
            is_last = not block
            data += block
            begin = last = 0
            for match in separator.finditer(data):
                if match.start() > begin:
                    yield position + begin, data[begin : match.start()]
                begin, last = match.span()[::-1]
            if is_last and begin < len(data):
                yield position + begin, data[begin:]
            # The last separator is kept, because it may continue in the next block.
            data = data[last:]
            position += last
            _check_document_size(data, path, position)


def _pattern(text: str) -> bytes:
    return b"".join(NEWLINE if character == "\n" else re.escape(character.encode()) for character in text)


def _check_document_size(data: bytes, path: str, position: int):
    if len(data) > MAX_LINE_BYTES:
        raise ValueError(
            f"{path} has a document of more than {MAX_LINE_BYTES} bytes, from byte {position} on: give a "
            "--document_separator that occurs in it."
        )


def _read_blocks(path: str, start: int, stop: int, block_bytes: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield the blocks of a range: nominal start, position of the first byte, bytes."""
    with open_bytes(path) as file:
        position = max(0, start - 1)  # of the first byte of `data`: the one before the block, see WHITESPACE
        if position:
            file.seek(position)
        data = b""
        while True:
            end = min(start + block_bytes, stop)
            data += file.read(end + LOOK_AHEAD_BYTES - position - len(data))
            begin = _next_cut(data, start - position) if start else 0
            cut = _next_cut(data, end - position)
            if begin < cut:
                yield start, position + begin, data[begin:cut]
            if end == stop or end - position >= len(data):
                return
            data = data[end - 1 - position :]
            position = end - 1
            start = end


def _next_cut(data: bytes, index: int) -> int:
    """The first index, not before this one, at which the text may be cut; the end of the data if it comes first."""
    stop = index + LOOK_AHEAD_BYTES
    searches = (pattern.search(data, index, stop) for pattern in (BETWEEN_LINES, WHITESPACE, CHARACTER))
    found = next(filter(None, searches), None)
    return found.start() if found else min(stop, len(data))


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


def _end(path: str, stop: int) -> int:
    """`stop`; no limit for a compressed file, whose size says nothing about positions in the decompressed bytes."""
    return sys.maxsize if is_compressed(path) else stop


def _decode_text(data: bytes, position: int, counts: Counter | None, on_bad_line: OnBadLine | None) -> str:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        if on_bad_line is None:
            raise
        text = b"".join(_good_lines(data, position, on_bad_line)).decode()
    if position == 0:
        text = text.removeprefix("\ufeff")  # the byte order mark that Windows' editors put first
    if "\r" in text:
        text = normalize_line_ends(text)
        if counts is not None:
            counts[LINE_ENDS] += 1
    return text


def _good_lines(data: bytes, position: int, on_bad_line: OnBadLine) -> Iterator[bytes]:
    for line in data.splitlines(keepends=True):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            on_bad_line(position + error.start, line[error.start])
        else:
            yield line
        position += len(line)
