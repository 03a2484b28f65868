"""What several tests of preparing data begin with."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preparing import contents

import prepare_data


@pytest.fixture(scope="module")
def texts(tmp_path_factory, tiny_texts, tiny_tokenizer):
    """Arguments for a parquet file of 5 row groups and the tiny tokenizer; and the bytes that they become."""
    folder = tmp_path_factory.mktemp("texts")
    table = pa.table({"text": [*tiny_texts[:197], "", " \n", None], "id": [f"urn:{i}" for i in range(200)]})
    pq.write_table(table, folder / "texts.parquet", row_group_size=40)
    tiny_tokenizer.save_pretrained(folder / "tiny")
    arguments = ["--train_files", str(folder / "texts.parquet"), "--tokenizer", str(folder / "tiny")]
    arguments += ["--validation_share", "0.2", "--shard_tokens", "8000", "--workers", "1"]
    prepare_data.main(["--output_dir", str(folder / "undisturbed"), *arguments])
    return arguments, contents(folder / "undisturbed")
