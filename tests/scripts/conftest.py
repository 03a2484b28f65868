"""What the tests of prepare_data.py begin with."""

import pytest


@pytest.fixture
def tokenizer_folder(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny")
