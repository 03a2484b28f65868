"""run.json: the command, arguments, versions and commit of a run, written before its first step."""

import platform
import re
import subprocess
import tempfile
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

from modeling_gpt2repro.storage.atomic import write_json
from modeling_gpt2repro.storage.json_files import is_size, is_text, read_json_object, require, shown

from .folder import METRICS_FILE, RUN_CONFIG_FILE, SAMPLES_FILE, UPLOAD_LOG

PROJECT = "gpt2repro"  # in pyproject.toml
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "tokenizers", "tiktoken", "safetensors")
# The arguments that plots and model cards show.
NUMBERS = ("train_tokens", "tokens_per_step", "learning_rate", "warmup_tokens", "final_learning_rate_ratio", "seed")
NUMBERS += ("adam_beta1", "adam_beta2", "weight_decay", "max_grad_norm")
OPTIONAL_NUMBERS = ("cooldown_tokens",)
TEXTS = ("shards", "mix", "dataset_name", "tokenizer", "hellaswag", "optimizer", "lr_scheduler_type", "command")
# Where things are and what is shown may change without changing the run.
NOT_COMPARED = ("output_dir", "resume_from_checkpoint", "report_to", "shards", "mix")


def make_writable(folder: Path, flag: str = "output_dir"):
    """Create a folder, and find out before the first step whether it can be written.

    Args:
        flag: That names it.

    Raises:
        ValueError: If it cannot, or a file to which lines are appended is a link: to where, a stranger may have chosen.
    """
    if links := [name for name in (METRICS_FILE, SAMPLES_FILE, UPLOAD_LOG) if (folder / name).is_symlink()]:
        raise ValueError(f"{folder / links[0]} is a link: put the file itself in its place, or delete it.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{flag} ({folder}) cannot be written ({error.strerror}): give another.") from error


def write_run_config(
    output_dir: Path,
    arguments: dict,
    hardware: dict,
    attention: dict,
    data_fingerprint: dict,
    command: str | None = None,
    contamination: str | None = None,
):
    """Write run.json, unless there is one: a resumed run keeps its own.

    Args:
        command: That started the run, see `public_command`; None if a program did.
        contamination: A sentence on benchmark items in the training data; None if they were not looked for.
    """
    if (output_dir / RUN_CONFIG_FILE).exists():
        return
    config = {
        "command": command,
        "arguments": arguments,
        "hardware": hardware,
        "attention": attention,
        "data": data_fingerprint,
        "contamination": contamination,
        **software_record(),
    }
    write_json(output_dir / RUN_CONFIG_FILE, config)


def software_record() -> dict:
    """Versions and commit, for run.json."""
    versions = {PROJECT: project_version(), "python": platform.python_version()}
    versions |= {name: version(name) for name in PACKAGES}
    return {"versions": versions, "commit": current_commit(), "has_uncommitted_changes": has_uncommitted_changes()}


def project_version(file: Path = Path(__file__)) -> str | None:
    """The version of this package: of the checkout that a file, this one, belongs to, else of the installed package.

    A checkout need not be installed, and may lie beside an installed copy of another version. None if it is neither,
    such as a copy of the package's folder alone.
    """
    checkout = file.resolve().parents[2] / "pyproject.toml"
    if checkout.is_file():
        text = checkout.read_text(encoding="utf-8")
        name, its_version = (re.search(rf'^{key} = "([^"]+)"$', text, re.MULTILINE) for key in ("name", "version"))
        if name and its_version and name[1] == PROJECT:
            return its_version[1]
    try:
        return version(PROJECT)
    except PackageNotFoundError:
        return None


def project_address() -> str | None:
    """The address of the repository, by `[project.urls] Repository` of the installed package; None if it has none."""
    try:
        urls = metadata(PROJECT).get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    return next((url.partition(", ")[2] for url in urls if url.startswith("Repository, ")), None)


def environment(config: dict) -> dict:
    """What besides arguments and data can change the bits of a number, by a run.json: hardware, attention, software."""
    hardware = {name: value for name, value in config.get("hardware", {}).items() if name != "peak_flops"}
    attention = {f"attention {name}": value for name, value in config.get("attention", {}).items()}
    return {**hardware, **attention, **config.get("versions", {}), "commit": config.get("commit")}


def environment_changes(config: dict, arguments: dict, here: dict) -> list[str]:
    """What of `here` was different when a run took its steps with these arguments: ["processes 1, now 2"].

    Args:
        config: Its run.json.
        arguments: At that time; with what had changed by then of its environment, see `diff_arguments`.
        here: An `environment`, and arguments of today.
    """
    there = arguments | {name: arguments.get(name, value) for name, value in environment(config).items()}
    there["attention implementation"] = arguments.get("attn_implementation")
    return [f"{name} {there.get(name)}, now {value}" for name, value in here.items() if there.get(name) != value]


def read_run_config(folder: Path) -> dict:
    """Read run.json; {} if there is none.

    Raises:
        OSError: If the disk refuses it.
        ValueError: If it is damaged.
    """
    path = folder / RUN_CONFIG_FILE
    try:
        config = read_json_object(path)
        require("arguments" in config, "it has no arguments")
        for name in ("arguments", "hardware", "data", "versions"):
            require(type(config.get(name, {})) is dict, f"{name} is {shown(config.get(name))}")
        data = config.get("data", {}).get("data", "")
        require(type(data) in (str, dict, list), f"data is {shown(data)}")
        check_argument_types({**config["arguments"], "command": config.get("command")})
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): restore it, or delete it to continue without it.") from error
    return config


def check_argument_types(arguments: dict):
    """Raise ValueError if an argument that plots and cards show is not of its type; old runs may lack some."""
    for name in (*NUMBERS, *OPTIONAL_NUMBERS, *TEXTS):
        value = arguments.get(name)
        fits = is_text(value) if name in TEXTS else is_size(value)
        require(value is None or fits, f"{name} is {shown(value)}")


def is_complete(config: dict) -> bool:
    """Whether it has all that a model card shows; an edited run.json may not."""
    has_hardware = {"device", "processes", "precision"} <= set(config.get("hardware", {}))
    has_arguments = all(config.get("arguments", {}).get(name) is not None for name in NUMBERS)
    return has_hardware and has_arguments and {"commit", "versions"} <= set(config) and "data" in config.get("data", {})


def diff_arguments(output_dir: Path, arguments: dict, hardware: dict, command: str | None = None) -> dict[str, tuple]:
    """Which arguments, and what of the environment, differ from the run's first: name -> (then, now).

    The command that resumed the run is among them, where one is known, and differs by more than the checkpoint.

    Of files only the names are kept: metrics.jsonl, where the difference is recorded, is published with the model.
    """
    config = read_run_config(output_dir)
    saved = config["arguments"] | environment(config) if config else {}
    now = arguments | environment({"hardware": hardware, **software_record()})
    if command and config.get("command"):
        saved["command"], now["command"] = config["command"], command
    return {
        name: (without_folder(saved[name]), without_folder(value))
        for name, value in now.items()
        if name in saved and saved[name] != value and name not in NOT_COMPARED
    }


def without_folder(value: object) -> object:
    """'/home/me/rows.jsonl' -> 'rows.jsonl'; anything but an absolute path stays."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def current_commit(file: Path = Path(__file__)) -> str | None:
    """The git commit of the checkout that a file, this one, belongs to; None for an installed copy.

    Its environment may lie in another project's checkout, whose commit would say nothing about this code.
    """
    if ask_git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return None
    return ask_git(file.parent, "rev-parse", "HEAD") or None


def has_uncommitted_changes(file: Path = Path(__file__)) -> bool:
    """Whether files of that checkout are not as in its commit, which then does not say what code ran."""
    return current_commit(file) is not None and bool(ask_git(file.parent, "status", "--porcelain", "-uno"))


def ask_git(folder: Path, *question: str) -> str | None:
    """What git answers in a folder; None if there is no git, or it refuses."""
    try:
        answer = subprocess.run(["git", *question], cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
