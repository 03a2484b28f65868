"""`--attn_implementation auto`: what a run takes, what it says, and what a resumed run takes."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from toy_runs import CPU_FP32, train_here

from modeling_gpt2repro.pretrain.attention import attention_record, choose_attention, set_attention
from modeling_gpt2repro.runtime import attention
from modeling_gpt2repro.storage.checksums import write_checksums
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.checkpoint_checks import CHECKSUMS_FILE, STATE_FILE

HERE = attention.device_kind(torch.device("cpu"))
TOY = {"device": HERE, "dtype": "fp32", "compiled": False, "head_size": 16, "length": 32}  # of a toy run on this CPU


@pytest.fixture(autouse=True)
def measured(tmp_path, monkeypatch):
    """measured("eager", "sdpa"): on this machine, for toy runs, eager was faster than sdpa; nothing at the start."""
    monkeypatch.setattr(attention, "TABLE_FILE", tmp_path / "attention.json")

    def write(*fastest_first, **other):
        attention.TABLE_FILE.write_text(json.dumps([TOY | {"fastest_first": fastest_first} | other]))

    return write


@pytest.fixture
def accelerator():
    """One process, as far as the choice looks at it."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        mixed_precision="no",
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=SimpleNamespace(value="NO"))),
        is_main_process=True,
        print=print,
    )


CONFIG = SimpleNamespace(n_embd=32, n_head=2)


def choice(accelerator, checkpoint=None, **flags):
    return choose_attention(TrainArguments(block_size=32, **flags), accelerator, CONFIG, checkpoint)


def with_record(checkpoint, folder, record):
    """A copy of the checkpoint whose state holds this record; None: none, as in older versions."""
    shutil.copytree(checkpoint, folder)
    state = json.loads((folder / STATE_FILE).read_text())
    state |= {"attention": record}
    if record is None:
        del state["attention"]
    (folder / STATE_FILE).write_text(json.dumps(state))
    write_checksums(folder, CHECKSUMS_FILE)
    return folder


def test_what_nobody_measured_is_left_to_sdpa(accelerator, measured):
    reason = f"because nothing was measured for {HERE}, fp32, not compiled, heads of 16 channels, 32 tokens"
    assert choice(accelerator) == ("sdpa", reason)
    measured("eager", "sdpa", device="cpu of another kind")
    assert choice(accelerator) == ("sdpa", reason)


def test_the_fastest_one_that_is_here_is_taken(accelerator, measured):
    measured("flash_attention_2", "eager", "sdpa")  # the first is not installed
    name, reason = choice(accelerator)
    assert name == "eager"
    assert reason.startswith(f"the fastest that was measured for {HERE}, fp32")


def test_the_choice_follows_precision_and_compilation(accelerator, measured):
    measured("eager", "sdpa", dtype="bf16", compiled=True)
    assert choice(accelerator)[0] == "sdpa"
    accelerator.mixed_precision = "bf16"
    assert choice(accelerator)[0] == "sdpa"
    accelerator.state.dynamo_plugin.backend.value = "INDUCTOR"
    assert choice(accelerator)[0] == "eager"


def test_a_document_mask_and_determinism_on_a_gpu_take_sdpa(accelerator, measured, monkeypatch):
    measured("eager", "sdpa")
    assert choice(accelerator, document_mask=True) == ("sdpa", "because of --document_mask")
    measured("eager", "sdpa", device="mps")
    accelerator.device = torch.device("mps")
    assert choice(accelerator)[0] == "eager"
    assert choice(accelerator, deterministic=True) == ("sdpa", "because of --deterministic")


def test_a_resume_takes_the_recorded_one_whatever_is_measured_since(accelerator, measured, finished, tmp_path):
    checkpoint = with_record(finished[0] / "step-000010", tmp_path / "step-000010", TOY | {"implementation": "eager"})
    measured("sdpa")
    assert choice(accelerator, checkpoint) == ("eager", "as in step-000010")


@pytest.mark.parametrize("other", [{"device": "cuda sm_90"}, {"dtype": "bf16"}, {"compiled": True}])
def test_a_checkpoint_of_another_device_or_precision_takes_what_is_fastest_here(accelerator, finished, tmp_path, other):
    record = TOY | {"implementation": "eager"} | other
    checkpoint = with_record(finished[0] / "step-000010", tmp_path / "step-000010", record)
    name, reason = choice(accelerator, checkpoint)
    assert name == "sdpa"
    assert reason.startswith("because nothing was measured for")


def test_a_checkpoint_of_an_older_version_continues_with_sdpa(accelerator, measured, finished, tmp_path):
    measured("eager", "sdpa")
    checkpoint = with_record(finished[0] / "step-000010", tmp_path / "step-000010", None)
    assert choice(accelerator, checkpoint) == ("sdpa", "because step-000010 does not name another one")


def test_a_recorded_kernel_that_is_not_installed_is_not_taken(accelerator, finished, tmp_path):
    record = TOY | {"implementation": "flash_attention_2"}
    checkpoint = with_record(finished[0] / "step-000010", tmp_path / "step-000010", record)
    assert choice(accelerator, checkpoint)[0] == "sdpa"


def test_a_record_of_a_strangers_kernel_is_damage(accelerator, finished, tmp_path):
    record = TOY | {"implementation": "stranger/kernels"}
    checkpoint = with_record(finished[0] / "step-000010", tmp_path / "step-000010", record)
    with pytest.raises(ValueError, match=r"is damaged \(training_state/state.json: attention is 'stranger/kernels'\)"):
        choice(accelerator, checkpoint)


def test_a_flag_wins_without_a_word(accelerator, measured, tiny_model):
    measured("eager", "sdpa")
    args = TrainArguments(block_size=32, attn_implementation="sdpa")
    assert set_attention(args, accelerator, tiny_model, None) is None
    assert tiny_model.config._attn_implementation == args.attn_implementation == "sdpa"


def test_cudnn_first_is_sdpa_whose_kernels_stay_in_that_order(accelerator, tiny_model, monkeypatch):
    entered = []
    monkeypatch.setattr("atexit.register", entered.append)
    args = TrainArguments(block_size=32)
    args.attn_implementation = "sdpa_cudnn"
    set_attention(args, accelerator, tiny_model, None)
    try:
        assert tiny_model.config._attn_implementation == "sdpa"
        assert attention_record(args, accelerator, CONFIG)["implementation"] == "sdpa_cudnn"
        first = torch.nn.attention._cur_sdpa_kernel_backends(with_priority=True)[0]
        assert first == torch.nn.attention.SDPBackend.CUDNN_ATTENTION
    finally:
        [leave] = entered
        leave()


def test_an_unknown_name_is_refused_in_one_sentence(shards, tmp_path, capsys):
    assert train_here(tmp_path / "run", shards, attn_implementation="fastest") == 2
    error = capsys.readouterr().err
    assert "attn_implementation (fastest) must be one of auto, eager, sdpa, flash_attention_2, " in error
    assert not (tmp_path / "run").exists()


def test_a_run_says_and_records_what_it_took_and_continues_with_it(shards, measured, tmp_path, capsys):
    run = tmp_path / "run"
    short = {"eval_steps": 0, "num_samples": 0, "hellaswag": "none", "save_steps": 0}
    measured("eager", "sdpa")
    assert train_here(run, shards, **short, train_tokens=256) == 0
    output = capsys.readouterr().out
    assert f"attention    eager, the fastest that was measured for {HERE}, fp32, not compiled" in output
    assert "attention: eager, compile" in output
    record = json.loads((run / "run.json").read_text())
    assert record["arguments"]["attn_implementation"] == "eager"
    assert record["attention"] == TOY | {"implementation": "eager"}
    assert json.loads((run / "step-000001" / STATE_FILE).read_text())["attention"] == record["attention"]
    for folder in ("model", "step-000001"):  # which may be loaded anywhere
        assert "attn" not in (run / folder / "config.json").read_text()
    measured("sdpa")
    assert train_here(run, shards, **short, train_tokens=512, resume_from_checkpoint="latest") == 0
    output = capsys.readouterr().out
    assert "attention    eager, as in step-000001" in output
    assert "attention: eager, compile" in output
    assert "attn_implementation" not in output  # nothing has changed


PROGRAM = """
import os, sys
from pathlib import Path
from modeling_gpt2repro.runtime import attention
attention.TABLE_FILE = Path(sys.argv.pop(1)) / (os.environ["RANK"] + ".json")
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.pretrain.attention import set_attention
from modeling_gpt2repro.runtime.accelerator import build_accelerator
from modeling_gpt2repro.training.arguments import TrainArguments
accelerator = build_accelerator(num_processes=2)
model = GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=1, n_embd=32, n_head=2))
print(set_attention(TrainArguments(block_size=32), accelerator, model, None))
print("took", model.config._attn_implementation)
accelerator.end_training()
"""


@pytest.mark.parametrize(
    ("tables", "taken"), [((["eager", "sdpa"], ["eager", "sdpa"]), "eager"), ((["eager", "sdpa"], ["sdpa"]), "sdpa")]
)
def test_two_processes_take_the_same(warm_python, tmp_path, tables, taken):
    for rank, names in enumerate(tables):
        (tmp_path / f"{rank}.json").write_text(json.dumps([TOY | {"fastest_first": names}]))
    both = warm_python.run_together(2, "-c", PROGRAM, tmp_path, **CPU_FP32)
    assert [f"took {taken}\n" in process.stdout for process in both] == [True, True]
    assert ("because the processes have different devices or packages" in both[0].stdout) == (taken == "sdpa")
