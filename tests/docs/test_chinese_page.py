"""docs/zh.md has the chapters of docs/lecture.md: the same times, in the same order, leading to the same headings."""

import re

from markdown_pages import ROOT


def chapters_of(page: str) -> list[tuple[str, str]]:
    """The video's second and the heading of each row: ("827", "the-network")."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^\| \[[\d:]+\]\(\S+&t=(\d+)s\) \| \[.*?\]\((?:lecture\.md)?#([\w-]+)\)", text, re.MULTILINE)


def test_the_chinese_page_has_every_chapter_of_the_lecture():
    assert len(chapters_of("lecture.md")) > 25
    assert chapters_of("zh.md") == chapters_of("lecture.md")
