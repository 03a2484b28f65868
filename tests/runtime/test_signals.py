"""What a signal does to the process that receives it, and the command that resumes the run."""

import os
import signal
import sys
from types import SimpleNamespace

import pytest
import torch

from modeling_gpt2repro.runtime import signals
from modeling_gpt2repro.runtime.signals import StopSignal, public_command, resume_command


def test_a_second_ctrl_c_interrupts_at_once(terminal_signals, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(signals, "time", SimpleNamespace(monotonic=lambda: now))
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same one, passed on by a launcher
        assert stop.should_stop()
        now += signals.SAME_CTRL_C_SECONDS + 1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # afterwards Ctrl-C is Python's again
        os.kill(os.getpid(), signal.SIGINT)


def test_the_resume_command_is_the_command_of_the_run(monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "train_accelerate.py", "--preset", "quickstart"])
    assert resume_command() == "python3 train_accelerate.py --preset quickstart --resume_from_checkpoint latest"
    monkeypatch.setattr(
        sys, "orig_argv", ["python", "a/t.py", "--resume_from_checkpoint", "step-000005", "--seed", "1"]
    )
    assert resume_command() == "python a/t.py --seed 1 --resume_from_checkpoint latest"
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)  # a notebook's
    assert resume_command() == 'train_accelerate.main([..., "--resume_from_checkpoint", "latest"])'


def test_the_command_for_a_model_card_is_without_what_is_only_of_this_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/me/gpt2repro/train_accelerate.py"])
    typed = [
        "/opt/bin/python3",
        "/opt/bin/accelerate",
        "launch",
        "--main_process_ip",
        "10.0.0.7",
        "--rdzv-endpoint=n1:29",
    ]
    typed += ["/home/me/gpt2repro/train_accelerate.py", "--output_dir", "/home/me/runs/a b", "--seed=7"]
    typed += ["--mix=/data/edu:0.7,own/code:0.3", "--init_from", "C:\\models\\mine", "--tokenizer", "../me/tok"]
    typed += [
        "--hub_model_id",
        "hf_" + "aB3" * 11 + "x",
        "--resume_from_checkpoint",
        "latest",
        "--shards",
        "hf://o/n@main",
    ]
    monkeypatch.setattr(signals, "launcher_command", lambda: typed)
    command = (
        "accelerate launch --main_process_ip HOST --rdzv-endpoint=HOST train_accelerate.py --output_dir 'a b' --seed=7 "
        "--mix=edu:0.7,own/code:0.3 --init_from mine --tokenizer tok --hub_model_id hf_... --shards hf://o/n@main"
    )
    assert public_command(torch.device("cuda")) == command
    assert public_command(torch.device("cpu")) == f"OMP_NUM_THREADS={torch.get_num_threads()} {command}"
    for program in ("/usr/lib/ipykernel_launcher.py", ""):  # its command is not that of the run
        monkeypatch.setattr(sys, "argv", [program])
        assert public_command(torch.device("cuda")) is None


TOKEN = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("word", "public"),
    [
        ("--init_from=../../home/me/model", "--init_from=model"),
        ("--mix=~me/a:0.5,../b:0.3,~/c/:0.2", "--mix=a:0.5,b:0.3,c:0.2"),
        ("..\\me\\tokens", "tokens"),
        ("runs/a", "runs/a"),
        ("hf://owner/name@main", "hf://owner/name@main"),
        ("https://me:secret@mirror/a/b", "https://mirror/a/b"),
        ("--x=http://secret@mirror", "--x=http://mirror"),
        (f"--hub_model_id=me/{TOKEN}", "--hub_model_id=me/hf_..."),
        (f"x{TOKEN}", "xhf_..."),
        ("/", ""),
    ],
)
def test_a_word_without_folders_and_secrets(word, public):
    assert signals.hide_private(word, before="") == public


SIGNAL_TO_RANK_1 = """
import os, signal
import torch.distributed as dist
from modeling_gpt2repro.runtime.signals import StopSignal

dist.init_process_group("gloo")
calls = []
with StopSignal(on_stop=lambda: calls.append(1)) as stop:
    assert not stop.should_stop() and not calls
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls  # at once
    while not stop.should_stop():
        pass
    assert calls
dist.destroy_process_group()
"""


def test_every_process_announces_the_stop_as_soon_as_it_knows(warm_python):
    warm_python.run_together(2, "-c", SIGNAL_TO_RANK_1)
