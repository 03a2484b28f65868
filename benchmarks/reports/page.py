"""A table in a page of the documentation, between two lines that mark its place."""

from pathlib import Path

from modeling_gpt2repro.storage.atomic import atomic_write

Markers = tuple[str, str]  # the line before and the beginning of the line after


def split_page(page: Path, markers: Markers) -> tuple[str, str]:
    """What a page has before the table and after it.

    Raises:
        ValueError: If there is no such page, or the table's place is not marked.
    """
    if not page.is_file():
        raise ValueError(f"there is no page {page}: give a Markdown file that marks the table's place.")
    text = page.read_text(encoding="utf-8")
    first = text.find(markers[0])
    last = text.find(markers[1], first)
    if not 0 <= first < last:
        raise ValueError(f"{page} has no place for the table: add the lines {' and '.join(map(str.strip, markers))}.")
    return text[: first + len(markers[0])], text[last:]


def write_into_page(page: Path, markers: Markers, text: str):
    """Put `text` between the markers, in place of what is there."""
    before, after = split_page(page, markers)
    with atomic_write(page) as file:
        file.write((before + text + after).encode())
