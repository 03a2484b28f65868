"""Where the units of a plan are tokenized: on this machine, or by a cluster that sees the same folder."""

import os
import queue
import shlex
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from unittest.mock import patch

import datatrove.utils.logging as datatrove_logging
import multiprocess
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.executor.base import PipelineExecutor
from multiprocess.managers import SyncManager

from .assemble import Progress
from .spec import PrepareSpec
from .token_cache import finished_partitions
from .tokenize_units import AssembleShards, TokenizeUnits, exit_with_parent
from .workspace import LOGS

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 5  # in which a pool that ends, and ends its workers, has ended
REPOSITORY = Path(__file__).resolve().parents[3]


class QuietLocalExecutor(LocalPipelineExecutor):
    """datatrove's, with its logs in files alone, and with no process left behind when this one is killed."""

    def run(self):
        quiet_logging()
        manager = _manager if self.workers > 1 else _no_manager
        with patch.object(multiprocess, "Manager", manager):
            return super().run()

    def _run_for_rank(self, *args, **kwargs):
        quiet_logging()
        return super()._run_for_rank(*args, **kwargs)


def local_executor(folder: Path, workers: int) -> PipelineExecutor:
    """As many processes on this machine as there are workers; one works in this process."""
    step, logs = TokenizeUnits(str(folder)), str(folder / LOGS)
    # What is finished is told by the units' files: datatrove's own notes hold for one number of workers only.
    return QuietLocalExecutor([step], workers, workers, logs, skip_completed=False, start_method="spawn")


def ray_executor(folder: Path, workers: int) -> PipelineExecutor:
    """On the Ray cluster that RAY_ADDRESS names, or else on one that is started on this machine."""
    import ray

    if not ray.is_initialized():
        variables = {"PYTHONPATH": _python_path()}
        ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": variables})
    quiet_logging()
    logs = str(folder / LOGS)
    return RayPipelineExecutor(
        [TokenizeUnits(str(folder))], workers, workers, logging_dir=logs, skip_completed=False, log_first=False
    )


def slurm_executor(
    folder: Path, workers: int, partition: str, time_limit: str, options: dict[str, str]
) -> SlurmPipelineExecutor:
    """A job array that tokenizes, and a job after it that writes the shards."""
    quiet_logging()
    path = os.environ.get("PATH", "")
    commands = [
        f"export PATH={shlex.quote(os.path.dirname(sys.executable) + os.pathsep + path)}",
        f"export PYTHONPATH={shlex.quote(_python_path())}",
    ]
    shared = {
        "time": time_limit,
        "partition": partition,
        "qos": "",
        "env_command": "\n".join(commands),
        "sbatch_args": options,
        "skip_completed": False,
        "mem_per_cpu_gb": 4,
    }
    tokenize = SlurmPipelineExecutor(
        [TokenizeUnits(str(folder))],
        tasks=workers,
        job_name="tokenize",
        logging_dir=str(folder / LOGS / "tokenize"),
        **shared,
    )
    return SlurmPipelineExecutor(
        [AssembleShards(str(folder))],
        tasks=1,
        job_name="assemble",
        logging_dir=str(folder / LOGS / "assemble"),
        depends=tokenize,
        **shared,
    )


def slurm_scripts(folder: Path, *options) -> list[str]:
    """What `slurm_executor` would give to sbatch, one script a job; nothing is submitted or written to `folder`."""
    scripts = []

    def printed(script: str, _, *options) -> str:
        scripts.append(f"# sbatch {' '.join(options)}\n" + script.replace(str(temporary), str(folder)))
        return str(len(scripts))

    with TemporaryDirectory() as temporary, patch("datatrove.executor.slurm.launch_slurm_job", printed):
        slurm_executor(Path(temporary), *options).run()
    return scripts


def run_and_watch(executor: PipelineExecutor, folder: Path, plan: PrepareSpec, on_progress: Progress):
    """Run an executor to its end; the files of the units tell how far it is.

    Raises:
        ValueError: If a unit cannot be read, or a worker was killed.
    """
    failed: list[BaseException] = []

    def run():
        try:
            executor.run()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    workers: dict[int, multiprocess.Process] = {}
    died_at = None
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        finished = finished_partitions(folder)
        on_progress(len(finished), len(plan.units), sum(tokens for tokens, _ in finished.values()))
        # A pool starts another process for one that was killed, and waits for the lost result forever.
        workers.update({process.pid: process for process in multiprocess.active_children()})
        if died_at is None and any(process.exitcode not in (None, 0) for process in workers.values()):
            died_at = time.monotonic()
        if died_at and thread.is_alive() and time.monotonic() - died_at > PATIENCE_SECONDS:
            raise ValueError(
                "a worker was killed, most often because there was not enough memory: run the same command again, with "
                "fewer --workers; what is finished is kept."
            )
    if failed:
        raise failed[0]


def quiet_logging():
    """datatrove's logs go to its files, not to the terminal."""
    datatrove_logging.sys = SimpleNamespace(stderr=SimpleNamespace(write=lambda line: None, flush=lambda: None))
    datatrove_logging.setup_default_logger()


def _manager() -> SyncManager:
    """The process that datatrove counts its workers by; by itself it would live on when this one is killed."""
    manager = SyncManager(ctx=multiprocess.get_context())
    manager.start(exit_with_parent)
    return manager


def _no_manager() -> SimpleNamespace:
    """Where there is one worker, it is this process, and needs nothing but a queue."""
    return SimpleNamespace(Queue=queue.Queue, shutdown=lambda: None)


def _python_path() -> str:
    """So that this package is found where it is not installed."""
    return os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
