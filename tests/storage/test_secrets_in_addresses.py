"""Addresses in messages, logs and cards have no signature and no password."""

import pytest

from modeling_gpt2repro.storage.retry import without_signatures


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("503 for url 'https://s3/x?Signature=secret'", "503 for url 'https://s3/x'"),
        ("pushed to https://me:secret@mirror:8080/a/b", "pushed to https://mirror:8080/a/b"),
        ("(https://secret@mirror?x=secret)", "(https://mirror)"),
        ("http://me:sec@ret@mirror and https://me:secret@other", "http://mirror and https://other"),
        ("https://mirror/owner/name@main", "https://mirror/owner/name@main"),
    ],
)
def test_what_gives_access_is_left_out(text, shown):
    assert without_signatures(text) == shown
