"""Hardware configurations: what accelerate makes of them, and the Slurm script with stand-ins for Slurm's commands."""

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from launching import CONFIGS, launcher_arguments, launcher_environment
from patience import PATIENCE_SECONDS, wait_until

from modeling_gpt2repro.runtime.accelerator import build_fsdp_plugin
from modeling_gpt2repro.training.arguments import TrainArguments

YAML_FILES = sorted(CONFIGS.glob("*.yaml"))
SBATCH = CONFIGS / "slurm.sbatch"


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda path: path.name)
def test_accelerate_knows_every_key_and_none_is_a_hyperparameter(path):
    assert load_config_from_file(str(path)).num_processes >= 1  # raises on keys of the first level
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    flags = vars(launch_command_parser().parse_args(["train_accelerate.py"]))
    # Unknown keys of this level would be accepted silently.
    assert not [key for key in keys.get("fsdp_config", {}) if key not in flags]
    assert not set(keys) & {field.name for field in dataclasses.fields(TrainArguments)}


def test_two_machines_start_eight_processes_each_and_meet_at_the_first():
    for rank in (0, 1):
        more = ["--machine_rank", str(rank), "--main_process_ip", "first", "--main_process_port", "29517"]
        arguments = launcher_arguments("2x8_multinode.yaml", *more)
        environment = prepare_multi_gpu_env(arguments)
        assert (arguments.nnodes, arguments.nproc_per_node, arguments.node_rank) == ("2", "8", rank)
        assert (arguments.rdzv_backend, arguments.rdzv_endpoint) == ("static", "first:29517")
        assert environment["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert load_config_from_file(str(CONFIGS / "2x8_multinode.yaml")).main_process_port == 29500


def test_fsdp2_shards_by_the_models_block_and_adds_gradients_up_in_fp32(tiny_model, monkeypatch):
    environment = launcher_environment("fsdp2.yaml", "--fsdp_offload_params", "true")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert environment["ACCELERATE_USE_FSDP"] == "true"
    plugin = build_fsdp_plugin(environment["ACCELERATE_MIXED_PRECISION"])
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"  # an option of the user's
    plugin.set_auto_wrap_policy(tiny_model)  # raises if the model has no such class
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(tiny_model.transformer.h[0])}
    plugin.set_mixed_precision("bf16")  # as accelerate does
    policy = plugin.mixed_precision_policy
    assert (policy.param_dtype, policy.reduce_dtype, policy.output_dtype) == (torch.bfloat16, torch.float32, None)
    assert build_fsdp_plugin("no").mixed_precision_policy is None


def test_only_the_second_version_of_fsdp_is_used(monkeypatch, one_sentence):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert build_fsdp_plugin("bf16") is None
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)  # accelerate's default is the first
    with pytest.raises(ValueError, match="FSDP version 1") as error:
        build_fsdp_plugin("bf16")
    assert "fsdp_version: 2" in one_sentence(error)


# A step of one task per machine. Like Slurm's: options first, SIGUSR1 is forwarded to the tasks, SIGTERM kills them.
SRUN = """#!/bin/bash
echo "$@" >> "$CLUSTER/srun_options"
while [[ $1 == -* ]]; do shift; done
trap 'again=yes; kill -USR1 "${tasks[@]}"' USR1
trap 'kill -KILL "${tasks[@]}"' TERM
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do SLURM_NODEID=$node "$@" & tasks+=($!); done
for task in "${tasks[@]}"; do
    again=yes
    while [ $again = yes ]; do again=no; wait "$task"; status=$?; done
    [ $status -gt ${worst:-0} ] && worst=$status
done
exit ${worst:-0}
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) [ "$*" = "show hostnames node[07-08]" ] && printf 'node07\\nnode08\\n';;
    requeue) echo "$2" >> "$CLUSTER/requeued";;
esac
"""
# A launcher exits at once with $ENDS_WITH, or trains until a signal that PET_SIGNALS_TO_HANDLE lists, then saves.
ACCELERATE = """#!/bin/bash
leave() { sleep 0.1; echo "$SLURM_NODEID" >> "$CLUSTER/saved"; exit 1; }
[[ $PET_SIGNALS_TO_HANDLE == *SIGUSR1* ]] && trap leave USR1
printf '%s\\n' "$@" > "$CLUSTER/launched.$SLURM_NODEID"
[ -n "$ENDS_WITH" ] && exit "$ENDS_WITH"
while true; do sleep 0.02; done
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A folder with stand-ins for Slurm's commands first on PATH; they record their calls in it."""
    for name, program in (("srun", SRUN), ("scontrol", SCONTROL), ("accelerate", ACCELERATE)):
        (tmp_path / name).write_text(program, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "17", "JOB_NODELIST": "node[07-08]", "JOB_NUM_NODES": "2", "CPUS_PER_TASK": "64"}
    slurm["GPUS_ON_NODE"] = "8"
    variables = {"CLUSTER": str(tmp_path), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "ENDS_WITH": ""}
    for name, value in {**variables, **{f"SLURM_{name}": value for name, value in slurm.items()}}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CONFIG", raising=False)
    yield tmp_path
    for job in lines(tmp_path / "jobs"):  # nothing of a job outlives its test
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(job), signal.SIGKILL)


def start_job(cluster, *arguments):
    with (cluster / "log").open("w") as log:
        command = ["bash", str(SBATCH), *arguments]
        job = subprocess.Popen(command, cwd=cluster, stdout=log, stderr=log, start_new_session=True)
    with (cluster / "jobs").open("a") as jobs:
        jobs.write(f"{job.pid}\n")
    return job


def wait_for(cluster, pattern, count):
    wait_until(lambda: len(list(cluster.glob(pattern))) >= count, failure=(cluster / "log").read_text)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_the_slurm_script_asks_for_a_warning_that_leaves_time_to_save():
    script = SBATCH.read_text(encoding="utf-8")
    options = set(re.findall(r"^#SBATCH (\S+)$", script, re.MULTILINE))
    assert {"--requeue", "--open-mode=append", "--ntasks-per-node=1", "--gpus-per-node=8"} <= options
    (warning,) = [int(option.split("@")[1]) for option in options if option.startswith("--signal=B:USR1@")]
    assert 30 < int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", script).group(1)) < warning
    first_command = script.index("\nset -u")
    assert "#SBATCH" not in script[first_command:]  # Slurm stops reading options at the first command


def test_each_machine_launches_with_its_rank_and_the_address_of_the_first(cluster, monkeypatch):
    monkeypatch.setenv("ENDS_WITH", "0")
    assert start_job(cluster, "--output_dir", "two words").wait(PATIENCE_SECONDS) == 0, (cluster / "log").read_text()
    for rank in (0, 1):
        command, *arguments = lines(cluster / f"launched.{rank}")
        assert command == "launch"
        parsed = launch_command_parser().parse_args(arguments)
        assert parsed.config_file == "accelerate_configs/2x8_multinode.yaml"
        assert (parsed.machine_rank, parsed.num_machines, parsed.num_processes) == (rank, 2, 16)
        assert parsed.main_process_ip == "node07"
        assert (parsed.module, parsed.training_script) == (True, "train_accelerate")
        assert parsed.training_script_args == ["--resume_from_checkpoint", "latest", "--output_dir", "two words"]
    assert "--cpus-per-task=64" in lines(cluster / "srun_options")[0]
    monkeypatch.setenv("CONFIG", "accelerate_configs/fsdp2.yaml")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    start_job(cluster).wait(PATIENCE_SECONDS)
    parsed = launch_command_parser().parse_args(lines(cluster / "launched.0")[1:])
    assert (parsed.config_file, parsed.num_processes) == ("accelerate_configs/fsdp2.yaml", 8)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE")
    monkeypatch.setenv("SLURM_GPUS_PER_NODE", "a100:2")
    start_job(cluster).wait(PATIENCE_SECONDS)
    assert launch_command_parser().parse_args(lines(cluster / "launched.0")[1:]).num_processes == 4


def test_a_warned_job_saves_on_all_machines_and_is_requeued_once(cluster):
    job = start_job(cluster)
    wait_for(cluster, "launched.*", 2)
    job.send_signal(signal.SIGUSR1)  # to the shell alone, as B: asks
    assert job.wait(PATIENCE_SECONDS) == 1
    assert sorted(lines(cluster / "saved")) == ["0", "1"]  # all had exited before the script did
    assert lines(cluster / "requeued") == ["17"]


def test_a_job_that_lost_its_data_after_some_steps_is_requeued_once(cluster, monkeypatch):
    monkeypatch.setenv("ENDS_WITH", "1")
    monkeypatch.setenv("TMPDIR", str(cluster / "temporary"))
    (cluster / "temporary").mkdir()
    lost = 'echo "Stopped after step 9" > "$GPT2REPRO_REQUEUE_FILE"\n'  # what the first process does
    (cluster / "accelerate").write_text(ACCELERATE.replace("[ -n", lost + "[ -n"), encoding="utf-8")
    assert start_job(cluster).wait(PATIENCE_SECONDS) == 1
    assert lines(cluster / "requeued") == ["17"]
    assert not list((cluster / "temporary").iterdir())


@pytest.mark.parametrize("status", [0, 1, 143])
def test_a_job_that_was_not_warned_is_not_requeued(cluster, monkeypatch, status):
    monkeypatch.setenv("ENDS_WITH", str(status))  # finished, failed, cancelled
    assert start_job(cluster).wait(PATIENCE_SECONDS) == status
    assert not lines(cluster / "requeued")


def test_a_job_that_finishes_after_the_warning_is_not_requeued(cluster):
    (cluster / "accelerate").write_text(ACCELERATE.replace("exit 1; }", "exit 0; }"), encoding="utf-8")
    job = start_job(cluster)
    wait_for(cluster, "launched.*", 2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(PATIENCE_SECONDS) == 0
    assert not lines(cluster / "requeued")


def test_a_cancelled_job_waits_for_its_step(cluster):
    job = start_job(cluster)
    wait_for(cluster, "launched.*", 2)
    job.send_signal(signal.SIGTERM)  # Slurm itself signals the step, and gives it time
    job.send_signal(signal.SIGUSR1)
    assert job.wait(PATIENCE_SECONDS) == 1  # else it would be SIGTERM's, -15 or 143
    assert sorted(lines(cluster / "saved")) == ["0", "1"]


@pytest.mark.slow
def test_accelerates_own_launcher_forwards_the_warning_to_every_process(cluster, monkeypatch):
    (cluster / "accelerate").unlink()
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shutil.which("accelerate") == str(Path(sys.executable).parent / "accelerate")
    monkeypatch.setenv("CONFIG", str(CONFIGS / "2x8_multinode.yaml"))
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    (cluster / "train_accelerate.py").write_text(
        "import os, signal, sys, time\n"
        "rank = os.environ['RANK']\n"
        "def leave(number, frame):\n"
        "    open(f'got.{rank}', 'w').write(signal.Signals(number).name)\n"
        "    while sum(name.startswith('got.') for name in os.listdir('.')) < 8: time.sleep(0.01)\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGUSR1, leave)\n"
        "open(f'started.{rank}', 'w')\n"
        f"time.sleep({PATIENCE_SECONDS})\n",
        encoding="utf-8",
    )
    job = start_job(cluster)
    wait_for(cluster, "started.*", 8)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(PATIENCE_SECONDS) == 1, (cluster / "log").read_text()
    assert [path.read_text() for path in cluster.glob("got.*")] == ["SIGUSR1"] * 8
    assert lines(cluster / "requeued") == ["17"]
