"""Inputs that train_accelerate.py refuses, with which message, and what it then leaves untouched."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toy_runs import (
    CPU_FP32,
    RECIPE,
    SCRIPT,
    SEQUENCES_PER_STEP,
    TOKENS_PER_STEP,
    as_flags,
    logged_values,
    toy_flags,
    train_here,
)

import train_accelerate
from modeling_gpt2repro.runtime.accelerator import check_num_processes
from modeling_gpt2repro.storage.checksums import write_checksums
from modeling_gpt2repro.training.checkpoints import CHECKSUMS_FILE


def test_a_resumed_run_reports_changed_arguments(finished, shards, tmp_path, capsys):
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "step-000030")
    overrides = {"learning_rate": 0.005, "eval_steps": 0, "hellaswag": "none"}
    assert train_here(tmp_path / "run", shards, resume_from_checkpoint="latest", **overrides) == 0
    assert "This run began with learning_rate 0.01 and continues with 0.005." in capsys.readouterr().out
    events = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    changed = next(row["changed"] for row in events if row.get("event") == "resume")
    assert changed["learning_rate"] == [0.01, 0.005]
    assert changed["hellaswag"] == ["hellaswag.jsonl", "none"]  # its folder is left out: the file is published


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_says_so_and_is_left_as_it_is(finished, shards, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    before = contents(run)
    assert train_here(run, shards, resume_from_checkpoint="latest", learning_rate=0.005) == 0
    assert capsys.readouterr().out == (
        f"{run} is finished, and nothing is left to do: its model was trained for 30 steps; to train it longer, resume "
        "with --train_tokens 7936 or more.\n"
    )
    assert contents(run) == before


@pytest.mark.parametrize("interrupted", ["before the model", "at an earlier end of the run"])
def test_a_run_whose_export_was_interrupted_is_finished_with_the_values_it_had(finished, shards, tmp_path, interrupted):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    shutil.rmtree(run / "model")
    if interrupted != "before the model":
        assert train_here(tmp_path / "short", shards, train_tokens=20 * TOKENS_PER_STEP, num_samples=0) == 0
        shutil.copytree(tmp_path / "short" / "model", run / "model")
    assert train_here(run, shards, resume_from_checkpoint="latest", learning_rate=0.005) == 0
    weights = (finished[0] / "model" / "model.safetensors").read_bytes()
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    card = (run / "model" / "README.md").read_text()
    assert "| learning rate | 0.01 after 1,280 tokens of warm-up" in card
    assert "0.005" not in card


def test_a_finished_run_is_exported_again_if_its_model_is_of_later_steps_or_lacks_hellaswag(finished, shards, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    again = {"resume_from_checkpoint": "latest", "num_samples": 0}
    longer = {"train_tokens": 40 * TOKENS_PER_STEP, "eval_steps": 10}
    assert train_here(run, shards, **again, **longer) == 0
    shutil.move(run / "step-000040", tmp_path / "moved away")
    assert train_here(run, shards, **again) == 0  # as it was begun: 30 steps, with HellaSwag
    weights = (finished[0] / "model" / "model.safetensors").read_bytes()
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    # A signal in the last evaluation leaves HellaSwag out.
    metrics = run / "model" / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    last = [{name: value for name, value in record.items() if "hellaswag" not in name} for record in records]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in last))
    assert train_here(run, shards, **again) == 0
    assert "HellaSwag acc_norm" in (run / "model" / "README.md").read_text()
    assert any("hellaswag_completion_acc_norm" in line for line in metrics.read_text().splitlines())


def test_a_run_that_begins_with_the_checkpoint_of_another_says_what_changes(finished, shards, tmp_path, capsys):
    forked = {"resume_from_checkpoint": finished[0] / "step-000030", "num_samples": 0}
    longer = 40 * TOKENS_PER_STEP
    assert train_here(tmp_path / "longer", shards, **forked, train_tokens=longer) == 0
    assert "The learning rate jumps after step 30 from 1.00e-03 to " in capsys.readouterr().out
    assert train_here(tmp_path / "lower", shards, **forked, train_tokens=longer, learning_rate=0.002) == 0
    card = (tmp_path / "lower" / "model" / "README.md").read_text()
    assert "| learning rate | steps 31 to 40: 0.002 after" in card


def test_a_longer_run_says_how_far_the_learning_rate_jumps_and_how_to_avoid_it(finished, shards, tmp_path, capsys):
    longer = {"resume_from_checkpoint": "latest", "train_tokens": 60 * TOKENS_PER_STEP, "num_samples": 0}
    shutil.copytree(finished[0], tmp_path / "run")
    shutil.copytree(finished[0], tmp_path / "smooth")
    assert train_here(tmp_path / "run", shards, **longer) == 0
    # After 5 steps of warm-up, a cosine from 1e-2 to 1e-3: at its end, and after 25 of 55 steps.
    now = 1e-3 + 9e-3 * (1 + math.cos(math.pi * 25 / 55)) / 2
    expected = (
        f"The learning rate jumps after step 30 from 1.00e-03 to {now:.2e} ({now / 1e-3:.2g} x), because its schedule "
        f"has changed: the loss may rise for a while. To continue at the old rate, give --learning_rate "
        f"{1e-2 * 1e-3 / now:.3g}.\n"
    )
    assert expected in capsys.readouterr().out
    assert logged_values(tmp_path / "run", "learning_rate")[30] == pytest.approx(now)
    assert train_here(tmp_path / "smooth", shards, **longer, learning_rate=f"{1e-2 * 1e-3 / now:.3g}") == 0
    assert "jumps" not in capsys.readouterr().out
    assert logged_values(tmp_path / "smooth", "learning_rate")[30] == pytest.approx(1e-3, rel=5e-3)


def test_a_model_is_fine_tuned_with_its_own_shape_and_with_values_for_it(finished, shards, warm_python, tmp_path):
    given = {"init_from": finished[0] / "model", "shards": shards, "output_dir": tmp_path / "run", "num_samples": 0}
    given |= {"hellaswag": "none", "tokens_per_step": TOKENS_PER_STEP, "n_layer": 2}
    printed = warm_python.run(SCRIPT, *as_flags(given), **CPU_FP32).stdout
    arguments = json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]
    assert [arguments[name] for name in ("n_layer", "n_head", "n_embd", "block_size")] == [2, 2, 32, 32]
    sequences = sum(len(np.load(path)) for path in shards.glob("train_*.npy")) // 32
    assert (arguments["num_train_epochs"], arguments["train_tokens"]) == (3, 3 * sequences * 32)
    steps = 3 * sequences // SEQUENCES_PER_STEP
    rates = logged_values(tmp_path / "run", "learning_rate")
    assert (len(rates), max(rates)) == (steps, 5e-5)
    assert f"learning rate 5e-05 after {int(0.05 * arguments['train_tokens']):,} tokens of warm-up" in printed
    assert f"epochs       {steps * SEQUENCES_PER_STEP / sequences:.2f} of the training data\n" in printed
    assert f"width 32, fine-tuned from {finished[0] / 'model'}\n" in printed


def refused(capsys, output_dir, shards, **overrides) -> str:
    """What the script prints, in this process, before it exits with code 2."""
    given = {"shards": shards, "output_dir": output_dir, **RECIPE, "hellaswag": "none", **overrides}
    with pytest.raises(SystemExit) as exit_:
        train_accelerate.main(as_flags(given))
    torch.use_deterministic_algorithms(False)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_an_output_dir_that_holds_another_run_is_left_alone(finished, shards, capsys):
    before = (finished[0] / "metrics.jsonl").read_bytes()
    printed = refused(capsys, finished[0], shards)
    assert "holds another run: resume it with --resume_from_checkpoint latest" in printed
    assert (finished[0] / "metrics.jsonl").read_bytes() == before


def test_another_order_of_the_data_cannot_be_resumed(finished, shards, capsys):
    assert train_here(finished[0], shards, resume_from_checkpoint="latest", seed=12) == 2
    assert "was made with seed 11, not 12" in capsys.readouterr().err


def test_errors_of_several_inputs_are_reported_together(shards, tmp_path, capsys):
    rows = (shards.parent / "hellaswag.jsonl").read_text().replace('"endings": [', '"endings": ["a fifth", ')
    (tmp_path / "five.jsonl").write_text(rows)
    overrides = {"hellaswag": tmp_path / "five.jsonl", "sample_prompts": "the cat sees " * 20}
    assert train_here(tmp_path / "run", shards, **overrides) == 2
    printed = capsys.readouterr().err
    assert "2 problems" in printed
    assert "endings" in printed
    assert "the prompt has" in printed


def test_weights_that_do_not_fit_are_refused(finished, shards, tiny_tokenizer, tmp_path, capsys):
    model = finished[0] / "model"
    printed = refused(capsys, tmp_path / "1", shards, init_from=model, n_layer=3, sample_prompts="the cat sees " * 20)
    assert "2 problems" in printed
    shape = "--n_layer 2 --n_head 2 --n_embd 32 --initializer_range 0.02"
    assert f"{model} has another shape than was asked for: give {shape}." in printed
    longer = {"block_size": 64, "tokens_per_step": 512, "per_device_train_batch_size": 2}
    printed = refused(capsys, tmp_path / "2", shards, init_from=model, **longer)
    assert f"block_size (64) must be at most the 32 positions of {model}." in printed
    shutil.copytree(model, tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")  # as many ids, other tokens
    printed = refused(capsys, tmp_path / "3", shards, init_from=tmp_path / "other")
    assert "has another tokenizer than the data: prepare the data with --tokenizer" in printed
    (tmp_path / "other" / "model.safetensors").write_bytes(b"no weights")
    assert "weights that cannot be read" in refused(capsys, tmp_path / "4", shards, init_from=tmp_path / "other")


def untie(folder):
    """Give the output head values of its own, as a merged adapter does; the config still says that it is tied."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = 1.5 * weights["transformer.wte.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_untied_weights_whose_config_says_tied_are_refused(finished, shards, tmp_path, capsys):
    sentence = "lm_head.weight and transformer.wte.weight differ, but its config says that they are one tensor"
    shutil.copytree(finished[0] / "model", tmp_path / "model")
    untie(tmp_path / "model")
    assert sentence in refused(capsys, tmp_path / "1", shards, init_from=tmp_path / "model")

    shutil.copytree(finished[0], tmp_path / "run")  # of a version that did not refuse such weights
    checkpoint = tmp_path / "run" / "step-000030"
    untie(checkpoint)
    optimizer = load_file(checkpoint / "training_state" / "optimizer.safetensors")
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        optimizer[f"lm_head.weight.{kind}"] = optimizer[f"transformer.wte.weight.{kind}"].clone()
    save_file(optimizer, checkpoint / "training_state" / "optimizer.safetensors")
    (checkpoint / CHECKSUMS_FILE).unlink()
    write_checksums(checkpoint, CHECKSUMS_FILE)
    printed = refused(capsys, tmp_path / "run", shards, resume_from_checkpoint="latest")
    assert sentence in printed


def test_a_model_to_fine_tune_that_does_not_exist_is_one_sentence(shards, tmp_path, capsys):
    given = {"init_from": tmp_path / "nowhere", "shards": shards, "output_dir": tmp_path / "run", "hellaswag": "none"}
    with pytest.raises(SystemExit) as end:
        train_accelerate.main(as_flags(given))
    torch.use_deterministic_algorithms(False)
    assert end.value.code == 2
    assert "nowhere cannot be read as a model: there is no such folder, and a model on" in capsys.readouterr().err


def test_two_processes_exit_together_on_missing_weights(shards, warm_python, tmp_path):
    program = (  # the second does not wait for a launcher to end it
        "from modeling_gpt2repro.runtime import command_line; command_line.RANK_0_HEAD_START_SECONDS = 0\n"
        "import sys, train_accelerate; train_accelerate.main(sys.argv[1:])"
    )
    flags = toy_flags(tmp_path / "run", shards, init_from=tmp_path / "nowhere")
    both = warm_python.run_together(2, "-c", program, *flags, check=False, **CPU_FP32)
    assert [process.returncode for process in both] == [2, 2]
    assert all("cannot be read as a model" in process.stderr for process in both)


def test_a_folder_that_does_not_belong_to_a_run_is_left_alone(shards, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("precious")
    assert "does not belong to a run" in refused(capsys, tmp_path, shards)
    assert (tmp_path / "model" / "mine.txt").read_text() == "precious"


def test_flash_attention_without_mixed_precision_is_refused(shards, tmp_path, capsys):
    assert train_here(tmp_path / "run", shards, attn_implementation="flash_attention_2") == 2
    assert "computes in 16 bits only: launch with --mixed_precision bf16, or use sdpa." in capsys.readouterr().err


def test_deepspeed_is_refused_with_its_replacement(shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")  # what its launcher sets
    assert "launch with accelerate_configs/fsdp2.yaml" in refused(capsys, tmp_path / "run", shards)
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_see_each_other_are_stopped():
    with pytest.raises(ValueError, match="the launcher started 2 processes, but each sees 1: they would train"):
        check_num_processes(1, launched=2, requested=None)
