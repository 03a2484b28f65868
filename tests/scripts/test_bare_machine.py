"""A rented GPU machine often has torch, transformers and accelerate, and no network to install the rest.

Training, HellaSwag, conversion and preparing local files do without the packages that `tests/support/bare_machine`
hides, and every benchmark can be imported. What needs one of them says so before it starts.
"""

import json
import os
import subprocess
import sys

import pytest
from patience import PATIENCE_SECONDS
from toy_runs import CPU_FP32, ROOT, toy_flags

HIDING = str(ROOT / "tests" / "support" / "bare_machine")
# The modules whose purpose is one of the hidden packages.
NOT_THERE = ("modeling_gpt2repro.data.prepare.cluster", "modeling_gpt2repro.evaluation.hellaswag.evaluate_metric")
# Imports all that is named in argv[1], then runs {name: [module, *flags]} of argv[2], and prints exit codes and stderr.
PROGRAM = """
import contextlib, importlib, io, json, sys
from modeling_gpt2repro.data.sources import resolve, stories
few = [stories.write_story(number) for number in range(600)]  # which are tokenized in a second
few = [resolve.Document(f"story:{story.combination}", story.text) for story in few]
resolve.BUILT_IN_TEXTS["stories"] = lambda: few
for module in json.loads(sys.argv[1]):
    importlib.import_module(module)
ended = {}
for name, (module, *flags) in json.loads(sys.argv[2]).items():
    sys.argv[0] = module
    with contextlib.redirect_stderr(io.StringIO()) as errors, contextlib.redirect_stdout(sys.stderr):
        try:
            importlib.import_module(module).main(flags)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    ended[name] = (code, errors.getvalue())
print(json.dumps(ended))
"""


@pytest.fixture
def run_on_bare_machine(hub, tmp_path):
    """run_on_bare_machine(modules, programs) -> (exit code, stderr) of each program, in one process."""

    def run(modules: list[str], programs: dict[str, list]) -> dict[str, list]:
        path = os.pathsep.join([HIDING, str(ROOT)])
        words = [json.dumps(modules), json.dumps(programs, default=str)]
        result = subprocess.run(
            [sys.executable, "-c", PROGRAM, *words],
            env=hub.environment(tmp_path / "home") | CPU_FP32 | {"PYTHONPATH": path},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout.splitlines()[-1])

    return run


def test_scripts_and_benchmarks_run_without_packages_that_a_bare_machine_lacks(
    run_on_bare_machine, shards, hub, tmp_path
):
    files = [
        path.relative_to(ROOT)
        for folder in ("modeling_gpt2repro", "benchmarks")
        for path in ROOT.glob(f"{folder}/**/*.py")
    ]
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files]
    examples = shards.parent / "hellaswag.jsonl"
    prose = shards.parent / "prose.jsonl"
    (hub.new_repository("datasets/ns/open") / "prose.jsonl").write_bytes(prose.read_bytes())
    model = tmp_path / "run" / "model"
    on_stories = {"dataset_name": "stories", "tokenizer_vocab_size": 600, "block_size": 512, "validation_share": 0.1}
    steps = {"train_tokens": 2048, "tokens_per_step": 1024, "per_device_train_batch_size": 2, "warmup_tokens": 0}
    steps |= {"eval_steps": 1, "save_steps": 0}
    without_hellaswag = [
        word for word in toy_flags(tmp_path / "other", shards) if word not in ("--hellaswag", str(examples))
    ]
    scores = ["--model", model, "--device", "cpu"]
    prepared = ["--output_dir", tmp_path / "prepared"]
    slurm = ["--executor", "slurm", "--slurm_partition", "cpu", "--dry_run"]
    programs = {
        "training": ["train_accelerate", *toy_flags(tmp_path / "run", None, **on_stories, **steps, hellaswag=examples)],
        "hellaswag": ["eval_hellaswag", *scores, "--data", examples, "--output", tmp_path / "scores.json"],
        "stock": ["modeling_gpt2repro.hub.conversion", "--from", model, "--to", tmp_path / "stock"],
        "ours": ["modeling_gpt2repro.hub.conversion", "--from", tmp_path / "stock", "--to", tmp_path / "ours"],
        "preparing": ["prepare_data", *prepared, "--train_files", prose, "--tokenizer", "train", "--vocab_size", "300"],
        "slurm": ["prepare_data", "--output_dir", tmp_path / "more", "--train_files", prose, *slurm],
        "HellaSwag of the Hub": ["eval_hellaswag", *scores],
        "training with it": ["train_accelerate", *without_hellaswag],
        "data of the Hub": ["prepare_data", "--output_dir", tmp_path / "more", "--dataset_name", "ns/open"],
        "prepare benchmark": ["benchmarks.prepare"],
    }
    ended = run_on_bare_machine([name for name in modules if name not in NOT_THERE], programs)
    does_without = list(programs)[:5]
    for name in does_without:
        assert ended[name][0] == 0, ended[name]
    for name in ended.keys() - set(does_without):
        code, errors = ended[name]
        package = "datatrove" if name == "slurm" else "datasets"
        assert code == 2, (name, errors)
        assert len(errors.splitlines()) == 1, (name, errors)
        assert f"needs the package {package}" in errors, name
        assert f"pip install {package}" in errors, name


@pytest.mark.slow
def test_the_tests_are_collected_on_a_bare_machine():
    """With one import of a missing package, `pytest -m gpu` runs nothing."""
    environment = {**os.environ, "PYTHONPATH": HIDING}
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "gpu"]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert result.returncode == 0, result.stdout
