"""Programs may run unattended: they never run somebody else's code, nor ask; and they say when a login is needed."""

import json
import shutil

import pytest
from toy_runs import CPU_FP32

# Runs each program of argv[1], {name: [module, *flags]}, with an endless yes as its input.
PROGRAM = """
import importlib, io, json, sys, traceback
for name, (module, *flags) in json.loads(sys.argv[1]).items():
    sys.stdin = io.StringIO("y\\n" * 1000)
    sys.argv = [module]
    print(f"== {name}", file=sys.stderr)
    try:
        importlib.import_module(module).main(flags)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    print(f"exit code {code}", file=sys.stderr)
"""
CODE = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
Path({marker!r}).touch()
class Config(GPT2ReproConfig):
    model_type = "unknown"
class Model(GPT2ReproForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def programs(hub, shards, tmp_path):
    """programs(source) -> every program and flag that takes a model or tokenizer, as flags."""
    shutil.copy(shards.parent / "prose.jsonl", hub.new_repository("datasets/ns/open"))

    def with_source(source: str) -> dict[str, list[str]]:
        train = ["train_accelerate", "--hellaswag", "none", "--output_dir", str(tmp_path / "run")]
        text = str(shards.parent / "prose.jsonl")
        prepare = ["prepare_data", "--output_dir", str(tmp_path / "prepared"), "--train_files", text]
        examples = str(shards.parent / "hellaswag.jsonl")
        validation = "modeling_gpt2repro.evaluation.validation"
        return {
            "init_from": [*train, "--shards", str(shards), "--init_from", source],
            "train's tokenizer": [*train, "--dataset_name", "ns/open", "--tokenizer", source],
            "prepare's tokenizer": [*prepare, "--tokenizer", source],
            "conversion": ["modeling_gpt2repro.hub.conversion", "--to", str(tmp_path / "new"), "--from", source],
            "hellaswag": ["eval_hellaswag", "--data", examples, "--device", "cpu", "--model", source],
            "validation": [validation, "--shards", str(shards), "--device", "cpu", "--model", source],
        }

    return with_source


@pytest.fixture
def run_programs(warm_python, tmp_path):
    """run_programs(programs, **environment) -> exit code and the lines on stderr, by name."""

    def run(programs: dict[str, list[str]]) -> dict[str, tuple[str, list[str]]]:
        done = warm_python.run("-c", PROGRAM, json.dumps(programs), cwd=tmp_path, **CPU_FP32)
        assert "y/N" not in done.stdout + done.stderr
        ended = {}
        for part in done.stderr.split("== ")[1:]:
            name, *lines = [
                line for line in part.splitlines() if line and "it/s]" not in line and "reading" not in line
            ]
            ended[name] = (lines[-1].removeprefix("exit code "), lines[:-1])
        assert ended.keys() == programs.keys()
        return ended

    return run


def test_no_program_runs_the_code_of_a_folder_or_asks(finished, programs, run_programs, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(finished[0] / "model", folder)
    (folder / "code.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "unknown", "auto_map": auto_map}))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    commands = programs(str(folder))
    for name, (code, lines) in run_programs(commands).items():
        assert code == "2", lines
        assert len(lines) == 1, lines
        assert str(folder) in lines[0], name
    assert not (tmp_path / "marker").exists()
    trusting = {"trusted": [*commands["validation"], "--trust_remote_code"]}
    code, lines = run_programs(trusting)["trusted"]
    assert code == "0", lines
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("answer", ["missing", "gated"])
def test_a_repository_that_needs_a_login_is_refused_with_the_command_for_it(
    hub, shards, programs, run_programs, tmp_path, answer
):
    train = ["train_accelerate", "--hellaswag", "none", "--output_dir", str(tmp_path / "run")]
    prepare = ["prepare_data", "--output_dir", str(tmp_path / "prepared")]
    commands = {
        **programs("ns/locked"),
        "resume": [*train, "--shards", str(shards), "--resume_from_checkpoint", "ns/locked@main"],
        "train's data": [*train, "--dataset_name", "ns/locked"],
        "prepare's data": [*prepare, "--dataset_name", "ns/locked"],
    }
    gate = {"status": 403, "headers": {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}}
    with hub.faults(*([{"match": "ns/locked", **gate}] if answer == "gated" else [])):
        ended = run_programs(commands)
    for name, (code, lines) in ended.items():
        assert code == "2", (name, lines)
        assert len(lines) == 1, (name, lines)
        assert "hf auth login" in lines[0], (name, lines)
        assert "ns/locked" in lines[0], (name, lines)
