"""The names of all files in a run's folder, except its lock (`LOCK_FILE` in storage/lock.py)."""

from pathlib import Path

RUN_CONFIG_FILE = "run.json"  # arguments, hardware, versions, commit; its presence makes a folder a run
METRICS_FILE = "metrics.jsonl"  # every number of every step, one JSON object a line
SAMPLES_FILE = "samples.jsonl"
HELLASWAG_FILE = "hellaswag.jsonl"  # the scores of the last evaluation, one example a line
BASELINES_FILE = "baselines.json"  # what losses and accuracies are compared with
LOSS_PICTURE = "loss.png"
REPORT_FILE = "report"  # .md or .html, if somebody has asked for one
STOPPED_FILE = "stopped.json"  # there after a run stopped early with a checkpoint: where, and why
CERTIFICATE_FILE = "certificate.json"  # in the model's folder: which steps were taken again, and what came out
# In the model's folder, by protocol: a result as the Hub shows it beside models and in a benchmark's leaderboard.
EVAL_RESULTS = ".eval_results/gpt2repro_hellaswag_{}.yaml"
UPLOAD_LOG = "push.log"
MODEL_FOLDER = "model"  # the final model
DATA_FOLDER = "data"  # the quickstart's tokens


def checkpoint_name(step: int) -> str:
    """500 -> 'step-000500'."""
    return f"step-{step:06d}"


def step_of(checkpoint: Path) -> int:
    """'step-000500' -> 500."""
    return int(checkpoint.name.removeprefix("step-"))


def model_of_run(name: str | Path) -> Path | None:
    """The final model in the folder of a run, or else its last checkpoint; None if there is neither."""
    for folder in (Path(name) / MODEL_FOLDER, *reversed(checkpoints_of_run(name))):
        if (folder / "config.json").is_file():
            return folder


def checkpoints_of_run(name: str | Path) -> list[Path]:
    """The checkpoints in the folder of a run, in the order of their steps."""
    found = [path for path in Path(name).glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=step_of)


def find_run(folder: Path) -> Path:
    """The run's folder: `folder`, or the one around it if it is one of the run's models.

    Raises:
        ValueError: If there is none. A model's folder elsewhere is one if it has metrics.jsonl.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give the --output_dir of a training, or one of its models.")
    folder_of_run = folder.absolute().parent
    is_model = folder.name == MODEL_FOLDER or folder.name.startswith("step-")
    return folder_of_run if is_model and (folder_of_run / METRICS_FILE).is_file() else folder
