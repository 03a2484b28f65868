"""Tokenize the partitions of a preparation on a cluster, Slurm or Ray, by datatrove; all nodes see the same folder."""

import math
import os
import shlex
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger

from modeling_gpt2repro.data.shards.dataset import MANIFEST
from modeling_gpt2repro.data.sources.documents import Partition
from modeling_gpt2repro.storage.lock import FolderLock

from .assemble import assemble
from .local import tokenize_partitions
from .spec import read_spec_of_job
from .workspace import LOGS, SLURM_JOBS, finish_job


class TokenizePartitions(PipelineStep):
    """`tokenize_partitions` as a step of datatrove: each task takes every world_size-th partition."""

    type = "Tokenizer"
    name = "Partitions of text to ids"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data: None = None, rank: int = 0, world_size: int = 1):
        def on_tokenized(partition: Partition, train_tokens: int):
            logger.info(f"{partition.location}: {train_tokens} training tokens")
            self.stat_update("tokens", value=train_tokens, unit="partition")

        tokenize_partitions(Path(self.folder), rank, world_size=world_size, on_tokenized=on_tokenized)


def assemble_and_finish(data: None, rank: int, world_size: int, folder: str):
    """`assemble` as a step of datatrove, for a job of its own after all of the others."""
    path = Path(folder)
    with FolderLock(path) as lock:
        lock.acquire()
        if not (path / MANIFEST).exists():  # else this job was interrupted after it had written it
            try:
                assemble(path, read_spec_of_job(path))
            except Exception:  # no job is left that works on it, and the same command may be given again
                (path / SLURM_JOBS).unlink(missing_ok=True)
                raise
        finish_job(path, keep_logs=True)


def tokenize_on_ray(folder: Path, workers: int):
    """Tokenize on the Ray cluster that RAY_ADDRESS names, or else on one that is started on this machine."""
    import ray

    if not ray.is_initialized():
        variables = {"PYTHONPATH": _python_path()}
        ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": variables})
    logger.disable("datatrove")  # its logs go to files, not to the terminal
    RayPipelineExecutor(
        [TokenizePartitions(str(folder))],
        tasks=workers,
        workers=workers,
        logging_dir=str(folder / LOGS),
        # Finished partitions have files; datatrove's own records are valid for one number of workers only.
        skip_completed=False,
        log_first=False,
    ).run()


def submit_to_slurm(folder: Path, workers: int, partition: str, time_limit: str, sbatch_options: dict[str, str]):
    """Submit a job array that tokenizes, and a job after it that writes the shards; their ids go to SLURM_JOBS."""
    _, assembling = _slurm_executors(folder, workers, partition, time_limit, sbatch_options)
    try:
        assembling.run()  # submits what it depends on first
    except Exception:
        jobs = folder / SLURM_JOBS
        if jobs.exists() and not jobs.read_bytes():  # nothing was submitted
            jobs.unlink()
        raise


def record_job(folder: str, sbatch_output: str) -> str:
    """Append the job's id, which is returned, to SLURM_JOBS; if that is gone, the last of the jobs has ended."""
    job_id = sbatch_output.split()[-1]
    with suppress(FileNotFoundError), (Path(folder) / SLURM_JOBS).open("r+", encoding="ascii") as jobs:
        jobs.seek(0, os.SEEK_END)
        jobs.write(f"{job_id}\n")
    return job_id


def slurm_scripts(
    folder: Path, workers: int, partition: str, time_limit: str, sbatch_options: dict[str, str]
) -> list[str]:
    """Return the scripts that `submit_to_slurm` would hand to sbatch; nothing is submitted or written to `folder`."""
    scripts = []
    dependency = ""
    with TemporaryDirectory() as temporary:  # datatrove creates a folder for Slurm's logs
        for executor in _slurm_executors(Path(temporary), workers, partition, time_limit, sbatch_options):
            array_size = min(executor.tasks, executor.max_array_size)
            num_arrays = math.ceil(executor.tasks / array_size)
            # The command that datatrove's launch_job composes.
            command = f"srun  -l -n 1 launch_pickled_pipeline {executor.logging_dir.resolve_paths('executor.pik')}"
            script = executor.get_launch_file_contents(executor.get_sbatch_args(array_size), command)
            for offset in range(num_arrays):
                submission = f"# sbatch --export=ALL,RUN_OFFSET={offset}{dependency}\n"
                scripts.append(submission + script.replace(temporary, str(folder)))
                dependency = " --dependency=afterany:TOKENIZE_JOB_ID"  # one array after the other
            dependency = " --dependency=afterok:TOKENIZE_JOB_ID"
    return scripts


def _slurm_executors(
    folder: Path, workers: int, partition: str, time_limit: str, sbatch_options: dict[str, str]
) -> tuple[SlurmPipelineExecutor, SlurmPipelineExecutor]:
    logger.disable("datatrove")
    path = os.environ.get("PATH", "")
    environment = [
        f"export PATH={shlex.quote(os.path.dirname(sys.executable) + os.pathsep + path)}",
        f"export PYTHONPATH={shlex.quote(_python_path())}",
    ]
    shared = {
        "time": time_limit,
        "partition": partition,
        "qos": "",
        "env_command": "\n".join(environment),
        "sbatch_args": sbatch_options,
        "skip_completed": False,
        "job_id_retriever": partial(record_job, str(folder)),
        "mem_per_cpu_gb": 4,
    }
    tokenizing = SlurmPipelineExecutor(
        [TokenizePartitions(str(folder))],
        tasks=workers,
        job_name="tokenize",
        logging_dir=str(folder / LOGS / "tokenize"),
        **shared,
    )
    assembling = SlurmPipelineExecutor(
        [partial(assemble_and_finish, folder=str(folder))],
        tasks=1,
        job_name="assemble",
        logging_dir=str(folder / LOGS / "assemble"),
        depends=tokenizing,
        **shared,
    )
    return tokenizing, assembling


def _python_path() -> str:
    """PYTHONPATH with which nodes find this package where it is not installed."""
    repository = Path(__file__).resolve().parents[3]
    return os.pathsep.join(filter(None, [str(repository), os.environ.get("PYTHONPATH", "")]))
