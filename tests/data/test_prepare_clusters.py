"""Preparing data on a cluster: the scripts that Slurm is given, and Ray on this machine."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from patience import PATIENCE_SECONDS

import prepare_data
from modeling_gpt2repro.data.prepare import arguments as prepare_arguments
from modeling_gpt2repro.data.prepare.spec import default_validation_share
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.data.sources.documents import Partition
from modeling_gpt2repro.data.sources.resolve import Source, local_source

REPOSITORY = Path(__file__).parents[2]

# In place of Slurm's sbatch: runs the tasks of an array one after the other, with the variables that Slurm sets.
SBATCH = """#!/usr/bin/env bash
for last; do true; done
count=$(sed -n 's/#SBATCH --array=0-//p' "$last")
echo "$@" >> "$(dirname "$0")/submitted"
for option; do case $option in --export=ALL,*) export "${option#--export=ALL,}";; esac; done
for task in $(seq 0 "$count"); do
    SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=1 SLURM_NODELIST=here bash "$last" >> "$(dirname "$0")/log" 2>&1 || exit 1
done
echo Submitted batch job 17
"""
SRUN = '#!/usr/bin/env bash\\nwhile [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done; exec "$@"\n'.replace(
    "\\n", "\n"
)


@pytest.fixture
def arguments(tmp_path, tiny_texts, tiny_tokenizer):
    pq.write_table(pa.table({"text": tiny_texts}), tmp_path / "texts.parquet", row_group_size=40)
    tiny_tokenizer.save_pretrained(tmp_path / "tiny")
    files = ["--train_files", str(tmp_path / "texts.parquet"), "--tokenizer", str(tmp_path / "tiny")]
    return [*files, "--shard_tokens", "8000"]


def run_script(arguments, **environment):
    command = [sys.executable, "prepare_data.py", *map(str, arguments)]
    environment = {**os.environ, **environment}
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS
    )


def test_dry_run_prints_the_scripts_for_slurm_and_writes_nothing(tmp_path, arguments, capsys):
    out = tmp_path / "out"
    slurm = ["--executor", "slurm", "--slurm_partition", "cpu", "--slurm_time", "2:00:00", "--slurm_args", "account=me"]
    prepare_data.main(["--output_dir", str(out), *arguments, *slurm, "--workers", "4", "--dry_run"])
    printed = capsys.readouterr().out
    assert printed.startswith("# 5 partitions of about ")
    scripts = [script for script in printed.split("\n\n# sbatch ") if "launch_pickled_pipeline" in script]
    assert len(scripts) == 2
    for script, name, last in zip(scripts, ("tokenize", "assemble"), (3, 0), strict=True):
        for line in (f"job-name={name}", "partition=cpu", "time=2:00:00", "account=me", f"array=0-{last}"):
            assert f"#SBATCH --{line}\n" in script
        assert re.search(rf"srun +-l -n 1 launch_pickled_pipeline {out}/logs/{name}/executor\.pik\n", script)
    assert scripts[0].splitlines()[0].endswith("--export=ALL,RUN_OFFSET=0")
    assert scripts[1].splitlines()[0].endswith("--export=ALL,RUN_OFFSET=0 --dependency=afterok:TOKENIZE_JOB_ID")
    assert not out.exists()
    prepare_data.main(["--output_dir", str(out), *arguments, "--dry_run"])
    assert "by 1 workers (local)" in capsys.readouterr().out
    assert not out.exists()


def test_wrong_cluster_options_are_reported_together(tmp_path, arguments, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(prepare_arguments, "find_spec", lambda name: None)
    for more, parts in (
        (["--executor", "slurm", "--slurm_args", "me"], ("needs --slurm_partition", "no sbatch here", "option=value")),
        (["--executor", "ray"], ("pip install ray",)),
        (["--executor", "nomad"], ("executor (nomad) must be one of local, slurm, ray",)),
        (["--layout", "mine"], ("layout (mine) must be one of plain, karpathy",)),
        (
            ["--slurm_partition", "cpu", "--slurm_time", "1:00:00", "--slurm_args", "account=me"],
            (
                "slurm_partition (cpu) is for --executor slurm only",
                "slurm_time (1:00:00) is for",
                "slurm_args (['account=me']) is for",
            ),
        ),
    ):
        with pytest.raises(SystemExit) as end:
            prepare_data.main(["--output_dir", str(tmp_path / "out"), *arguments, *more])
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert all(part in message for part in parts)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="bash scripts replace Slurm's commands")
def test_the_jobs_submitted_to_slurm_make_the_same_shards_and_are_those_of_the_dry_run(tmp_path, arguments):
    commands = tmp_path / "slurm"
    commands.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", "#!/bin/sh\necho here\n")):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    path = os.pathsep.join([str(commands), os.environ["PATH"]])
    slurm = ["--executor", "slurm", "--slurm_partition", "cpu", "--workers", "2"]
    dry = run_script(["--output_dir", tmp_path / "out", *arguments, *slurm, "--dry_run"], PATH=path)
    done = run_script(["--output_dir", tmp_path / "out", *arguments, *slurm], PATH=path)
    assert done.returncode == 0, done.stderr + (commands / "log").read_text()
    assert f"submitted; logs are in {tmp_path / 'out/logs'}, and" in done.stdout
    assert f"{tmp_path / 'out/manifest.json'} is written last." in done.stdout
    assert (commands / "submitted").read_text().count("afterok:17") == 1
    for name in ("tokenize", "assemble"):
        assert (tmp_path / "out/logs" / name / "launch_script.slurm").read_text() in dry.stdout
    prepare_data.main(["--output_dir", str(tmp_path / "local"), *arguments])
    assert open_shards(tmp_path / "out").fingerprint == open_shards(tmp_path / "local").fingerprint
    assert (tmp_path / "out/manifest.json").read_bytes() == (tmp_path / "local/manifest.json").read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == ["logs", "tokenizer"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_two_workers_on_ray_make_the_same_shards(tmp_path, arguments):
    ray = ["--executor", "ray", "--workers", "2"]
    done = run_script(["--output_dir", tmp_path / "out", *arguments, *ray])
    assert done.returncode == 0, done.stderr
    prepare_data.main(["--output_dir", str(tmp_path / "local"), *arguments])
    for name in [path.name for path in (tmp_path / "local").iterdir() if path.is_file()]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()

    # Ray does not pass on the exception of a worker; its message is reported all the same.
    lines = (tmp_path / "texts.jsonl").open("wb")
    with lines:
        lines.write(b'{"text": "the sea"}\n' * 10**6 + b'{"text": 5}\n')
    files = ["--train_files", tmp_path / "texts.jsonl", *arguments[2:]]
    done = run_script(["--output_dir", tmp_path / "bad", *files, *ray])
    assert done.returncode == 2
    assert "1 of 2 partitions are finished, which is not enough: bytes 16777216 to 20000012 of" in done.stderr
    assert "line 1,000,001 (byte 20000000) has 'text' that is not text." in done.stderr


def test_default_validation_share_of_a_hub_dataset_is_ten_million_tokens_if_there_are_enough(arguments):
    def share_of(tokens, max_tokens=None):
        partitions = [Partition("hf://x.parquet", 0, 1, "text", 5 * tokens)]
        return default_validation_share(Source(partitions, {"dataset": "ns/name"}), max_tokens)

    assert share_of(10**10) == 0.001
    assert share_of(10**12) == 0.001
    assert share_of(10**9) == 0.01
    assert share_of(3 * 10**9) == 0.003333
    assert share_of(10**10, max_tokens=10**9) == 0.01
    assert share_of(10**6) == 0.05  # the largest share, because there are not enough
    assert share_of(0) == 0.001  # its size is unknown
    assert share_of(0, max_tokens=10**9) == 0.01
    assert default_validation_share(local_source([arguments[1]])) == 0.05
