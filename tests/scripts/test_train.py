"""train_accelerate.py as a whole, against a plain loop around stock GPT-2 and against itself."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from clean_process import run_without_package
from keyed_order import shuffled_epoch
from patience import PATIENCE_SECONDS
from torch import nn
from toy_runs import (
    CPU_FP32,
    ROOT,
    SCRIPT,
    SEQUENCES_PER_STEP,
    SHAPE,
    STEPS,
    TOKENS_PER_STEP,
    as_flags,
    logged_values,
    toy_flags,
    train,
    train_here,
)

from modeling_gpt2repro.pretrain import open_data


def plain_start(shards: Path) -> tuple[nn.Module, np.ndarray, list[int]]:
    """Stock GPT-2 with the weights that the script starts from, all sequences, and the order they come in."""
    from transformers import GPT2Config, GPT2LMHeadModel

    from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

    torch.manual_seed(SHAPE["seed"])  # the weights that the script starts from
    shape = {"vocab_size": 300, "n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 32}
    start = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=0, eos_token_id=0)).state_dict()
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    start = {name: weight.t() if name.endswith(conv1d) else weight for name, weight in start.items()}
    model = GPT2LMHeadModel(GPT2Config(**shape, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    model.load_state_dict(start)

    ids = np.concatenate([np.load(path) for path in sorted(shards.glob("train_*.npy"))]).astype(np.int64)
    sequences = np.stack([ids[i : i + 33] for i in range(0, len(ids) - 32, 32)])
    order = [index for epoch in range(10) for index in shuffled_epoch(len(sequences), [SHAPE["seed"], epoch])]
    return model, sequences, order


def plain_losses(shards: Path) -> list[float]:
    """The same training with stock GPT-2 in a plain loop: none of our training code, none of our data code."""
    model, sequences, order = plain_start(shards)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.9, 0.95), eps=1e-8
    )
    losses = []
    for step in range(STEPS):
        learning_rate = 1e-2 * (step + 1) / 5
        if step >= 5:
            learning_rate = 1e-3 + 0.5 * (1e-2 - 1e-3) * (1 + math.cos(math.pi * (step - 5) / (STEPS - 5)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        batch = torch.from_numpy(sequences[order[step * SEQUENCES_PER_STEP : (step + 1) * SEQUENCES_PER_STEP]])
        logits = model(batch[:, :-1]).logits
        loss = nn.functional.cross_entropy(logits.reshape(-1, 300), batch[:, 1:].reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_losses_equal_those_of_a_plain_loop_around_stock_gpt2(finished, shards):
    losses = logged_values(finished[0])
    expected = plain_losses(shards)
    assert len(losses) == STEPS
    assert expected[0] == pytest.approx(math.log(300), abs=0.1)
    assert expected[-1] < expected[0] - 1
    assert losses == pytest.approx(expected, abs=1e-5)


def test_all_files_of_a_run_have_the_same_permissions(finished):
    files = [path for path in finished[0].rglob("*") if path.is_file()]
    modes = {path.relative_to(finished[0]).as_posix(): oct(path.stat().st_mode) for path in files}
    assert set(modes.values()) == {modes["run.json"]}, modes


def assert_equal_curves(run, other):
    hellaswag = ("hellaswag_completion_acc_norm", "hellaswag_lm_eval_acc")
    for name in ("loss", "grad_norm", "validation_loss", *hellaswag):
        assert logged_values(run, name) == pytest.approx(logged_values(other, name), abs=1e-5), name


def test_three_processes_equal_one(finished, shards, warm_python, tmp_path):
    """8 sequences a step: three micro-batches of one on each process, the last of which is empty on the third."""
    flags = toy_flags(tmp_path / "run", shards, per_device_train_batch_size=1)
    first, *others = warm_python.run_together(3, SCRIPT, *flags, **CPU_FP32)
    assert "3 processes x 3 micro-batches x 1 sequence x 32 tokens, less 1 sequence left empty" in first.stdout
    assert [process.stdout for process in others] == ["", ""]
    assert_equal_curves(tmp_path / "run", finished[0])


@pytest.mark.slow
def test_two_processes_of_torchs_launcher_equal_one(finished, shards, tmp_path):
    result = train(tmp_path / "run", shards, processes=2, per_device_train_batch_size=3)
    assert "2 processes x 2 micro-batches x 2 sequences x 32 tokens\n" in result.stdout
    assert_equal_curves(tmp_path / "run", finished[0])


@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_micro_batch_does_not_change_the_curve(finished, shards, tmp_path, size):
    assert train_here(tmp_path / "run", shards, per_device_train_batch_size=size, eval_steps=0, num_samples=0) == 0
    assert logged_values(tmp_path / "run") == pytest.approx(logged_values(finished[0]), abs=1e-5)


def test_stop_and_resume_equal_never_stopped(finished, shards, tmp_path, capsys):
    # As if it had been killed after step 20: the later checkpoint is gone, but the log reaches step 30.
    shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("step-000030", "model"))
    assert train_here(tmp_path / "run", shards, resume_from_checkpoint="latest") == 0
    assert "resuming from step 20" in capsys.readouterr().out
    assert logged_values(tmp_path / "run") == logged_values(finished[0])
    expected = (finished[0] / "model/model.safetensors").read_bytes()
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == expected


def test_a_run_that_began_in_the_order_of_older_versions_keeps_it(finished, shards, tmp_path):
    short = {"hellaswag": "none", "eval_steps": 0, "num_samples": 0}
    with patch.object(open_data, "data_order", return_value="argsort"):
        assert train_here(tmp_path / "run", shards, **short) == 0
    never_stopped = logged_values(tmp_path / "run")
    assert never_stopped != logged_values(finished[0])
    for step in (10, 20, 30):  # as older versions wrote it
        state = json.loads((tmp_path / f"run/step-{step:06}/training_state/state.json").read_text())
        assert set(state["identity"]) == {"data", "block_size", "rows_per_step", "seed"}
    shutil.rmtree(tmp_path / "run" / "step-000030")
    assert train_here(tmp_path / "run", shards, resume_from_checkpoint="latest", **short) == 0
    assert logged_values(tmp_path / "run") == never_stopped


def test_with_the_document_mask_the_loss_is_that_of_each_document_alone(shards, tmp_path):
    one_step = {"train_tokens": TOKENS_PER_STEP, "warmup_tokens": 0, "eval_steps": 0, "num_samples": 0}
    assert train_here(tmp_path / "run", shards, document_mask=True, hellaswag="none", **one_step) == 0
    model, sequences, order = plain_start(shards)
    losses = []
    for sequence in torch.from_numpy(sequences[order[:SEQUENCES_PER_STEP]]):
        starts = [0, *(n for n in range(1, 32) if sequence[n] == 0), 32]
        for first, last in pairwise(starts):
            logits = model(sequence[None, first:last]).logits[0]
            losses.append(nn.functional.cross_entropy(logits, sequence[first + 1 : last + 1], reduction="sum"))
    assert len(losses) > SEQUENCES_PER_STEP
    assert logged_values(tmp_path / "run", "loss")[0] == pytest.approx(sum(losses).item() / (TOKENS_PER_STEP), abs=1e-5)
    assert 0 < logged_values(tmp_path / "run", "data_seconds")[0] < logged_values(tmp_path / "run", "step_seconds")[0]


def test_training_starts_from_the_weights_of_init_from(finished, shards, tmp_path):
    from modeling_gpt2repro.hub.conversion import main as convert

    convert(["--from", str(finished[0] / "model"), "--to", str(tmp_path / "stock")])
    short = {
        "train_tokens": 2 * TOKENS_PER_STEP,
        "warmup_tokens": 0,
        "learning_rate": 1e-4,
        "eval_steps": 0,
        "num_samples": 0,
        "save_steps": 1,
        "hellaswag": "none",
    }
    card = tmp_path / "stock" / "README.md"
    card.write_text(card.read_text().replace("license: mit", "license: cc0-1.0\nbase_model: toy/base"))
    assert train_here(tmp_path / "run", shards, init_from=tmp_path / "stock", **short) == 0
    last = logged_values(finished[0], "validation_loss")[-1]
    assert logged_values(tmp_path / "run", "validation_loss")[0] == pytest.approx(last, abs=1e-5)
    shutil.rmtree(tmp_path / "stock")  # a resumed run knows from its checkpoint where the weights came from
    for folder in ("step-000002", "model"):
        card = (tmp_path / "run" / folder / "README.md").read_text()
        assert "license: cc0-1.0\n" in card
        assert "base_model: toy/base\n" in card
        assert "A GPT-2 fine-tuned from stock." in card
        shutil.rmtree(tmp_path / "run" / folder)
    assert train_here(tmp_path / "run", shards, resume_from_checkpoint="latest", **short) == 0
    again = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "more in 1 step undone by a resume from an earlier checkpoint |\n" in again
    time_row = re.compile(r"^\| time \|.*$", re.MULTILINE)
    assert time_row.sub("", again) == time_row.sub("", card)


def test_a_run_writes_the_files_and_numbers_that_it_prints(finished):
    output_dir, printed = finished
    names = {path.name for path in output_dir.iterdir()}
    assert names == {
        "run.json",
        "metrics.jsonl",
        "samples.jsonl",
        "hellaswag.jsonl",
        "baselines.json",
        "loss.png",
        "model",
        "step-000010",
        "step-000020",
        "step-000030",
    }
    assert (output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "guessing evenly, ln(vocabulary) 5.70" in printed
    assert re.search(r"HellaSwag: completion_acc 0\.\d{4} \[0\.\d{4}, 0\.\d{4}\], .* s of it\)", printed)
    assert f"model={(output_dir / 'model').as_posix()!r}, trust_remote_code=True" in printed
    validation = logged_values(output_dir, "validation_loss")
    assert len(validation) == 4  # steps 0, 10, 20 and, on the saved weights, 30
    assert validation[-1] < validation[0] - 1
    assert set(logged_values(output_dir, "validation_tokens")) == {320}
    assert all(round(7 * acc, 6).is_integer() for acc in logged_values(output_dir, "hellaswag_completion_acc"))


def test_saved_folders_generate_in_a_clean_process_without_our_package(finished, tmp_path):
    program = """
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
for number, folder in enumerate(sys.argv[2:]):
    talk = pipeline("text-generation", model=folder, trust_remote_code=True)
    print(repr(talk("the cat", max_new_tokens=8, do_sample=False)[0]["generated_text"]))
    print(type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__)
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert again.lm_head.weight is again.transformer.wte.weight
    again.save_pretrained(f"{sys.argv[1]}/{number}")
    print(type(AutoModelForCausalLM.from_pretrained(f"{sys.argv[1]}/{number}", trust_remote_code=True)).__name__)
"""
    folders = [finished[0] / "model", finished[0] / "step-000020"]
    for folder in folders:
        assert {path.name for path in folder.glob("*.py")} == {"configuration_gpt2repro.py", "modeling_gpt2repro.py"}
    lines = run_without_package(program, tmp_path, *folders, cwd=tmp_path).splitlines()
    assert lines[1:3] == lines[4:6] == ["GPT2ReproModel", "GPT2ReproForCausalLM"]
    for text in (lines[0], lines[3]):
        assert text.startswith("'the cat")
        assert len(text) > len("'the cat'")


def test_the_quickstart_needs_nothing_but_python(tmp_path):
    short = {"train_tokens": 30 * 1792, "warmup_tokens": 5 * 1792, "eval_steps": 0, "sample_tokens": 5}
    short["eval_tokens"] = 8960
    flags = as_flags({"preset": "quickstart", "output_dir": tmp_path / "run", **short})
    result = subprocess.run(
        [sys.executable, str(ROOT / "train_accelerate.py"), *flags],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"run", "home"}
    losses = logged_values(tmp_path / "run")
    assert losses[0] == pytest.approx(math.log(1536), abs=0.1)
    assert losses[-1] < losses[0] - 1
    assert len(logged_values(tmp_path / "run", "validation_bits_per_byte")) == 2


def test_a_stream_from_the_hub_resumes_with_the_very_next_sequence(shards, hub, warm_python, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = (shards.parent / "prose.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    table = pa.table({"text": texts, "id": [f"doc-{i}" for i in range(len(texts))]})
    pq.write_table(table, hub.new_repository("datasets/toy/prose") / "train.parquet", row_group_size=8)
    stream = {"dataset_name": "toy/prose", "tokenizer": shards / "tokenizer", "train_tokens": 12 * TOKENS_PER_STEP}
    stream |= {"save_steps": 5, "eval_steps": 0, "num_samples": 0}
    command = [SCRIPT, *toy_flags(tmp_path / "one", None, **stream)]
    warm_python.run(*command, **CPU_FP32)
    never_stopped = logged_values(tmp_path / "one")
    shutil.rmtree(tmp_path / "one" / "step-000012")
    shutil.rmtree(tmp_path / "one" / "step-000010")
    resumed = warm_python.run(*command, "--resume_from_checkpoint", "latest", **CPU_FP32)
    assert "resuming from step 5" in resumed.stdout
    assert logged_values(tmp_path / "one") == never_stopped


@pytest.mark.slow
def test_processes_agree_to_leave_out_hellaswag_if_it_cannot_be_reached(shards, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = train(tmp_path / "two", shards, processes=2, per_device_train_batch_size=2, hellaswag="Rowan/hellaswag")
    assert "HellaSwag is left out" in result.stdout
    assert (tmp_path / "two" / "model").is_dir()
