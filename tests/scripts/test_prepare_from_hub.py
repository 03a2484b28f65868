"""prepare_data.py and streams on the loopback Hub, in a process of their own."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback_hub import LFS_BYTES
from patience import PATIENCE_SECONDS

import prepare_data
from modeling_gpt2repro.data.prepare.token_cache import finished_partitions
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.sources.hub_rows import _rows
from modeling_gpt2repro.storage import hub_files

REPOSITORY = Path(__file__).parents[2]


FILES = ["sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet"]

# The Hub's client would retry for 23 seconds by itself; here it gives up at once, and our own pauses take no time.
IMPATIENT = """
import functools
from types import SimpleNamespace
import huggingface_hub.hf_file_system as hub
from modeling_gpt2repro.storage import hub_files
hub.http_backoff = functools.partial(hub.http_backoff, max_retries=0)
now = [0.0]
hub_files.time = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds))
"""

PREPARE = """
import sys
import prepare_data
prepare_data.main(sys.argv[1:])
"""
SCRIPT = REPOSITORY / "prepare_data.py"

# Streams in one process and in two, and prints the rows.
STREAM = """
import json
import sys
from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.data.sources.resolve import hub_source
from modeling_gpt2repro.data.tokenizer import load_tokenizer
from modeling_gpt2repro.data.batches.build import build_streamed_data

source, tokenizer = hub_source("ns/fineweb", "sample-10BT"), load_tokenizer(sys.argv[1])
rows, validation = {}, {}
for processes in (1, 2):
    parts, validation[processes] = [], 0
    for process in range(processes):
        data = build_streamed_data(source, tokenizer, BatchConfig(32, 8, 2, 1, process, processes), 0.1, 1000)
        batches = [batch["input_ids"] for step in range(3) for batch in data.batches.micro_batches(step)]
        parts.append([row for batch in batches for row in batch.tolist()])
        validation[processes] += sum(len(batch["input_ids"]) for batch in data.validation_batches(1000, 4))
        data.batches.close()
    rows[processes] = [row for together in zip(*parts, strict=True) for row in together]
print(json.dumps({"rows": rows, "summary": data.summary, "identity": data.data_fingerprint, "validation": validation}))
"""


@pytest.fixture
def fineweb(hub, tiny_texts):
    """A dataset like FineWeb-Edu: two parquet files of four row groups, mostly columns that are not read."""
    folder = hub.new_repository("datasets/ns/fineweb")
    random = Random(1)
    (folder / "sample/10BT").mkdir(parents=True)
    for number, name in enumerate(FILES):
        texts = tiny_texts[100 * number :][:100] * 4
        columns = {
            "text": [f"{text} {random.random()}" for text in texts],
            "id": [f"<urn:uuid:{number}-{row}>" for row in range(400)],
            "dump": ["CC-MAIN-2024-10"] * 400,
            "url": ["https://example.org/" + random.randbytes(2000).hex() for _ in texts],
            "token_count": [len(text) // 4 for text in texts],
        }
        pq.write_table(pa.table(columns), folder / name, row_group_size=100, compression="zstd")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n    path: sample/10BT/*\n"
        "---\n# FineWeb\n"
    )
    return folder


def hub_arguments(out, tokenizer_folder, *more):
    dataset = ["--dataset_name", "ns/fineweb", "--dataset_config_name", "sample-10BT", "--validation_share", "0.1"]
    return ["--output_dir", out, *dataset, "--tokenizer", tokenizer_folder, "--workers", "1", *more]


def local_shards(out, fineweb, tokenizer_folder):
    files = ["--train_files", str(fineweb / "sample/10BT/*.parquet")]
    options = ["--tokenizer", tokenizer_folder, "--validation_share", "0.1"]
    prepare_data.main(["--output_dir", str(out), *files, *options])
    return open_shards(out)


def test_a_hub_dataset_becomes_the_shards_of_its_files_and_only_two_columns_are_downloaded(
    tmp_path, hub, warm_python, fineweb, tokenizer_folder
):
    seen = len(hub.log())
    warm_python.run(SCRIPT, *hub_arguments(tmp_path / "out", tokenizer_folder))
    shards = open_shards(tmp_path / "out")
    assert shards.fingerprint == local_shards(tmp_path / "local", fineweb, tokenizer_folder).fingerprint
    source = shards.manifest["source"]
    assert len(source.pop("revision")) == 40
    assert source == {
        "dataset": "ns/fineweb", "config": "sample-10BT", "split": "train", "files": 2, "text_column": "text"
    }  # fmt: skip

    for name in FILES:
        asked = [line for line in hub.log()[seen:] if line["origin"] == "cdn" and line["path"].endswith(name)]
        assert len(asked) == 5  # the footer, and one range for text and id of each row group
        spans = [tuple(map(int, line["range"].removeprefix("bytes=").split("-"))) for line in asked]
        downloaded = sum(last - first + 1 for first, last in spans)
        metadata = pq.read_metadata(fineweb / name)
        size = (fineweb / name).stat().st_size
        columns = sum(metadata.row_group(g).column(c).total_compressed_size for g in range(4) for c in (0, 1))
        assert columns < downloaded < columns + 2**16 + 1_000  # the reader's guess at a footer is 64 KiB
        assert downloaded < size / 5


def test_a_busy_hub_is_retried(tmp_path, hub, warm_python, fineweb, tokenizer_folder):
    """Errors that the client raises at once and errors that it retries: refused, rate limit, truncated, dropped."""
    first, second = (f"GET /lfs/.*{name}" for name in FILES)
    rules = [
        {"match": "GET /api/datasets/ns/fineweb", "status": 503, "times": 1},
        {"match": "GET /datasets/.*parquet", "status": 429, "headers": {"Retry-After": "0"}, "times": 1},
        {"match": first, "drop": 700, "times": 1},  # the footer
        {"match": second, "drop": 10**9, "times": 1},  # the footer, whole
        {"match": second, "drop": 700, "times": 1},  # a row group
        {"match": second, "drop": 0, "times": 1},
    ]
    with hub.faults(*rules):
        warm_python.run("-c", IMPATIENT + PREPARE, *hub_arguments(tmp_path / "out", tokenizer_folder))
    local = local_shards(tmp_path / "local", fineweb, tokenizer_folder)
    assert open_shards(tmp_path / "out").fingerprint == local.fingerprint


def test_an_unreachable_hub_is_reported_with_the_partition_and_finished_ones_are_not_read_again(
    tmp_path, hub, warm_python, fineweb, tokenizer_folder
):
    second = f"GET /lfs/.*{FILES[1]}"
    rules = [
        {"match": second, "drop": 10**9, "times": 1},  # the footer, whole
        {"match": second, "status": 503, "times": 2},
        {"match": second, "drop": 700},
    ]
    impatient = "from modeling_gpt2repro.storage import hub_files\nhub_files.READ_PATIENCE_SECONDS = 3.5\n"
    with hub.faults(*rules):
        program = IMPATIENT + impatient + PREPARE
        done = warm_python.run("-c", program, *hub_arguments(tmp_path / "out", tokenizer_folder), check=False)
    assert done.returncode == 2
    message = done.stderr.splitlines()[-1]
    assert "row group 0 of hf://datasets/ns/fineweb@" in message
    assert f"{FILES[1]}: the Hub did not answer for 4 s (" in message
    assert "Traceback" not in done.stderr
    assert sorted(finished_partitions(tmp_path / "out")) == [0, 1, 2, 3]

    seen = len(hub.log())
    warm_python.run(SCRIPT, *hub_arguments(tmp_path / "out", tokenizer_folder), "--workers", "2")
    asked = [line["path"] for line in hub.log()[seen:] if line["origin"] == "cdn"]
    assert sum(path.endswith(FILES[0]) for path in asked) == 1  # the footer
    local = local_shards(tmp_path / "local", fineweb, tokenizer_folder)
    assert open_shards(tmp_path / "out").fingerprint == local.fingerprint


def test_a_stream_from_the_hub_gives_the_same_rows_to_one_process_and_to_two(warm_python, fineweb, tokenizer_folder):
    answer = json.loads(warm_python.run("-c", STREAM, tokenizer_folder).stdout)
    assert answer["rows"]["1"] == answer["rows"]["2"]
    assert len(answer["rows"]["1"]) == 24
    assert answer["summary"] == "ns/fineweb, streamed: 7 partitions in 4 logical shards"
    assert answer["validation"] == {"1": 1000 // 32, "2": 1000 // 32}
    assert len(answer["identity"]["data"]["revision"]) == 40


def test_what_the_hub_does_not_have_is_one_sentence(hub, warm_python, fineweb):
    (hub.new_repository("datasets/ns/csv") / "train.csv").write_text("body\nthe sea\n")
    code = """
import sys
from modeling_gpt2repro.data.sources.resolve import hub_source
for names in (("ns/nothing", None), ("ns/fineweb", "sample-1T"), ("ns/fineweb", "sample-10BT", "test"),
              ("ns/fineweb", "sample-10BT", "train", "v9"), ("ns/csv",)):
    try:
        hub_source(*names)
    except ValueError as error:
        print(error)
"""
    lines = warm_python.run("-c", code).stdout.splitlines()
    assert [line.split(" does not open: ")[0] for line in lines] == [
        "the Hub's dataset ns/nothing",
        "the Hub's dataset ns/fineweb (sample-1T)",
        *["the Hub's dataset ns/fineweb (sample-10BT)"] * 2,
        "the Hub's dataset ns/csv",
    ]
    assert lines[0].endswith("there is none of this name, or it is private: then log in with hf auth login.")
    assert "sample-10BT" in lines[1]
    assert lines[2].endswith("it has no split 'test', but train.")
    assert lines[3].endswith("it has no revision 'v9'.")
    assert lines[4].endswith("it has no text column 'text'; it has body: name one by --text_column.")


def test_a_hub_dataset_that_is_not_parquet_gives_the_same_ids_as_its_files(
    tmp_path, hub, warm_python, tiny_texts, tokenizer_folder
):
    folder = hub.new_repository("datasets/ns/lines")
    for number in range(3):
        rows = [{"id": f"{number}-{row}", "text": text, "more": row} for row, text in enumerate(tiny_texts[:60])]
        rows[7]["text"] = "" if number else "  "
        (folder / f"train-{number}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = ["--tokenizer", tokenizer_folder, "--validation_share", "0.2"]
    hub_options = ["--dataset_name", "ns/lines", "--workers", "1", "--output_dir", tmp_path / "hub"]
    warm_python.run(SCRIPT, *hub_options, *options)
    prepare_data.main(["--output_dir", str(tmp_path / "local"), "--train_files", f"{folder}/*.jsonl", *options])
    from_hub = open_shards(tmp_path / "hub")
    local = open_shards(tmp_path / "local")
    assert from_hub.fingerprint == local.fingerprint
    assert from_hub.manifest["skipped"] == local.manifest["skipped"] == {"empty": 2, "whitespace": 1}
    assert local.manifest["splits"]["validation"]["documents"] > 10


# Reads a partition of each data set undisturbed, and again as a worker that has just started, while the Hub fails.
READ_AGAIN = """
import sys
from pathlib import Path
from huggingface_hub import HfFileSystem
from modeling_gpt2repro.data.sources.resolve import hub_source
for name, config in (("ns/fineweb", "sample-10BT"), ("ns/lines", None)):
    source = hub_source(name, config)
    documents = list(source.read(source.partitions[1]))
    HfFileSystem.clear_instance_cache()
    Path(sys.argv[1] + ".new").write_text(sys.argv[2])
    Path(sys.argv[1] + ".new").replace(sys.argv[1])
    print(len(documents), list(source.read(source.partitions[1])) == documents)
    Path(sys.argv[1]).unlink()
"""


def test_a_refusal_of_what_was_opened_before_is_asked_again(hub, warm_python, fineweb, tiny_texts):
    lines = hub.new_repository("datasets/ns/lines")
    for number in range(2):
        (lines / f"{number}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in tiny_texts[:30]))
    missing = {"X-Error-Code": "RepoNotFound"}  # which the client remembers
    rules = [
        {"match": "GET /api/datasets/ns/fineweb", "status": 404, "headers": missing, "times": 1},
        {"match": "GET /lfs/.*parquet", "status": 403, "times": 2},
        {"match": "GET /datasets/.*parquet", "status": 404, "times": 1},
        {"match": "GET /datasets/.*jsonl", "status": 403, "times": 2},
        {"match": "GET /datasets/.*jsonl", "status": 404, "times": 1},
    ]
    seen = len(hub.log())
    done = warm_python.run("-c", IMPATIENT + READ_AGAIN, hub.root / "faults.json", json.dumps(rules))
    assert done.stdout.splitlines() == ["100 True", "30 True"]
    refused = [line["path"] for line in hub.log()[seen:] if line["status"] in (401, 403, 404)]
    assert sum("parquet" in path for path in refused) == 3
    assert sum("jsonl" in path for path in refused) == 3
    assert sum(path.startswith("/api/datasets/ns/fineweb") for path in refused) == 1


# Opens a data set while the Hub fails.
OPEN = """
import sys
from modeling_gpt2repro.data.sources.resolve import hub_source
print(len(hub_source(sys.argv[1], sys.argv[2] or None).partitions))
"""


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_data_host_that_refuses_from_the_beginning_is_named(hub, warm_python, fineweb, tiny_texts, kind):
    """The Hub itself has found the file, so it is no wrong name: it is asked for again, but not for minutes."""
    if kind == "jsonl":
        lines = hub.new_repository("datasets/ns/large-lines")
        for number in range(2):
            line = json.dumps({"text": tiny_texts[number]}) + "\n"
            (lines / f"{number}.jsonl").write_text(line * (LFS_BYTES // len(line) + 1))
    words = ["ns/large-lines", ""] if kind == "jsonl" else ["ns/fineweb", "sample-10BT"]
    with hub.faults({"match": "GET /lfs/", "status": 403, "times": 4}):
        warm_python.run("-c", IMPATIENT + OPEN, *words)
    with hub.faults({"match": "GET /lfs/", "status": 403}):
        done = warm_python.run("-c", IMPATIENT + OPEN, *words, check=False)
    message = done.stderr.splitlines()[-1]
    assert f"ValueError: the Hub's dataset {words[0]}" in message
    assert "does not open: localhost answered 403 Forbidden to http://127.0.0.1:" in message
    assert message.endswith(", 5 times: the Hub has the file, so it may be a firewall that refuses this host.")
    assert "?" not in message  # the signature of the address
    with hub.faults({"match": "GET /datasets/.*(parquet|jsonl)", "status": 403}):  # the Hub's own answer
        done = warm_python.run("-c", IMPATIENT + OPEN, *words, check=False)
    assert "times" not in done.stderr.splitlines()[-1]


def test_rows_that_were_read_before_a_refusal_are_not_given_twice(monkeypatch):
    class Shard:
        opened = 0

        def __iter__(self):
            self.opened += 1
            for number in range(6):
                if number == 2 * self.opened:
                    raise FileNotFoundError("part.jsonl")
                yield {"text": number}

    monkeypatch.setattr(hub_files.time, "sleep", lambda seconds: None)
    shard = Shard()
    assert [row["text"] for row in _rows(shard, "part.jsonl", lambda reason: None)] == [0, 1, 2, 3, 4, 5]
    assert shard.opened == 3


# Pauses take no time; their seconds are printed.
COUNT_PAUSES = """
import sys
import time

import prepare_data

seconds = []
time.sleep = seconds.append
try:
    prepare_data.main(sys.argv[1:])
finally:
    print(sum(seconds))
"""


def test_no_network_is_one_sentence_within_seconds(tmp_path, hub, tokenizer_folder):
    arguments = map(str, hub_arguments(tmp_path / "out", tokenizer_folder))
    environment = hub.environment(tmp_path / "home") | {"HF_ENDPOINT": "http://127.0.0.1:9"}  # nothing listens
    done = subprocess.run(
        [sys.executable, "-c", COUNT_PAUSES, *arguments],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert done.returncode == 2
    assert float(done.stdout.splitlines()[-1]) < 15
    assert "the Hub cannot be reached for ns/fineweb (sample-10BT)" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").iterdir()) == []
