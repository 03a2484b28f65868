"""The model card's text: results, hyperparameters, hardware and time, as a run has recorded them."""

import json

import pytest
from cards import change_arguments, model_card, resumed, trained
from huggingface_hub import ModelCard

from modeling_gpt2repro.hub.model_card import FROM_SCRATCH, Origin


def test_the_card_has_the_last_evaluation_and_the_hyperparameters(run_folder, tiny_model):
    card = model_card(tiny_model, run_folder=run_folder)
    for line in (
        "| after | step 19,073, 9,999,220,736 tokens |",
        "| validation loss | 3.2500 nats per token (perplexity 25.79, 0.988 bits per byte) on 10,485,760 tokens |",
        "| HellaSwag acc_norm, completion | 0.3001 (95 %: 0.2911 to 0.3091); OpenAI's gpt2 has 0.2955 |",
        "| HellaSwag acc_norm, lm-eval | 0.3155 (95 %: 0.3065 to 0.3245); OpenAI's gpt2 has 0.3114 |",
        "| data | HuggingFaceFW/fineweb-edu (fingerprint 0123456789ab) |",
        "| tokens | 10,000,000,000, 524,288 per step |",
        "| learning rate | 0.0006 after 375,000,000 tokens of warm-up, then a cosine to 6e-05 |",
        "| hardware | 8 x NVIDIA H100, bf16 |",
        "| time | 1 h 0 min in 2 of 19,073 training steps |",
        "| code | gpt2repro, commit c0ffee |",
        "![loss over training tokens](loss.png)",
    ):
        assert f"{line}\n" in card
    assert "| loss curve | behind: 0.185 above the mean of 4 published runs (95 % of runs lie within 0.081)," in card


def test_a_card_without_a_run_or_before_its_first_evaluation(run_folder, tiny_model, stock):
    assert "## " not in model_card(tiny_model)
    assert "trust_remote_code" in model_card(tiny_model)
    converted = Origin("Converted from a.")
    assert "trust_remote_code" not in model_card(stock, converted)
    assert ModelCard(model_card(stock, converted)).data.license is None
    assert ModelCard(model_card(stock, FROM_SCRATCH)).data.license == "mit"
    (run_folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "loss": 2.0}\n')
    card = model_card(tiny_model, run_folder=run_folder)
    assert "## Results" not in card
    assert "## Training" in card


def test_results_of_diverged_runs_and_of_early_versions_can_be_written(run_folder, tiny_model):
    """The loss of a diverged model is null in metrics.jsonl; early versions wrote no interval of HellaSwag."""
    record = {"step": 5, "tokens": 50, "validation_loss": None, "validation_perplexity": None, "validation_tokens": 320}
    record |= {"validation_bits_per_byte": None, "hellaswag_completion_acc_norm": 0.25}
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    card = model_card(tiny_model, run_folder=run_folder)
    assert "| validation loss | not a number on 320 tokens |\n" in card
    assert "| HellaSwag acc_norm, completion | 0.2500; OpenAI's gpt2 has 0.2955 |\n" in card
    assert [result.metric_value for result in ModelCard(card).data.eval_results] == [0.25]


def test_a_run_resumed_with_other_arguments_is_described_by_those_of_each_stretch(run_folder, tiny_model):
    lower = {"learning_rate": [6e-4, 3e-4]}
    attempts = [trained(1, 500), resumed(500, learning_rate=[6e-4, 1e-3]), trained(501, 502), resumed(500, **lower)]
    attempts += [trained(501, 1000), resumed(1000, **lower, weight_decay=[0.1, 0.2]), trained(1001, 1001)]
    attempts += [resumed(1001), trained(1002, 2000), resumed(2000, learning_rate=[6e-4, 9e-4], train_tokens=[1, 2])]
    (run_folder / "metrics.jsonl").write_text("".join(attempts))
    card = model_card(tiny_model, run_folder=run_folder)
    schedule = "after 375,000,000 tokens of warm-up, then a cosine to"
    adam = "AdamW, betas 0.9 and 0.95, weight decay {}, gradient norm at most 1"
    for line in (
        "| tokens | 10,000,000,000, 524,288 per step |",
        f"| learning rate | steps 1 to 500: 0.0006 {schedule} 6e-05; steps 501 to 1,001: 0.0003 {schedule} 3e-05; "
        f"steps 1,002 to 2,000: 0.0006 {schedule} 6e-05 |",
        f"| optimizer | steps 1 to 1,000: {adam.format(0.1)}; step 1,001: {adam.format(0.2)}; "
        f"steps 1,002 to 2,000: {adam.format(0.1)} |",
    ):
        assert f"{line}\n" in card
    assert "0.001" not in card  # undone by resuming from the same step again
    assert "0.0009" not in card  # no step was trained with it


@pytest.mark.parametrize(
    ("saved", "line"), [(None, "AdamW, betas"), ("muon", "Muon for the matrices in the blocks, AdamW")]
)
def test_the_card_names_the_optimizer_and_runs_of_older_versions_had_adamw(run_folder, tiny_model, saved, line):
    config = json.loads((run_folder / "run.json").read_text())
    del config["arguments"]["optimizer"]
    config["arguments"] |= {"optimizer": saved} if saved else {}
    (run_folder / "run.json").write_text(json.dumps(config))
    assert f"| optimizer | {line}" in model_card(tiny_model, run_folder=run_folder)


def test_the_card_of_a_streamed_run_in_fp32_mentions_no_shards(run_folder, tiny_model):
    config = json.loads((run_folder / "run.json").read_text())
    config["data"]["data"] = {"dataset": "HuggingFaceFW/fineweb-edu", "files": 14}
    config["hardware"]["precision"] = "no"
    (run_folder / "run.json").write_text(json.dumps(config))
    card = model_card(tiny_model, run_folder=run_folder)
    assert "| data | HuggingFaceFW/fineweb-edu |\n" in card
    assert "| hardware | 8 x NVIDIA H100, fp32 |\n" in card


def test_a_card_says_that_stories_are_generated_and_how_near_the_floor_the_model_is(run_folder, tiny_model):
    change_arguments(run_folder, dataset_name="stories")
    stories = {"story_loss": 96.0, "story_floor": 80.0, "story_mentions_right": 0.9625}
    with open(run_folder / "metrics.jsonl", "a") as file:
        last = {"step": 20_000, "tokens": 10**10, "validation_loss": 0.5, "validation_perplexity": 1.6}
        file.write(json.dumps({**last, "validation_tokens": 10, **stories}) + "\n")
    card = model_card(tiny_model, run_folder=run_folder)
    for line in (
        "| whole held-out stories | 96.00 nats a story, 1.200 times the least that a model can have; 96.2% of names, "
        "animals and things right |",
        "| data | English stories that a program has put together at random, written for this purpose, prepared by the "
        "command itself (fingerprint 0123456789ab) |",
        'prompt = "A story of Mila and Tom, Mrs. Plum, a fox, a bell and some honey."',
    ):
        assert f"{line}\n" in card
    change_arguments(run_folder, shards=str(run_folder))
    private = "| data | a prepared folder that is not public (fingerprint 0123456789ab) |\n"
    assert private in model_card(tiny_model, run_folder=run_folder)


def training_rows(run_folder, tiny_model, *lines) -> dict[str, str]:
    """The rows of the section "Training", of a run that has written these lines."""
    (run_folder / "metrics.jsonl").write_text("".join(lines))
    section = model_card(tiny_model, run_folder=run_folder).split("\n## Training\n\n")[1].split("\n\n")[0]
    return dict(line.strip("| ").split(" | ", 1) for line in section.splitlines()[2:])


def test_the_time_counts_each_step_once_and_says_what_was_undone(run_folder, tiny_model):
    """20 steps of 3 minutes; killed after step 14 and after step 12, and both times resumed at step 10."""
    killed = [trained(1, 14, 180.0), resumed(10), trained(11, 12, 60.0), resumed(10)]
    rows = training_rows(run_folder, tiny_model, *killed, trained(11, 20, 180.0))
    undone = "14 min 0 s more in 6 steps undone by a resume from an earlier checkpoint"  # 4 x 180 s and 2 x 60 s
    assert rows["time"] == f"1 h 0 min in training steps; {undone}"
    one = training_rows(run_folder, tiny_model, trained(1, 5, 60.0), resumed(4), trained(5, 5, 30.0))["time"]
    assert one == "4 min 30 s in training steps; 1 min 0 s more in 1 step undone by a resume from an earlier checkpoint"
    assert training_rows(run_folder, tiny_model, trained(1, 4, 60.0), resumed(4), trained(5, 5, 60.0))["time"] == (
        "5 min 0 s in training steps"
    )


def test_a_time_that_is_not_recorded_is_not_guessed(run_folder, tiny_model):
    assert "time" not in training_rows(run_folder, tiny_model, trained(1, 3))
    assert "time" not in training_rows(run_folder, tiny_model, trained(1, 3, 1e308))  # whose sum is infinite
    of_another_run = [resumed(10), trained(11, 20, 60.0)]  # which began with the checkpoint of ten steps
    assert training_rows(run_folder, tiny_model, *of_another_run)["time"] == "10 min 0 s in 10 of 20 training steps"
    damaged = [trained(1, 4, 60.0), '{"step": 5, "lo\n', trained(6, 10, 60.0)]
    assert training_rows(run_folder, tiny_model, *damaged)["time"] == "9 min 0 s in 9 of 10 training steps"


def test_a_run_that_moved_shows_hardware_software_and_time_of_each_stretch(run_folder, tiny_model):
    moved = {"processes": [8, 2], "device": ["NVIDIA H100", "x86_64 CPU"], "precision": ["bf16", "no"]}
    moved |= {"torch": ["2.13.0", "2.14.0"], "commit": ["c0ffee", "decaf"]}
    rows = training_rows(
        run_folder,
        tiny_model,
        *[trained(1, 600, 1.0), resumed(600), trained(601, 1100, 1.0), resumed(1000, **moved)],
        *[trained(1001, 1100, 60.0), resumed(1100), trained(1101, 1200, 1.0)],
    )
    assert rows["hardware"] == (
        "steps 1 to 1,000: 8 x NVIDIA H100, bf16; steps 1,001 to 1,100: 2 x x86_64 CPU, fp32; "
        "steps 1,101 to 1,200: 8 x NVIDIA H100, bf16"
    )
    assert rows["time"] == (
        "1 h 58 min in training steps (steps 1 to 1,000: 16 min 40 s; steps 1,001 to 1,100: 1 h 40 min; "
        "steps 1,101 to 1,200: 1 min 40 s); 1 min 40 s more in 100 steps undone by a resume from an earlier checkpoint"
    )
    assert rows["software"].startswith("steps 1 to 1,000: python 3.12.1, torch 2.13.0; steps 1,001 to 1,100: python")
    assert "steps 1,001 to 1,100: gpt2repro, commit decaf; steps" in rows["code"]
    assert rows["seed"] == "1337"
