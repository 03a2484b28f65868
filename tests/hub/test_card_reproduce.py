"""The section of a model card that says how to train the same weights."""

import pytest
from cards import COMMIT, change_arguments, change_record, model_card, resumed, trained

LAUNCH = "accelerate launch --config_file accelerate_configs/cpu.yaml train_accelerate.py --output_dir runs/a"


def reproduce(run_folder, tiny_model) -> tuple[str, list[str]]:
    """The text, and the lines of the commands, of that section of the card."""
    text, block = model_card(tiny_model, run_folder=run_folder).split("\n## Reproduce\n\n")[1].split("```bash\n")
    assert block.endswith("\n```\n")
    return text, block.removesuffix("\n```\n").split("\n")


def test_the_card_says_how_to_train_the_same_weights(run_folder, tiny_model):
    versions = {"gpt2repro": "0.1.0", "python": "3.12.1", "torch": "2.13.0+cu130", "numpy": "2.4.6"}
    change_record(run_folder, command=LAUNCH, versions=versions, has_uncommitted_changes=True)
    change_arguments(run_folder, output_dir="runs/a", train_tokens=19_073 * 2**19)
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write(trained(19_072, 19_073))
    text, lines = reproduce(run_folder, tiny_model)
    assert text.startswith(
        "Data: HuggingFaceFW/fineweb-edu (fingerprint 0123456789abcdef). Code: gpt2repro 0.1.0, with Python 3.12.1, "
        "seed 1337. GPUs may add numbers up in another order each time, so the weights may differ by rounding."
    )
    assert lines == [
        "git checkout c0ffee  # in a clone of gpt2repro, and there were changes to it that no commit has",
        "pip install torch==2.13.0 numpy==2.4.6 -e .",
        LAUNCH,
        "sha256sum runs/a/model/model.safetensors",
    ]
    card = model_card(tiny_model, run_folder=run_folder)
    assert "| code | gpt2repro 0.1.0, commit c0ffee with uncommitted changes |\n" in card
    assert "| software | python 3.12.1, torch 2.13.0+cu130, numpy 2.4.6 |\n" in card


def test_data_on_the_hub_are_those_of_the_commit_that_was_read(run_folder, tiny_model):
    change_record(run_folder, command=LAUNCH)
    stream = {"dataset": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT", "revision": COMMIT}
    change_record(run_folder, data={"data": stream})
    text, lines = reproduce(run_folder, tiny_model)
    assert text.startswith(f"Data: HuggingFaceFW/fineweb-edu (sample-10BT) at revision {COMMIT}.")
    assert lines[2] == f"{LAUNCH} --dataset_revision {COMMIT}"

    address = f"hf://owner/tokens@{COMMIT}"
    change_record(run_folder, data={"data": "ab" * 32})
    change_arguments(run_folder, shards=address)
    text, lines = reproduce(run_folder, tiny_model)
    assert text.startswith(f"Data: {address} (fingerprint {'ab' * 32}).")
    assert lines[2] == f"{LAUNCH} --shards {address}"

    change_record(run_folder, data={"data": [["ab" * 32, 0.7], ["cd" * 32, 0.3]]})
    change_arguments(run_folder, shards=None, mix=f"{address}:0.7,/home/me/own:0.3")
    text, lines = reproduce(run_folder, tiny_model)
    assert text.startswith(f"Data: {address} (fingerprint {'ab' * 32}); a prepared folder (fingerprint {'cd' * 32}).")
    assert lines[2] == LAUNCH
    assert "/home/me" not in model_card(tiny_model, run_folder=run_folder)


def test_a_run_that_moved_has_the_command_and_the_hardware_of_each_stretch(run_folder, tiny_model):
    change_record(run_folder, command=LAUNCH)
    moved = {"processes": [8, 2], "device": ["NVIDIA H100", "x86_64 CPU"], "commit": ["c0ffee", "decaf"]}
    other = {"command": [LAUNCH, f"{LAUNCH} --find_batch_size"]}
    with open(run_folder / "metrics.jsonl", "w") as file:
        file.writelines([trained(1, 500), resumed(500), trained(501, 600), resumed(600, **moved), trained(601, 700)])
        file.writelines([resumed(700, **other), trained(701, 800)])
    text, lines = reproduce(run_folder, tiny_model)
    assert "The run moved" in text
    assert lines[2:] == [
        "# steps 1 to 600, on 8 x NVIDIA H100, bf16",
        LAUNCH,
        "# steps 601 to 700, on 2 x x86_64 CPU, bf16, commit decaf",
        f"{LAUNCH} --resume_from_checkpoint latest",
        "# steps 701 to 800, on 8 x NVIDIA H100, bf16",
        f"{LAUNCH} --find_batch_size --resume_from_checkpoint latest",
    ]


def test_a_run_json_without_the_command_still_gives_the_rest(run_folder, tiny_model):
    text, lines = reproduce(run_folder, tiny_model)
    assert "Code: gpt2repro, with Python 3.12.1, seed 1337." in text
    assert "The command is not known: give the arguments that are listed above." in text
    assert lines == ["git checkout c0ffee  # in a clone of gpt2repro", "pip install torch==2.13.0 -e ."]


@pytest.mark.parametrize(
    "command", ["rm -rf /", "OMP_NUM_THREADS=2", "A=$(evil) accelerate launch", "'", "", f"{LAUNCH} {'a' * 2000}"]
)
def test_what_starts_no_training_is_no_command_of_a_card(tiny_model, run_folder, command):
    change_record(run_folder, command=command)
    assert "The command is not known" in reproduce(run_folder, tiny_model)[0]
