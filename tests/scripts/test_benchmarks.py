"""The benchmarks run, and what they compare computes the same."""

import io
import json
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest

from benchmarks import harness, hellaswag, prepare, training_step

REPOSITORY = Path(__file__).parents[2]
SHARED = REPOSITORY / "../shared/data"


@pytest.fixture(scope="module")
def benchmark_run(tmp_path_factory) -> tuple[Path, str]:
    """The results file of a toy run, and what it printed. Only the processes that it starts compute anything."""
    output = tmp_path_factory.mktemp("benchmark") / "results" / "training_step.json"
    flags = ["--shape", "toy", "--device", "cpu", "--rounds", "2", "--steps", "2", "--micro_batches", "2"]
    flags += ["--against", "stock", "lecture", "trainer", "--output", str(output)]
    with redirect_stdout(io.StringIO()) as printed:
        training_step.main(flags)
    return output, printed.getvalue()


def test_our_step_and_those_of_others_have_the_same_losses(benchmark_run):
    [result] = json.loads(benchmark_run[0].read_text())
    ours = result["losses"].pop("ours")
    assert len(ours) == 2 + 2 * 2  # warm-up, rounds x steps
    assert len(set(ours)) == len(ours)  # every step has its own sequences
    assert ours[0] - ours[-1] > 0.1  # which teach so much that a step without an update would show
    assert result["losses"].keys() == {"stock", "lecture", "trainer"}
    for losses in result["losses"].values():
        np.testing.assert_allclose(losses, ours, rtol=0, atol=1e-5)
    differences = [np.abs(np.subtract(ours, losses)).max() for losses in result["losses"].values()]
    assert result["largest_loss_difference"] == max(differences)


def test_a_step_that_computes_something_else_ends_the_benchmark():
    assert training_step.compare_losses([8.0, 7.5], [8.0, 7.50005], "stock", "fp32") == pytest.approx(5e-5)
    for losses, dtype in (([8.0, 7.502], "fp32"), ([8.0, 7.52], "bf16"), ([8.0, float("nan")], "bf16")):
        with pytest.raises(SystemExit, match=r"stock computes something else: its losses are up to .* nothing was"):
            training_step.compare_losses([8.0, 7.5], losses, "stock", dtype)


def test_training_step_benchmark_writes_the_sources_of_its_figures(benchmark_run):
    output, printed = benchmark_run
    [result] = json.loads(output.read_text())
    assert result["command"].startswith("python -m benchmarks.training_step --shape toy --device cpu")
    assert result["settings"]["shape"] == "toy"
    assert result["settings"]["micro_batches"] == 2
    assert {"cpu", "threads", "system", "load_average_before"} <= set(result["machine"])
    assert set(result["versions"]) == {"python", "torch", "transformers", "accelerate", "numpy"}
    for side in ("ours", "stock", "lecture", "trainer"):
        assert result["step_seconds"][side] > 0
        assert result["peak_memory_bytes"][side] > 0
    # Two layers, 64 wide, and 512 ids; without the position embedding.
    parameters = 2 * (12 * 64**2 + 13 * 64) + 512 * 64 + 2 * 64
    assert result["flops"]["per_step"] == (6 * parameters + 12 * 2 * 64 * 64) * 2 * 2 * 64
    for peer in ("stock", "lecture", "trainer"):
        for ratio in result[f"{peer}_over_ours"].values():
            assert 0 < ratio["lower_quartile"] <= ratio["median"] <= ratio["upper_quartile"]
        assert f"ours is {result[f'{peer}_over_ours']['seconds']['median']:.3f} times as fast as {peer}" in printed


def test_a_side_whose_process_dies_ends_the_benchmark_in_one_sentence():
    sentence = r"a process of the benchmark \(exit 3\) died: see its error above\."
    with harness.kept_process(sys.exit, 3) as call, pytest.raises(SystemExit, match=sentence):
        call()


def result_of(benchmark: str, dtype: str, speed: int) -> dict:
    command = f"python -m benchmarks.{benchmark} --dtype {dtype}"
    return {"command": command, "settings": {"dtype": dtype}, "machine": {}, "versions": {}, "speed": speed}


def test_a_results_file_keeps_the_latest_result_of_each_benchmark_and_setting(tmp_path):
    file = tmp_path / "results.json"
    for dtype, speed in (("fp32", 1), ("bf16", 2), ("fp32", 3)):
        harness.add_to_file(file, result_of("rows", dtype, speed))
    harness.add_to_file(file, result_of("prepare", "fp32", 4))
    assert [result["speed"] for result in json.loads(file.read_text())] == [2, 3, 4]


@pytest.mark.parametrize("text", ["[", '{"a": 1}', '[{"command": "python"}]', "[1]"])
def test_a_damaged_results_file_is_left_as_it_is(text, tmp_path):
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"results.json is not a list of results .*: delete it, or give another"):
        harness.add_to_file(file, result_of("rows", "fp32", 1))
    assert file.read_text() == text


@pytest.mark.skipif(not SHARED.is_dir(), reason="GPT-2's vocabulary is not in ../shared/data")
@pytest.mark.slow
def test_prepare_benchmark_compares_the_same_tokens_and_writes_the_sources_of_its_figures(tmp_path):
    shutil.copytree(SHARED / "tiktoken_cache", tmp_path / "tiktoken")  # tiktoken deletes what it finds damaged
    flags = ["--megabytes", "0.4", "--large_megabytes", "0", "--workers", "1", "--rounds", "1"]
    command = [sys.executable, "-m", "benchmarks.prepare", *flags, "--output", str(tmp_path / "prepare.json")]
    environment = os.environ | {"TIKTOKEN_CACHE_DIR": str(tmp_path / "tiktoken")}
    ran = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    [result] = json.loads((tmp_path / "prepare.json").read_text())
    assert result["command"].startswith("python -m benchmarks.prepare --megabytes 0.4")
    found = result["workers"]["1"]
    assert 0.4e6 / 6 < found["tokens"] < 0.4e6 / 2  # both made so many, or it would have failed
    assert set(found["tokens_per"]["seconds"]) == {"ours", "lecture"}
    assert [peak["megabytes"] for peak in result["peak_memory_bytes"]] == [0.2, 0.4]
    for peak in result["peak_memory_bytes"]:
        for side in ("ours", "lecture"):
            assert 10e6 < peak["parent"][side] <= peak["all_processes"][side]
    assert f"with 1 worker(s) ours is {found['lecture_over_ours']['seconds']['median']:.3f} times as fast" in ran.stdout


def test_the_file_of_the_prepare_benchmark_is_like_those_of_fineweb_edu(tmp_path):
    file = prepare.make_parquet(tmp_path / "a.parquet", 0.5, "The sea is cold.\n\nThe café, too. " * 400)
    table = pq.read_table(file)
    metadata = pq.read_metadata(file)
    named = "text id dump url file_path language language_score token_count score int_score"
    assert table.column_names == named.split()
    texts = table["text"].to_pylist()
    assert 0.45e6 < sum(len(text.encode()) for text in texts) < 0.55e6
    assert all(3_000 <= len(text) <= 5_000 for text in texts)
    assert len(set(table["id"].to_pylist())) == len(texts)
    assert metadata.num_row_groups >= 4


def runs_of(seconds, cpu_seconds, tokens=1_000):
    return [prepare.Run(s, c, tokens, 0, 0) for s, c in zip(seconds, cpu_seconds, strict=True)]


def test_start_up_is_subtracted_from_both_sides():
    runs = {
        ("ours", 2, "start-up"): runs_of([2, 2, 8], [1, 1, 1]),
        ("ours", 2, "file"): runs_of([4, 5, 3], [2, 2, 2]),
        ("lecture", 2, "start-up"): runs_of([1, 1, 1], [1, 1, 1]),
        ("lecture", 2, "file"): runs_of([5, 10, 7], [3, 4, 5]),
    }
    found = prepare.summary(runs, 2)
    assert found["start_up_seconds"] == {"ours": 2, "lecture": 1}
    assert found["tokens_per"]["seconds"] == {"ours": 250, "lecture": 1_000 / 7}
    assert found["lecture_over_ours"]["seconds"]["median"] == 2  # of 5/4, 10/5, 7/3
    assert found["lecture_over_ours"]["seconds_after_start_up"]["median"] == 3  # of 4/2, 9/3, 6/1
    assert found["lecture_over_ours"]["cpu_seconds"]["median"] == 2
    runs["ours", 2, "file"] = runs_of([2, 2, 2], [2, 2, 2])  # nothing but start-up
    assert "seconds_after_start_up" not in prepare.summary(runs, 2)["lecture_over_ours"]


def test_a_comparison_of_unequal_token_counts_is_refused():
    with pytest.raises(ValueError, match=r"did not make the same number of tokens: \[999, 1000\]\."):
        prepare.compare_tokens(runs_of([1, 1], [1, 1]) + runs_of([1], [1], tokens=999))


def test_memory_is_counted_alone_and_with_children():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        parent, everyone = prepare.resident(psutil.Process())
        child.stdin.close()
    assert 1e6 < parent < everyone


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_hellaswag_benchmark_compares_the_same_predictions(kind, hellaswag_tokenizer, hellaswag_rows, tmp_path, capsys):
    hellaswag_tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [
        hellaswag_rows[number] for number in (0,) * 6 + (1,) * 3 + (3,) * 3
    ]  # those that the lecture's loop can take
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(asdict(row)) for row in rows))
    flags = ["--shape", "toy", "--kind", kind, "--rows", "6", "--rounds", "2", "--batch_tokens", "64"]
    flags += ["--device", "cpu", "--tokenizer", str(tmp_path / "tokenizer"), "--data", str(tmp_path / "rows.jsonl")]
    hellaswag.main([*flags, "--output", str(tmp_path / "results.json")])
    [result] = json.loads((tmp_path / "results.json").read_text())
    assert result["command"].startswith(f"python -m benchmarks.hellaswag --shape toy --kind {kind}")
    assert result["answers"]["same_acc"] == result["answers"]["same_acc_norm"] == 6
    assert result["answers"]["largest_relative_difference"] < 1e-5
    drawn = [rows[number] for number in (0, 2, 4, 6, 8, 10)]

    def ids(text):
        return hellaswag_tokenizer(text)["input_ids"]

    endings = [[ids(f" {ending}") for ending in row.endings] for row in drawn]
    padded = sum(4 * (len(ids(row.ctx)) + max(map(len, of_row))) for row, of_row in zip(drawn, endings, strict=True))
    assert result["positions"]["lecture"] == {"blocks": padded, "head": padded}
    # The context's last place predicts the first token of all four endings at once.
    assert result["positions"]["ours"]["head"] == sum(1 + sum(len(e) - 1 for e in of_row) for of_row in endings)
    assert result["positions"]["ours"]["blocks"] < padded
    for ratio in result["lecture_over_ours"].values():
        assert 0 < ratio["lower_quartile"] <= ratio["median"] <= ratio["upper_quartile"]
    assert f"ours is {result['lecture_over_ours']['seconds']['median']:.3f} times as fast" in capsys.readouterr().out


def test_scorers_that_disagree_are_refused_in_fp32_only():
    scores = np.array([[-1.0, -2.0, -3.0, -4.0], [-4.0, -3.9, -2.0, -9.0]])
    lengths = np.array([[1, 4, 1, 1], [1, 1, 1, 9]])
    agree = hellaswag.compare_answers({"ours": (scores, lengths), "lecture": (scores, lengths)}, exact=True)
    assert agree == {"same_acc": 2, "same_acc_norm": 2, "largest_relative_difference": 0}
    other = {"ours": (scores, lengths), "lecture": (scores[:, [1, 0, 2, 3]], lengths)}
    with pytest.raises(
        ValueError, match=r"agree on 1 \(acc\) and 2 \(acc_norm\) of 2 predictions, with scores 1.0e\+00 apart"
    ):
        hellaswag.compare_answers(other, exact=True)
    assert hellaswag.compare_answers(other, exact=False)["same_acc"] == 1
    apart = {"ours": (scores, lengths), "lecture": (scores * (1 + 2e-4), lengths)}
    with pytest.raises(ValueError, match=r"on 2 .* 2 .* 2 predictions, with scores 2.0e-04 apart"):
        hellaswag.compare_answers(apart, exact=True)
