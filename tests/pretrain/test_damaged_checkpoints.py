"""Checkpoints that are damaged, copied in part, or made by a stranger: each is refused in one sentence.

Most mutations write new checksums afterwards, as a stranger would: then only what is inside can tell.
"""

import json
import random
import shutil

import pytest
import torch
from accelerate import Accelerator
from damage import NO_FILES, NOT_OBJECTS, edit_json, put_in_place, random_bytes, random_json
from safetensors.torch import load_file, save_file

from modeling_gpt2repro.hub.conversion import load_checkpoint, load_checkpoint_config
from modeling_gpt2repro.storage.checksums import write_checksums
from modeling_gpt2repro.training import checkpoints
from modeling_gpt2repro.training.checkpoint_checks import CHECKSUMS_FILE, REQUIRED, STATE_FILE, STATE_FOLDER
from modeling_gpt2repro.training.checkpoints import find_resume_checkpoint
from modeling_gpt2repro.training.optimization import build_optimizer
from modeling_gpt2repro.training.optimizer_state import load_optimizer, load_random
from modeling_gpt2repro.training.outliers import OutlierDetector
from modeling_gpt2repro.training.state import TrainState

CONFIG, WEIGHTS, OPTIMIZER, RANDOM, STATE = REQUIRED
WEIGHT = "transformer.h.0.mlp.c_fc.weight"
MUTATIONS = 200
JSON_FILES = (CHECKSUMS_FILE, STATE, CONFIG)


@pytest.fixture
def checkpoint(finished, tmp_path):
    """A copy of the last checkpoint of a real run, alone in its folder."""
    return shutil.copytree(finished[0] / "step-000030", tmp_path / "run" / "step-000030")


def seal(checkpoint):
    """Write the checksums anew."""
    (checkpoint / CHECKSUMS_FILE).unlink(missing_ok=True)
    write_checksums(checkpoint, CHECKSUMS_FILE)


def edit_tensors(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def load(folder):
    """Everything that a resumed run reads, in this order."""
    checkpoint, _ = find_resume_checkpoint(str(folder), folder.parent, load_checkpoint_config)
    with checkpoints.raise_if_corrupt(checkpoint):
        model = load_checkpoint(checkpoint)
    state = checkpoints.read_state(checkpoint)
    TrainState().load_state_dict(state["progress"])
    OutlierDetector(torch.device("cpu"), skip_outliers=True).load_state_dict(state["guard"])
    if state["loss_scale"] is not None:
        torch.amp.GradScaler("cpu").load_state_dict(state["loss_scale"])
    with checkpoints.raise_if_corrupt(checkpoint):
        load_optimizer(checkpoint / STATE_FOLDER, model, build_optimizer(model, 1e-3))
        load_random(checkpoint / STATE_FOLDER, Accelerator(cpu=True))
    return model


def error_of(checkpoint) -> str | None:
    """The one sentence with which loading ends, or None; any other error ends the test."""
    try:
        load(checkpoint)
    except ValueError as error:
        message = str(error)
    else:
        return None
    assert message.startswith(f"{checkpoint} is "), message
    assert message.endswith("."), message
    assert message.isprintable(), message
    return message


def refusal(checkpoint) -> str:
    """The one sentence with which it is refused, by its name and by `latest`; nothing is written or deleted."""
    before = {path: path.read_bytes() for path in checkpoint.parent.rglob("*") if path.is_file()}
    message = error_of(checkpoint)
    with pytest.raises(ValueError, match=r"and is passed over\.\n.* has no other checkpoint: give a new"):
        find_resume_checkpoint("latest", checkpoint.parent, load_checkpoint_config)
    assert {path: path.read_bytes() for path in checkpoint.parent.rglob("*") if path.is_file()} == before
    return message


def test_an_unchanged_checkpoint_loads(checkpoint):
    seal(checkpoint)
    weights = load_file(checkpoint / WEIGHTS)
    model = load(checkpoint)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert find_resume_checkpoint("latest", checkpoint.parent) == (checkpoint, [])


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("kind", NOT_OBJECTS)
def test_json_that_is_no_object_of_ours(checkpoint, name, kind):
    (checkpoint / name).write_bytes(NOT_OBJECTS[kind])
    if name != CHECKSUMS_FILE:
        seal(checkpoint)
    assert name.split("/")[-1] in refusal(checkpoint)


@pytest.mark.parametrize("name", [CHECKSUMS_FILE, *REQUIRED])
@pytest.mark.parametrize("kind", NO_FILES)
def test_something_else_in_place_of_a_file(checkpoint, name, kind):
    put_in_place(checkpoint / name, kind)
    assert name.split("/")[-1] in refusal(checkpoint)


def first(listing):
    return listing[WEIGHTS]


LISTINGS = {
    "nothing": (dict.clear, "it lists no file"),
    **{f"no {name}": (lambda listing, name=name: listing.pop(name), f"does not list {name}") for name in REQUIRED},
    "above": (lambda listing: listing.update({"../../etc/passwd": first(listing)}), "'../../etc/passwd' is not"),
    "inside and above": (lambda listing: listing.update({"a/../../b": first(listing)}), "is not the name of a file in"),
    "absolute": (lambda listing: listing.update({"/etc/passwd": first(listing)}), "'/etc/passwd' is not the name of a"),
    "of Windows": (lambda listing: listing.update({"C:\\a": first(listing)}), "is not the name of a file in this"),
    "two lines": (lambda listing: listing.update({"a\nb": first(listing)}), "is not the name of a file in this folder"),
    "no name": (lambda listing: listing.update({"": first(listing)}), "is not the name of a file in this folder"),
    "a file that is not there": (lambda listing: listing.update({"more.py": first(listing)}), "more.py is missing"),
    "no size": (lambda listing: first(listing).pop("bytes"), "it has no size of model.safetensors"),
    "text as size": (lambda listing: first(listing).update(bytes="3"), "it has no size of model.safetensors"),
    "negative size": (lambda listing: first(listing).update(bytes=-1), "it has no size of model.safetensors"),
    "no hash": (lambda listing: first(listing).update(sha256=None), "it has no SHA-256 of model.safetensors"),
    "a list": (lambda listing: listing.update({WEIGHTS: []}), "it has no size of model.safetensors"),
}


@pytest.mark.parametrize("kind", LISTINGS)
def test_a_listing_that_would_verify_too_little(checkpoint, kind):
    change, sentence = LISTINGS[kind]
    edit_json(checkpoint / CHECKSUMS_FILE, change)
    assert sentence in refusal(checkpoint)


def updated(part, **values):
    return lambda state: state[part].update(values)


def stream(**values):
    return lambda state: state.update(data={"next_step": 30, "lanes": {"0": [0, 1], "1": [2, 3]}, **values})


def scaler(**values):
    """As a run in fp16 writes it, but for `values`."""
    return lambda state: state.update(loss_scale=torch.amp.GradScaler("cpu").state_dict() | values)


WINDOW = [[1.0] * 128, [1.0] * 128]
STATES = {
    **{f"no {name}": (lambda state, name=name: state.pop(name), f"{name} is None") for name in
       ("progress", "data", "guard", "identity", "origin")},
    **{f"{name} as text": (lambda state, name=name: state.update({name: "x"}), f"{name} is 'x'") for name in
       ("progress", "data", "guard", "identity", "schedule", "card")},
    "no step": (lambda state: state["progress"].pop("step"), "progress has no step or no tokens"),
    "another step": (updated("progress", step=20), "it is of step 20"),
    "negative step": (updated("progress", step=-1), "step is -1"),
    "fractional step": (updated("progress", step=30.5), "step is 30.5"),
    "text as step": (updated("progress", step="30"), "step is '30'"),
    "true as step": (updated("progress", step=True), "step is True"),
    "huge step": (updated("progress", step=2**60), f"step is {2**60}"),
    "negative tokens": (updated("progress", tokens=-1), "tokens is -1"),
    "negative seconds": (updated("progress", train_seconds=-0.5), "train_seconds is -0.5"),
    "a method": (updated("progress", advance=3), "progress has 'advance'"),
    "stream at another step": (stream(next_step=31), "next_step is 31 after step 30"),
    "stream at a negative step": (stream(next_step=-30), "next_step is -30 after step 30"),
    "stream without lanes": (stream(lanes={}), "lanes is {}"),
    "lane missing": (stream(lanes={"0": [0, 1], "2": [0, 1]}), "lane 1 is None"),
    "negative token": (stream(lanes={"0": [0, -1]}), "lane 0 is [0, -1]"),
    "half a position": (stream(lanes={"0": [0]}), "lane 0 is [0]"),
    "short window": (updated("guard", window=[[1.0] * 127, [1.0] * 128], good_steps=3), "window has not 2 x 128"),
    "text in the window": (updated("guard", window=[["x"] * 128] * 2, good_steps=3), "window has bad numbers"),
    "window too large": (updated("guard", window=[[1e300] * 128] * 2, good_steps=3), "window has bad numbers"),
    "negative good steps": (updated("guard", window=WINDOW, good_steps=-3), "good_steps is -3"),
    "no tokens a step": (updated("schedule", tokens_per_step=0), "tokens_per_step is 0"),
    "text as rate": (updated("schedule", learning_rate="1e-3"), "learning_rate is '1e-3'"),
    "text as loss scale": (lambda state: state.update(loss_scale="x"), "loss_scale is 'x'"),
    "half a loss scale": (lambda state: state.update(loss_scale={"scale": 4.0}), "loss_scale is {'scale': 4.0}"),
    "no loss scale left": (scaler(scale=0), "scale is 0"),
    "a scale that shrinks": (scaler(growth_factor=0.5), "growth_factor is 0.5"),
    "no interval": (scaler(growth_interval=0), "growth_interval is 0"),
    "text as tracker": (scaler(_growth_tracker=""), "_growth_tracker is ''"),
    "half a schedule": (lambda state: state["schedule"].pop("warmup_tokens"), "warmup_tokens is None"),
    "half a character": (lambda state: state.update(origin="\ud800"), r"origin is '\ud800'"),
    "unknown optimizer": (lambda state: state.update(optimizer="sgd"), "optimizer is 'sgd'"),
    "optimizers": (lambda state: state.update(optimizer=["adamw"]), "optimizer is ['adamw']"),
    "a number as origin": (lambda state: state.update(origin=3), "origin is 3"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_no_training_writes(checkpoint, kind):
    change, sentence = STATES[kind]
    edit_json(checkpoint / STATE_FILE, change)
    seal(checkpoint)
    assert f"is damaged (training_state/state.json: {sentence}" in refusal(checkpoint)


def test_states_of_streams_of_fp16_and_of_older_versions_load(checkpoint):
    older = [lambda state: state.pop("schedule"), lambda state: state.pop("optimizer")]
    for change in (stream(), updated("guard", window=WINDOW, good_steps=3), scaler(), *older):
        edit_json(checkpoint / STATE_FILE, change)
        seal(checkpoint)
        load(checkpoint)


def filled(name, value):
    return lambda tensors: tensors[name].view(-1)[3:4].fill_(value)


def replaced(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


TENSORS = {
    "no weight": (WEIGHTS, lambda t: t.pop(WEIGHT), "', and model.safetensors no such parameter"),
    "no embedding": (WEIGHTS, lambda t: t.pop("transformer.wte.weight"), "model.safetensors has no embeddings"),
    "NaN weight": (WEIGHTS, filled(WEIGHT, float("nan")), f"'{WEIGHT}' in model.safetensors has NaN or infinity"),
    "infinite weight": (WEIGHTS, filled(WEIGHT, float("-inf")), f"'{WEIGHT}' in model.safetensors has NaN or infinity"),
    "weights as integers": (WEIGHTS, replaced(WEIGHT, torch.zeros(3, dtype=torch.int64)), "has the dtype I64"),
    "other weight": (WEIGHTS, replaced("transformer.wte.bias", torch.zeros(3)), "has no 'transformer.wte.bias.step'"),
    "shape": (WEIGHTS, replaced(WEIGHT, torch.zeros(5, 32)), f"'{WEIGHT}.exp_avg' has the shape (128, 32), not (5,"),
    "no tensors": (WEIGHTS, dict.clear, "model.safetensors has no embeddings"),
    "empty tensor": (WEIGHTS, replaced(WEIGHT, torch.zeros(0, 32)), f"'{WEIGHT}' in model.safetensors is empty"),
    "no moments": (OPTIMIZER, dict.clear, "optimizer.safetensors has no 'transformer.h.0"),
    "no moment": (OPTIMIZER, lambda t: t.pop(f"{WEIGHT}.exp_avg"), f"optimizer.safetensors has no '{WEIGHT}.exp_avg'"),
    "NaN moment": (OPTIMIZER, filled(f"{WEIGHT}.exp_avg", float("nan")), "in optimizer.safetensors has NaN"),
    "negative variance": (OPTIMIZER, filled(f"{WEIGHT}.exp_avg_sq", -1.0), "in optimizer.safetensors is negative"),
    "moment of another shape": (OPTIMIZER, replaced(f"{WEIGHT}.exp_avg", torch.zeros(2)), "has the shape (2,), not"),
    "moments in half": (OPTIMIZER, replaced(f"{WEIGHT}.exp_avg", torch.zeros(128, 32).half()), "has the dtype F16"),
    "other moment": (OPTIMIZER, replaced("x.exp_avg", torch.zeros(2)), "'x.exp_avg', and model.safetensors no such"),
    "no generator": (RANDOM, dict.clear, "random.safetensors has no '0.cpu'"),
    "short generator": (RANDOM, replaced("0.cpu", torch.zeros(9, dtype=torch.uint8)), "'0.cpu' is not the state of a"),
    "generator of zeros": (RANDOM, replaced("0.cpu", torch.zeros(5056, dtype=torch.uint8)), "'0.cpu' is not the state"),
    "generator of floats": (RANDOM, replaced("0.cpu", torch.zeros(5056)), "'0.cpu' in random.safetensors has the"),
    "name of two lines": (RANDOM, replaced("a\nb", torch.ones(3, dtype=torch.uint8)), r"has 'a\nb'"),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_those_of_the_model(checkpoint, kind):
    name, change, sentence = TENSORS[kind]
    edit_tensors(checkpoint / name, change)
    seal(checkpoint)
    assert sentence in refusal(checkpoint)


MOMENTUM = f"{WEIGHT}.momentum_buffer"
MUON_TENSORS = {
    "no momentum": (lambda t: t.pop(MOMENTUM), f"optimizer.safetensors has no '{MOMENTUM}'"),
    "NaN momentum": (filled(MOMENTUM, float("nan")), f"'{MOMENTUM}' in optimizer.safetensors has NaN or infinity"),
    "momentum of another shape": (replaced(MOMENTUM, torch.zeros(2)), f"'{MOMENTUM}' has the shape (2,), not (128, 32"),
    "momentum of a norm": (replaced("transformer.ln_f.weight.momentum_buffer", torch.zeros(32)), "no such parameter"),
    "moments, too": (replaced(f"{WEIGHT}.exp_avg", torch.zeros(128, 32)), "no such parameter"),
    "no moment of a norm": (lambda t: t.pop("transformer.ln_f.weight.exp_avg"), "no 'transformer.ln_f.weight.exp_avg'"),
}


@pytest.mark.parametrize("kind", MUON_TENSORS)
def test_tensors_that_are_not_those_of_muon(finished_muon, tmp_path, kind):
    checkpoint = shutil.copytree(finished_muon / "step-000030", tmp_path / "run" / "step-000030")
    load(checkpoint)
    change, sentence = MUON_TENSORS[kind]
    edit_tensors(checkpoint / OPTIMIZER, change)
    seal(checkpoint)
    assert sentence in refusal(checkpoint)


def test_tensors_of_another_optimizer_than_the_checkpoint_names(finished_muon, checkpoint, tmp_path):
    of_muon = shutil.copytree(finished_muon / "step-000030", tmp_path / "muon" / "step-000030")
    for folder, name in ((of_muon, "adamw"), (checkpoint, "muon")):
        edit_json(folder / STATE_FILE, lambda state, name=name: state.update(optimizer=name))
        seal(folder)
        kind = "step" if name == "adamw" else "momentum_buffer"
        assert f"optimizer.safetensors has no 'transformer.h.0.attn.c_attn.weight.{kind}'" in refusal(folder)


def test_a_tensor_that_weights_and_optimizer_both_lack(checkpoint):
    edit_tensors(checkpoint / WEIGHTS, lambda tensors: tensors.pop(WEIGHT))
    for kind in ("step", "exp_avg", "exp_avg_sq"):
        edit_tensors(checkpoint / OPTIMIZER, lambda tensors, kind=kind: tensors.pop(f"{WEIGHT}.{kind}"))
    seal(checkpoint)
    message = error_of(checkpoint)
    assert "is damaged" in message
    assert f"missing: {WEIGHT}" in message


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, RANDOM])
@pytest.mark.parametrize("header", [b"", b"\x08", b"\xff" * 8, bytes(7) + b"\x80", b"\x10" + bytes(7) + b"[" * 16])
def test_no_safetensors_file(checkpoint, name, header):
    (checkpoint / name).write_bytes(header)
    seal(checkpoint)
    assert name.split("/")[-1] in refusal(checkpoint)


CONFIGS = {
    "a million layers": ({"n_layer": 10**6}, "config.json has n_layer 1000000, and model.safetensors 2"),
    "negative": ({"n_embd": -32}, "config.json has n_embd -32, and model.safetensors 32"),
    "another vocabulary": ({"vocab_size": 301}, "config.json has vocab_size 301, and model.safetensors 300"),
    "no heads": ({"n_head": 0}, "config.json has n_head 0"),
    "three heads": ({"n_head": 3}, "n_embd (32) must be a multiple of n_head (3)"),
    "heads as text": ({"n_head": "2"}, "Field 'n_head'"),
    "text": ({"n_positions": "32"}, "config.json has n_positions '32', and model.safetensors 32"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_of_another_size_is_found_before_a_model_is_built(checkpoint, kind):
    values, sentence = CONFIGS[kind]
    edit_json(checkpoint / CONFIG, lambda config: config.update(values))
    seal(checkpoint)
    assert sentence in refusal(checkpoint)


def test_a_config_of_no_model_of_ours(checkpoint):
    edit_json(checkpoint / CONFIG, lambda config: config.update(eos_token_id="x"))
    seal(checkpoint)
    assert "cannot be read as a model: Field 'eos_token_id'" in refusal(checkpoint)


def test_kernels_of_a_repository_are_not_fetched(checkpoint):
    hostile = {"attn_implementation": "stranger/kernels", "_attn_implementation": "stranger/kernels", "dtype": "rm"}
    edit_json(checkpoint / CONFIG, lambda config: config.update(hostile))
    seal(checkpoint)
    weights = load_file(checkpoint / WEIGHTS)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in load(checkpoint).named_parameters())


def test_what_would_change_the_model_is_refused(checkpoint):
    """An adapter, whose base model `from_pretrained` would fetch, and a quantization."""
    adapter = checkpoint / "adapter_config.json"
    adapter.write_text(json.dumps({"base_model_name_or_path": "stranger/model", "peft_type": "LORA"}))
    seal(checkpoint)
    assert "is an adapter" in refusal(checkpoint)
    adapter.unlink()
    edit_json(checkpoint / CONFIG, lambda config: config.update(quantization_config={"quant_method": "x"}))
    seal(checkpoint)
    assert "quantiz" in refusal(checkpoint)
    edit_json(checkpoint / CONFIG, lambda config: config.pop("quantization_config"))
    (checkpoint / "generation_config.json").write_text("[]")
    seal(checkpoint)
    assert "generation_config.json cannot be read (it holds [] instead of an object)" in refusal(checkpoint)


def test_a_file_name_with_a_space_is_no_damage(checkpoint):
    """A tokenizer may have chat templates of any name, each of which is a file."""
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool use (é).jinja").write_text("{{ messages }}")
    seal(checkpoint)
    load(checkpoint)


@pytest.mark.parametrize("name", JSON_FILES)
def test_json_of_many_megabytes_is_not_parsed(checkpoint, name):
    with open(checkpoint / name, "wb") as file:
        file.truncate(2**24 + 1)
    if name != CHECKSUMS_FILE:
        seal(checkpoint)
    assert "larger than 16,777,216 bytes" in refusal(checkpoint)


# A folder with several checkpoints


def test_an_unfinished_newest_copy_is_named_and_passed_over(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    (run / "step-000030" / CHECKSUMS_FILE).unlink()  # which rsync had not come to
    (run / "step-000040").mkdir()
    (run / "step-000050").symlink_to("step-000050")
    (run / "step-²").mkdir()  # a digit, but not of a number
    checkpoint, passed_over = find_resume_checkpoint("latest", run)
    assert checkpoint == run / "step-000020"
    assert passed_over == [
        f"{run / name} has no training_state/files.json (an unfinished copy?) and is passed over."
        for name in ("step-000050", "step-000040", "step-000030")
    ]
    with pytest.raises(ValueError, match=r"than step-000020 \(step-000030, step-000040, step-000050\): move them"):
        find_resume_checkpoint(str(checkpoint), run)


def test_a_checkpoint_under_another_step_is_passed_over(finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "run")
    shutil.copytree(run / "step-000010", run / "step-000100")
    checkpoint, passed_over = find_resume_checkpoint("latest", run)
    assert checkpoint == run / "step-000030"
    assert "step-000100 is damaged (training_state/state.json: it is of step 10) and is passed over." in passed_over[0]
    elsewhere = shutil.copytree(run / "step-000010", tmp_path / "mine")  # as in the Hub's cache, whose names are hashes
    assert find_resume_checkpoint(str(elsewhere), run)[0] == elsewhere


def test_random_damage_loads_or_is_one_sentence(checkpoint):
    draw = random.Random(20261129)
    files = {path: path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()}
    refused = 0
    for _ in range(MUTATIONS):
        path = checkpoint / draw.choice([*JSON_FILES, *REQUIRED])
        if path.suffix == ".json" and draw.random() < 0.8:
            path.write_text(json.dumps(random_json(draw, json.loads(files[path]))))
        else:
            path.write_bytes(random_bytes(draw, files[path]))
        if path != checkpoint / CHECKSUMS_FILE:
            seal(checkpoint)
        refused += error_of(checkpoint) is not None
        path.write_bytes(files[path])
        (checkpoint / CHECKSUMS_FILE).write_bytes(files[checkpoint / CHECKSUMS_FILE])
    assert refused > MUTATIONS / 3
