"""The `lm-eval` protocol against lm-evaluation-harness itself: tokens, scores and answers of the same model."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from patience import PATIENCE_SECONDS
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_gpt2repro.evaluation.hellaswag.examples import load_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.score import score_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.tokenize import tokenize_example

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
HARNESS = "0.4.13"
# The harness's own task, its process_docs included; only the source of the examples is replaced.
PROGRAM = """
import json, sys
from pathlib import Path
import lm_eval.tasks
from lm_eval.models.huggingface import HFLM
folder, rows, workspace = sys.argv[1:]
harness = Path(lm_eval.tasks.__file__).with_name("hellaswag") / "hellaswag.yaml"
data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": rows}}, "training_split": None}
task = {"include": str(harness), "task": "hellaswag_here", **data}
Path(workspace, "tasks").mkdir()
Path(workspace, "tasks", "here.yaml").write_text(json.dumps(task))  # JSON is YAML, too
model = HFLM(pretrained=folder, trust_remote_code=True, device="cpu", dtype="float32", batch_size=16)
tasks = lm_eval.tasks.TaskManager(include_path=Path(workspace, "tasks"), include_defaults=False)
options = {"tasks": ["hellaswag_here"], "task_manager": tasks, "bootstrap_iters": 0, "log_samples": True}
found = lm_eval.simple_evaluate(model, **options)
samples = [
    {"ind": sample["doc"]["ind"], "scores": [response[0] for response in sample["filtered_resps"]],
     "tokens": [model._encode_pair(*texts) for texts in sample["arguments"]],
     "lengths": [len(ending) for ending in sample["doc"]["choices"]],
     "acc": sample["acc"], "acc_norm": sample["acc_norm"]}
    for sample in found["samples"]["hellaswag_here"]
]
report = {"results": found["results"]["hellaswag_here"], "samples": samples}
Path(workspace, "found.json").write_text(json.dumps(report))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of a fresh virtual environment that has the harness and sees this one's packages."""
    environment = tmp_path_factory.mktemp("harness")
    venv.create(environment, with_pip=True)
    python = environment / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    library = sysconfig.get_path("purelib", vars={"base": str(environment)})
    (Path(library) / "packages_from_here.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([python, "-m", "pip", "install", "-q", f"lm_eval=={HARNESS}"], check=True)
    return python


def run_harness(python: Path, folder: Path, rows: Path, workspace: Path) -> dict:
    """The harness's results for the model in a folder; its own files go into `workspace`."""
    home = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(workspace / "home"),
        "HF_DATASETS_CACHE": str(workspace / "home/datasets"),
    }
    subprocess.run(
        [python, "-I", "-c", PROGRAM, str(folder), str(rows), str(workspace)],
        env={**os.environ, **home},
        cwd=workspace,
        check=True,
        timeout=6 * PATIENCE_SECONDS,
    )
    return json.loads((workspace / "found.json").read_text())


def with_start_of_text(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, but with a token before every text, as Llama's adds."""
    start = tokenizer.eos_token
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.eos_token_id)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=start, eos_token=start)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs ../shared/data: real HellaSwag rows and GPT-2's tokenizer")
@pytest.mark.parametrize(("start_of_text", "count"), [(False, 1000), (True, 100)])
def test_every_token_score_and_answer_is_that_of_lm_evaluation_harness(
    start_of_text, count, python, make_model, tmp_path
):
    tokenizer = AutoTokenizer.from_pretrained(REAL_DATA / "gpt2_tokenizer")
    tokenizer = with_start_of_text(tokenizer) if start_of_text else tokenizer
    model = make_model("ours", len(tokenizer), n_positions=256)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = (REAL_DATA / "hellaswag_val_1000.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(lines[:: len(lines) // count]), encoding="utf-8")
    found = run_harness(python, tmp_path / "model", tmp_path / "rows.jsonl", tmp_path)

    examples = load_hellaswag(str(tmp_path / "rows.jsonl"))
    ours = score_hellaswag(model, tokenizer, examples, ("lm-eval",))
    assert len(found["samples"]) == len(examples) == count
    for example, result, sample in zip(examples, ours, found["samples"], strict=True):
        assert sample["ind"] == example.ind
        continuations = tokenize_example(example, "lm-eval", tokenizer)
        for continuation, (context, ending) in zip(continuations, sample["tokens"], strict=True):
            assert (list(continuation.tokens), continuation.num_scored) == (context + ending, len(ending))
            assert (context[0] == tokenizer.eos_token_id) == start_of_text
        assert list(result.lengths) == sample["lengths"]
        assert result.log_likelihoods == pytest.approx(sample["scores"], rel=1e-5)
        assert (result.correct, result.correct_norm) == (sample["acc"], sample["acc_norm"])
    for name, correct in (("acc", "correct"), ("acc_norm", "correct_norm")):
        share = sum(getattr(result, correct) for result in ours) / count
        assert found["results"][f"{name},none"] == pytest.approx(share)
        assert 0.1 < share < 0.5  # chance is 0.25: there was something to get wrong
