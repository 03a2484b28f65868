"""What must hold of a checkpoint before a run continues from it; it may be damaged, half copied, or a stranger's.

The checksums say that the files are those that were written. Whether those are a checkpoint is checked here, in one
place: the training reads entries and tensors without looking at them again.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from modeling_gpt2repro.runs.folder import step_of
from modeling_gpt2repro.runtime.attention import IMPLEMENTATIONS
from modeling_gpt2repro.storage.checksums import verify_checksums
from modeling_gpt2repro.storage.json_files import is_count, is_size, is_text, read_json_object, require, shown

from .muon import is_muon_matrix
from .optimization import OPTIMIZERS, SCHEDULE, SCHEDULES
from .optimizer_state import OPTIMIZER_FILE, RANDOM_FILE
from .outliers import WINDOW_STEPS
from .state import TrainState

STATE_FOLDER = "training_state"
STATE_FILE = f"{STATE_FOLDER}/state.json"
CHECKSUMS_FILE = f"{STATE_FOLDER}/files.json"  # written last: its presence means that all files are there
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
REQUIRED = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    f"{STATE_FOLDER}/{OPTIMIZER_FILE}",
    f"{STATE_FOLDER}/{RANDOM_FILE}",
    STATE_FILE,
)
STEP_FOLDER = re.compile(r"step-[0-9]+")
ADAM_STATE = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter
MUON_STATE = ("momentum_buffer",)  # and Muon of each matrix
WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
FLOAT32_LIMIT = 3.4e38


def checkpoint_problem(checkpoint: Path, read_config: Callable[[Path], object]) -> str | None:
    """What is wrong with a checkpoint, to be put after its name: "is damaged (...)"; None if it is whole.

    Args:
        read_config: Raises ValueError if the config is not one of the model's, which this room does not know.
    """
    if not (checkpoint / CHECKSUMS_FILE).is_file():
        return f"has no {CHECKSUMS_FILE} (an unfinished copy?)"
    problem = verify_checksums(checkpoint, CHECKSUMS_FILE, REQUIRED)
    if problem is None:
        try:
            state = read_checked_state(checkpoint)
            check_tensors(checkpoint, state["optimizer"])
            read_config(checkpoint)
        except (OSError, ValueError) as error:
            problem = str(error).rstrip(".")
    return None if problem is None else f"is damaged ({problem})"


def read_checked_state(checkpoint: Path) -> dict:
    """The checkpoint's state.json, with what older versions, or runs in another precision, did not write.

    Raises:
        ValueError: If no training can have written it.
    """
    try:
        not_in_all = {"schedule": {}, "card": None, "optimizer": "adamw", "loss_scale": None, "attention": {}}
        state = {**not_in_all, **read_json_object(checkpoint / STATE_FILE)}
        for name in ("progress", "data", "guard", "identity", "schedule", "attention"):
            require(type(state.get(name)) is dict, f"{name} is {shown(state.get(name))}")
        step = step_of(checkpoint) if STEP_FOLDER.fullmatch(checkpoint.name) else None
        _check_progress(state["progress"], step)
        _check_data(state["data"], state["progress"]["step"])
        _check_guard(state["guard"])
        _check_loss_scale(state["loss_scale"])
        _check_schedule(state["schedule"])
        origin, card = state.get("origin"), state["card"]
        require(is_text(origin), f"origin is {shown(origin)}")
        require(card is None or type(card) is dict, f"card is {shown(card)}")
        require(state["optimizer"] in OPTIMIZERS, f"optimizer is {shown(state['optimizer'])}")
        attention = state["attention"].get("implementation")  # no name of a kernel that would be downloaded
        require(not state["attention"] or attention in IMPLEMENTATIONS, f"attention is {shown(attention)}")
    except (OSError, ValueError) as error:
        raise ValueError(f"{STATE_FILE}: {error}") from None
    return state


def check_tensors(checkpoint: Path, optimizer: str):
    """Compare config, weights, optimizer and generators with each other, and look for NaN and infinity.

    Args:
        optimizer: One of OPTIMIZERS, which decides what there must be of each parameter.

    Raises:
        ValueError: With the first tensor that is missing, unknown, of another shape or dtype, or not finite.
    """
    folder = checkpoint / STATE_FOLDER
    shapes = _shapes_of_finite_tensors(checkpoint / WEIGHTS_FILE, WEIGHT_DTYPES)
    _check_config(checkpoint, shapes)
    expected = {
        f"{name}.{kind}": () if kind == "step" else shape
        for name, shape in shapes.items()
        for kind in (MUON_STATE if optimizer == "muon" and is_muon_matrix(name, len(shape)) else ADAM_STATE)
    }
    found = _shapes_of_finite_tensors(folder / OPTIMIZER_FILE, ("F32",))
    for name in [*expected, *found]:
        require(name in found, f"{OPTIMIZER_FILE} has no {shown(name)}")
        require(name in expected, f"{OPTIMIZER_FILE} has {shown(name)}, and {WEIGHTS_FILE} no such parameter")
        require(found[name] == expected[name], f"{shown(name)} has the shape {found[name]}, not {expected[name]}")
    _check_random(folder / RANDOM_FILE)


def _check_progress(progress: dict, step: int | None):
    names = {field.name for field in fields(TrainState)}
    for name, value in progress.items():
        require(name in names, f"progress has {shown(name)}")
        fits = is_size(value) if name == "train_seconds" else is_count(value)
        require(fits, f"{name} is {shown(value)}")
    require({"step", "tokens"} <= set(progress), "progress has no step or no tokens")
    require(step in (None, progress["step"]), f"it is of step {progress['step']}")


def _check_data(data: dict, step: int):
    """{} of shards, whose order follows from the step; of a stream the position of each logical shard."""
    if not data:
        return
    require(data.get("next_step") == step, f"next_step is {shown(data.get('next_step'))} after step {step}")
    lanes = data.get("lanes")
    require(type(lanes) is dict and len(lanes) > 0, f"lanes is {shown(lanes)}")
    for number in range(len(lanes)):
        position = lanes.get(str(number))
        is_position = type(position) is list and len(position) == 2 and all(map(is_count, position))
        require(is_position, f"lane {number} is {shown(position)}")


def _check_guard(guard: dict):
    """{} without `--skip_outliers`."""
    if not guard:
        return
    window = guard.get("window")
    is_window = type(window) is list and [len(row) if type(row) is list else 0 for row in window] == [WINDOW_STEPS] * 2
    require(is_window, f"window has not 2 x {WINDOW_STEPS} numbers")
    require(all(is_size(value) and value < FLOAT32_LIMIT for row in window for value in row), "window has bad numbers")
    require(is_count(guard.get("good_steps")), f"good_steps is {shown(guard.get('good_steps'))}")


def _check_loss_scale(scaler: dict | None):
    """What `torch.amp.GradScaler` keeps; None if the run is not in fp16."""
    if scaler is None:
        return
    limits = {"scale": (0, FLOAT32_LIMIT), "growth_factor": (1, 1e3), "backoff_factor": (0, 1)}
    names = {*limits, "growth_interval", "_growth_tracker"}
    require(type(scaler) is dict and set(scaler) == names, f"loss_scale is {shown(scaler)}")
    for name, (low, high) in limits.items():
        require(type(scaler[name]) in (int, float) and low < scaler[name] < high, f"{name} is {shown(scaler[name])}")
    for name, minimum in (("growth_interval", 1), ("_growth_tracker", 0)):
        fits = is_count(scaler[name], minimum) and scaler[name] < 2**31
        require(fits, f"{name} is {shown(scaler[name])}")


def _check_schedule(schedule: dict):
    """{} in checkpoints of older versions."""
    kind = schedule.get("lr_scheduler_type", "cosine")
    require(kind in SCHEDULES, f"lr_scheduler_type is {shown(kind)}")
    required = set(SCHEDULE) - {"lr_scheduler_type", *(() if kind == "wsd" else ("cooldown_tokens",))}
    for name in sorted(required) if schedule else ():
        value = schedule.get(name)
        is_tokens = name.endswith(("_tokens", "_per_step"))
        fits = is_count(value, minimum=int(name == "tokens_per_step")) if is_tokens else is_size(value)
        require(fits, f"{name} is {shown(value)}")


def _check_config(checkpoint: Path, shapes: dict[str, tuple[int, ...]]):
    """Before a model of that size is built: is it the size of the weights?"""
    try:
        config = read_json_object(checkpoint / CONFIG_FILE)
    except ValueError as error:
        raise ValueError(f"{CONFIG_FILE}: {error}") from None
    tokens = shapes.get("transformer.wte.weight", ())
    positions = shapes.get("transformer.wpe.weight", ())
    require(len(tokens) == len(positions) == 2, f"{WEIGHTS_FILE} has no embeddings")
    layers = {name.split(".")[2] for name in shapes if name.startswith("transformer.h.")}
    sizes = {"vocab_size": tokens[0], "n_embd": tokens[1], "n_positions": positions[0], "n_layer": len(layers)}
    for name, size in sizes.items():
        value = config.get(name)
        require(value == size, f"{CONFIG_FILE} has {name} {shown(value)}, and {WEIGHTS_FILE} {size}")


def _check_random(path: Path):
    names = set()
    for name, tensor in _tensors(path, ("U8",)):
        names.add(name)
        require(re.fullmatch(r"[0-9]+\.(cpu|cuda|xpu|hpu|mps)", name) is not None, f"{path.name} has {shown(name)}")
        if name.endswith("cpu"):
            try:
                torch.Generator().set_state(tensor)
            except RuntimeError:
                raise ValueError(f"{shown(name)} is not the state of a random number generator") from None
    require("0.cpu" in names, f"{path.name} has no '0.cpu'")


def _shapes_of_finite_tensors(path: Path, dtypes: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, tensor in _tensors(path, dtypes):
        require(tensor.numel() > 0, f"{shown(name)} in {path.name} is empty")
        smallest, largest = tensor.aminmax()  # NaN if there is one: a single pass, and no memory
        require(bool(smallest.isfinite() and largest.isfinite()), f"{shown(name)} in {path.name} has NaN or infinity")
        is_squared = name.endswith((".exp_avg_sq", ".step"))
        require(not is_squared or smallest >= 0, f"{shown(name)} in {path.name} is negative")
        shapes[name] = tuple(tensor.shape)
    return shapes


def _tensors(path: Path, dtypes: tuple[str, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor, one after the other, so that only one is in memory."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                dtype = file.get_slice(name).get_dtype()
                require(dtype in dtypes, f"{shown(name)} in {path.name} has the dtype {dtype}")
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path.name}: {error}") from None
