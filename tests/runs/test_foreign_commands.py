"""The command of a run.json that somebody else wrote: on a card, for people to paste, if it only starts a training."""

import pytest

from modeling_gpt2repro.runs.summary import shown_command


@pytest.mark.parametrize(
    "command",
    [
        "gpt2repro-train --preset quickstart",
        "python train_accelerate.py",
        "OMP_NUM_THREADS=2 python3.11 -u code/train_accelerate.py --preset quickstart",
        "accelerate-launch -q --config_file accelerate_configs/8xa100.yaml --num_processes 4 -m train_accelerate",
        "python -m accelerate.commands.launch --multi_gpu --main_process_ip HOST train_accelerate.py --seed=7",
        "torchrun --standalone --nproc_per_node=2 --signals-to-handle SIGTERM,SIGUSR1 train_accelerate.py",
        "python3 -m torch.distributed.run --nnodes 1:2 --rdzv-endpoint=HOST train_accelerate.py --sample_prompts evil",
    ],
)
def test_what_starts_a_training_is_the_command_of_a_card(command):
    assert shown_command(command, ["--seed", "1"]) == f"{command} --seed 1"


@pytest.mark.parametrize(
    "command",
    [
        "python -c 'import os; os.system(\"evil\")' train_accelerate.py",
        "python3 evil.py train_accelerate.py",
        "python -m pip install evil train_accelerate",
        "python ../train_accelerate.py",
        "python /tmp/train_accelerate.py",
        "python train_accelerate.py evil.py",
        "accelerate launch evil.py",
        "accelerate launch --multi_gpu evil.py train_accelerate.py",
        "accelerate launch --multi_gpu -m evil --log_dir train_accelerate.py",
        "accelerate launch --log_dir train_accelerate.py -m evil",
        "accelerate launch --log_dir train_accelerate.py --multi_gpu evil",
        "accelerate launch --module evil train_accelerate.py",
        "accelerate config --x train_accelerate.py",
        "torchrun --no_python bash train_accelerate.py",
        "torchrun --no-python=bash train_accelerate.py",
        "torchrun --no-pyt bash train_accelerate.py",
        "OMP_NUM_THREADS=1 OMP_NUM_THREADS=1 bash",
        "'accelerate\nlaunch' evil.py train_accelerate.py",
    ],
)
def test_what_could_start_another_program_is_no_command_of_a_card(command):
    assert shown_command(command, []) == ""
