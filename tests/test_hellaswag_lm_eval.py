"""The `lm-eval` protocol against lm-evaluation-harness itself: same model, same rows, the same answer to each."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from modeling_gpt2repro.evaluation.hellaswag import score_hellaswag
from modeling_gpt2repro.evaluation.hellaswag_rows import load_hellaswag

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
HARNESS = "0.4.13"
ROWS = 200  # of them 17 of WikiHow, whose tags the harness removes
# The harness's own task, its process_docs included; only where the rows come from is told.
PROGRAM = """
import json, sys
from pathlib import Path
import lm_eval.tasks
from lm_eval.models.huggingface import HFLM
folder, rows, place = sys.argv[1:]
harness = Path(lm_eval.tasks.__file__).with_name("hellaswag") / "hellaswag.yaml"
data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": rows}}, "training_split": None}
task = {"include": str(harness), "task": "hellaswag_here", **data}
Path(place, "tasks").mkdir()
Path(place, "tasks", "here.yaml").write_text(json.dumps(task))  # JSON is YAML, too
model = HFLM(pretrained=folder, trust_remote_code=True, device="cpu", dtype="float32", batch_size=16)
tasks = lm_eval.tasks.TaskManager(include_path=Path(place, "tasks"), include_defaults=False)
options = {"tasks": ["hellaswag_here"], "task_manager": tasks, "bootstrap_iters": 0, "log_samples": True}
found = lm_eval.simple_evaluate(model, **options)
samples = [
    {"ind": sample["doc"]["ind"], "scores": [response[0] for response in sample["filtered_resps"]],
     "acc": sample["acc"], "acc_norm": sample["acc_norm"]}
    for sample in found["samples"]["hellaswag_here"]
]
told = {"results": found["results"]["hellaswag_here"], "samples": samples}
Path(place, "found.json").write_text(json.dumps(told))
"""


def run_harness(folder: Path, rows: Path, place: Path) -> dict:
    """What the harness says, installed into a fresh virtual environment that sees this one's packages."""
    python = place / "venv" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    venv.create(place / "venv", with_pip=True)
    library = sysconfig.get_path("purelib", vars={"base": str(place / "venv")})
    (Path(library) / "packages_from_here.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([python, "-m", "pip", "install", "-q", f"lm_eval=={HARNESS}"], check=True)
    home = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home"), "HF_DATASETS_CACHE": str(place / "home/datasets")}
    subprocess.run(
        [python, "-I", "-c", PROGRAM, str(folder), str(rows), str(place)],
        env={**os.environ, **home},
        cwd=place,
        check=True,
        timeout=600,
    )
    return json.loads((place / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs ../shared/data: real HellaSwag rows and GPT-2's tokenizer")
def test_every_score_and_answer_is_that_of_lm_evaluation_harness(make_model, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(REAL_DATA / "gpt2_tokenizer")
    model = make_model("ours", len(tokenizer), n_positions=256)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = (REAL_DATA / "hellaswag_val_1000.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:: len(lines) // ROWS]), encoding="utf-8")
    found = run_harness(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path)

    rows = load_hellaswag(str(tmp_path / "rows.jsonl"))
    ours = score_hellaswag(model, tokenizer, rows, ("lm-eval",))
    assert len(found["samples"]) == len(rows) == ROWS
    for row, result, sample in zip(rows, ours, found["samples"], strict=True):
        assert sample["ind"] == row.ind
        assert result.log_likelihoods == pytest.approx(sample["scores"], rel=1e-5)
        assert (result.correct, result.correct_norm) == (sample["acc"], sample["acc_norm"])
    for name, correct in (("acc", "correct"), ("acc_norm", "correct_norm")):
        count = sum(getattr(result, correct) for result in ours)
        assert found["results"][f"{name},none"] == pytest.approx(count / ROWS)
        assert 0.1 < count / ROWS < 0.5  # chance is 0.25: there was something to get wrong
