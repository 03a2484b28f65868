"""benchmarks/on_gpu.sh: what is interrupted loses nothing, what fails stops nothing, and its parts run on little.

pytest -m slow tests/scripts/test_on_gpu.py     # the toy plan, without the packages that a bare machine lacks
"""

import json
import math
import os
import subprocess
import sys

import psutil
import pytest
from patience import PATIENCE_SECONDS, wait_until
from toy_runs import ROOT

from benchmarks import generated_data, on_gpu, speed_ladder, training_run
from benchmarks.on_gpu import Part, Results, run_part, run_parts
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.evaluation.hellaswag.examples import load_hellaswag

HIDING = ROOT / "tests" / "support" / "bare_machine"
FOREVER = "tail -f /dev/null"


def test_a_part_that_fails_is_recorded_with_its_output_and_the_others_run(tmp_path):
    parts = [
        Part("good", 1, "echo '[7]' > {result} && echo fine"),
        Part("bad", 1, "echo what was wrong >&2; exit 3"),
        Part("same python", 1, "python -c 'import sys; print(sys.executable)'"),
    ]
    results = Results(tmp_path / "out" / "results.json")
    assert run_parts(parts, results, math.inf, tmp_path / "work") == 0
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [records[part.name]["status"] for part in parts] == ["done", "failed", "done"]
    assert records["good"]["result"] == [7]
    assert records["good"]["output"] == "fine\n"
    assert records["bad"]["exit_code"] == 3
    assert records["bad"]["output"] == "what was wrong\n"
    assert records["same python"]["output"] == f"{sys.executable}\n"
    assert "what was wrong" in (tmp_path / "out" / "results.log").read_text()
    assert run_parts(parts, Results(results.path), math.inf, tmp_path / "work") == 0  # nothing is run again
    assert json.loads(results.path.read_text()) == records


def test_a_call_runs_what_fits_and_at_least_one_part(tmp_path):
    parts = [Part("long", 1000, "true"), Part("short", 1, "true"), Part("longer", 2000, "true")]
    results = Results(tmp_path / "results.json")
    assert run_parts(parts, results, on_gpu.RESERVE_SECONDS + 500, tmp_path) == 1  # `long` is given less time
    assert list(results.records) == ["long", "short"]
    assert run_parts(parts, results, on_gpu.RESERVE_SECONDS - 1, tmp_path) == 1  # no time for anything
    assert run_parts(parts, results, on_gpu.RESERVE_SECONDS + 500, tmp_path) == 0
    assert results.records["longer"]["status"] == "done"


def test_a_part_out_of_time_is_ended_with_all_that_it_started_and_tried_once_more(tmp_path):
    part = Part("slow", 1, f"echo '[1]' > {{result}}; sh -c 'echo $$; {FOREVER}; true'")
    results = Results(tmp_path / "results.json")
    run_part(part, results, seconds=2, work_dir=tmp_path)
    assert results.records["slow"]["status"] == "out of time"
    assert results.records["slow"]["result"] == [1]  # what it had written is kept
    assert not psutil.pid_exists(int(results.records["slow"]["output"].split()[0]))
    assert results.pending([part, Part("next", 1, "")]) == [Part("next", 1, ""), part]
    run_part(part, results, seconds=0.1, work_dir=tmp_path)
    assert results.pending([part]) == []


def test_a_killed_call_loses_no_result_and_the_next_one_goes_to_the_next_part(tmp_path, warm_python):
    parts = [Part("first", 1, "true"), Part("second", 9, FOREVER), Part("third", 1, "true")]
    file = tmp_path / "results.json"
    program = f"""
from pathlib import Path
from benchmarks.on_gpu import Part, Results, run_parts
run_parts({parts!r}, Results(Path({str(file)!r})), float("inf"), Path({str(tmp_path)!r}))
"""
    with warm_python.start("-c", program) as (process, _):
        wait_until(lambda: file.exists() and "second" in json.loads(file.read_text()))
        wait_until(psutil.Process(process.pid).children)
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for part in started:
            part.kill()
    results = Results(file)
    assert [results.records[name]["status"] for name in ("first", "second")] == ["done", "interrupted"]
    assert [part.name for part in results.pending(parts)] == ["third", "second"]


def test_a_damaged_results_file_is_one_sentence_and_stays(tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"training": ')
    with pytest.raises(SystemExit) as end:
        on_gpu.main(["--plan", "toy", "--results", str(tmp_path / "results.json")])
    assert end.value.code == 2
    assert "give another --results, or delete it." in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == '{"training": '


def test_a_part_can_be_asked_for_again_by_its_name_only(tmp_path, capsys):
    with pytest.raises(SystemExit):
        on_gpu.main(["--parts", "trainin", "--results", str(tmp_path / "results.json")])
    assert "there is no part trainin; there are environment, tests, training," in capsys.readouterr().err


def test_generated_shards_have_the_stated_entropy_and_a_vocabulary_of_any_size(tmp_path):
    tokenizer = generated_data.generated_tokenizer(1000)
    generated_data.write_shards(tmp_path, tokenizer, tokens=200_000)
    dataset = open_shards(tmp_path)
    assert len(dataset.tokenizer) == 1000
    [ids] = dataset.shards("train")
    assert len(ids) == 200_000
    first, second = ids.reshape(-1, 2).T
    assert all(len(set(second[first == i])) == 1 for i in range(50))  # the second of a pair follows from the first
    counts = sorted((first == i).sum() for i in range(999))[::-1]
    shares = [count / 100_000 for count in counts if count]
    entropy = -sum(share * math.log(share) for share in shares)
    assert dataset.manifest["source"]["floor"] == pytest.approx(entropy / 2, abs=0.01)


def test_generated_examples_have_hellaswags_number_and_lengths(tmp_path):
    examples = generated_data.generated_examples(10_042)
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, examples)))
    assert len(load_hellaswag(str(tmp_path / "a.jsonl"))) == 10_042
    tokenizer = generated_data.generated_tokenizer(300)
    for part, context, ending in ((examples[:1000], 24.5, 13.6), (examples[-1000:], 65.3, 40.3)):  # HellaSwag's means
        contexts = [len(ids) for ids in tokenizer([example["ctx"] for example in part])["input_ids"]]
        endings = [len(ids) for ids in tokenizer([f" {example['endings'][0]}" for example in part])["input_ids"]]
        assert sum(contexts) / len(contexts) == pytest.approx(context, rel=0.1)
        assert sum(endings) / len(endings) == pytest.approx(ending, rel=0.1)


def test_a_runs_summary_leaves_the_first_steps_out():
    speeds = [(step, 1000.0 if step <= training_run.WARMUP_STEPS else 10.0 * step) for step in range(1, 16)]
    records = [
        {"step": step, "loss": 9 - step / 5, "step_seconds": 1 / speed, "tokens_per_second": speed, "data_seconds": 0}
        | {"peak_memory_gb": step}
        for step, speed in speeds
    ]
    found = training_run.summary(records)
    assert found["tokens_per_second"] == 130  # of 110, 120, ... 150
    assert (found["first_loss"], found["last_loss"]) == (8.8, 6.0)
    with pytest.raises(ValueError, match=r"logged 10 steps, .* 10 are not timed"):
        training_run.summary(records[:10])


@pytest.mark.slow
def test_the_toy_plan_runs_without_the_packages_that_a_bare_machine_lacks(tmp_path):
    results = tmp_path / "results.json"
    words = ["--plan", "toy", "--results", str(results), "--work_dir", str(tmp_path), "--seconds", "100000"]
    environment = os.environ | {"PYTHONPATH": str(HIDING), "PYTHON": sys.executable}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    hidden = subprocess.run([sys.executable, "-c", "import datasets"], env=environment, capture_output=True, text=True)
    assert "ModuleNotFoundError" in hidden.stderr  # else nothing would be shown
    script = ROOT / "benchmarks" / "on_gpu.sh"
    ran = subprocess.run(["bash", str(script), *words], env=environment, timeout=9 * PATIENCE_SECONDS, check=False)
    assert ran.returncode == 0
    records = json.loads(results.read_text())
    wrong = {name: record["output"] for name, record in records.items() if record["status"] != "done"}
    assert not wrong, "\n".join(f"{name}:\n{output}" for name, output in wrong.items())
    assert records.keys() == {part.name for part in on_gpu.toy_plan()}
    [training] = records["training"]["result"]
    assert training["last_loss"] < training["first_loss"] - training_run.SMALLEST_FALL


def test_a_folder_that_cannot_be_written_or_a_page_that_is_not_there_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    inside = str(tmp_path / "file" / "folder")
    page = str(tmp_path / "page.md")
    for main, flag, value, sentence in [
        (on_gpu.main, "--results", f"{inside}/r.json", f"results ({inside}) cannot be written (Not a directory)"),
        (on_gpu.main, "--work_dir", inside, f"work_dir ({inside}) cannot be written (Not a directory)"),
        (generated_data.main, "--output_dir", inside, f"output_dir ({inside}) cannot be written (Not a directory)"),
        (speed_ladder.main, "--page", page, f"there is no page {page}: give a Markdown file"),
    ]:
        extra = ["--results", str(tmp_path / "r.json")] if flag == "--work_dir" else []
        with pytest.raises(SystemExit) as end:
            main([flag, value, *extra])
        assert end.value.code == 2
        printed = capsys.readouterr().err.strip()
        assert sentence in printed
        assert len(printed.splitlines()) == 1
