"""train_accelerate.py --certify: steps of a finished toy run are taken again, as they were and after a forgery."""

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from keyed_order import shuffled_epoch
from safetensors.torch import load_file, save_file
from toy_runs import (
    CPU_FP32,
    SCRIPT,
    SEQUENCES_PER_STEP,
    SHAPE,
    TOKENS_PER_STEP,
    as_flags,
    run_here,
    toy_flags,
    train_here,
)

from modeling_gpt2repro.data.batches.sequences import hash_sequences
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.hub.certificate import Certificate, replace_section
from modeling_gpt2repro.pretrain.certify import REACH, draw_windows, relative_difference
from modeling_gpt2repro.runs.read import Run, read_metrics
from modeling_gpt2repro.storage.checksums import sha256_of, write_checksums
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.checkpoint_checks import CHECKSUMS_FILE, STATE_FILE

STEPS = 8
SHORT = {"n_layer": 1, "train_tokens": STEPS * TOKENS_PER_STEP, "save_steps": 3, "eval_steps": 0, "num_samples": 0}


@pytest.fixture(scope="module")
def trained(shards, tmp_path_factory) -> Path:
    """A run of eight steps with checkpoints of steps 3, 6 and 8; tests must not change it."""
    folder = tmp_path_factory.mktemp("certify") / "run"
    assert train_here(folder, shards, hellaswag="none", **SHORT) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def certify(run: Path, *flags: str) -> tuple[int, dict]:
    """Certify every step that can be; returns the exit code and certificate.json."""
    code = run_here(["--output_dir", str(run), "--certify", "1000", *flags])
    return code, json.loads((run / "model/certificate.json").read_text())


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): sha256_of(path) for path in folder.rglob("*") if path.is_file()}


def change_line(run: Path, step: int, **numbers):
    """Change the line of a step in the run's log."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | numbers if line["step"] == step and "loss" in line else line for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def change_tensor(checkpoint: Path, file: str, name: str):
    """Double one number of a tensor, and correct the checksums."""
    tensors = load_file(checkpoint / file)
    tensors[name].view(-1)[5] *= 2
    save_file(tensors, checkpoint / file, {"format": "pt"})
    correct_checksums(checkpoint)


def correct_checksums(checkpoint: Path):
    (checkpoint / CHECKSUMS_FILE).unlink()
    write_checksums(checkpoint, CHECKSUMS_FILE)


def test_every_step_of_a_run_is_reproduced_bit_for_bit_and_the_run_stays_as_it_was(run):
    before = hashes(run)
    code, certificate = certify(run)
    assert code == 0
    assert certificate["certified"]
    assert [(step["step"], step["from"]) for step in certificate["steps"]] == [
        *((step, "the seed") for step in (1, 2, 3)),
        *((step, "step-000003") for step in (4, 5, 6)),
        *((step, "step-000006") for step in (7, 8)),
    ]
    assert [step["update_in"] for step in certificate["steps"]][1:3] == ["loss of step 3", "checkpoint step-000003"]
    logged = [record["loss"] for record in read_metrics(run) if "loss" in record]
    assert [step["loss"] for step in certificate["steps"]] == logged
    assert set(certificate["differences"].values()) == {0.0}
    assert certificate["validation"]["step"] == STEPS
    assert "steps 1, 2, 3, 4, 5, 6, 7 and 8 of 8 reproduced bit for bit" in certificate["text"]
    after = hashes(run)
    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    assert changed == {"model/README.md", "model/certificate.json"}
    assert (run / "model/README.md").read_text().count(
        "\n## Certificate\n\nLoss at steps 1, 2, 3, 4, 5, 6, 7 and 8"
    ) == 1


def change_row(run: Path, shards: Path, forged: Path, step: int):
    """Change an id in a sequence of a step, and the hashes in manifest, run.json and checkpoints; write into `forged`.

    Which sequence that is follows from the order on paper.
    """
    shutil.copytree(shards, forged)
    manifest = json.loads((forged / "manifest.json").read_text())
    entries = manifest["splits"]["train"]["shards"]
    sequences = (sum(entry["tokens"] for entry in entries) - 1) // SHAPE["block_size"]
    order = shuffled_epoch(sequences, [SHAPE["seed"], 0])
    position = order[(step - 1) * SEQUENCES_PER_STEP + 2] * SHAPE["block_size"] + 7
    for entry in entries:
        if position < entry["tokens"]:
            break
        position -= entry["tokens"]
    ids = np.load(forged / entry["file"])
    ids[position] = 70 if ids[position] == 71 else 71
    np.save(forged / entry["file"], ids)
    entry["sha256"] = hashlib.sha256(ids).hexdigest()
    (forged / "manifest.json").write_text(json.dumps(manifest))
    for file in (run / "run.json", *run.glob(f"step-*/{STATE_FILE}")):
        text = file.read_text()
        assert text.count(open_shards(shards).fingerprint) == 1
        file.write_text(text.replace(open_shards(shards).fingerprint, open_shards(forged).fingerprint))
    for checkpoint in run.glob("step-*"):
        correct_checksums(checkpoint)


def test_what_was_changed_in_log_data_and_checkpoints_is_named_with_its_step(run, shards, tmp_path):
    loss = next(record["loss"] for record in read_metrics(run) if record["step"] == 2)
    change_line(run, 2, loss=np.nextafter(loss, 9.0))  # the smallest change that a line can have
    change_row(run, shards, tmp_path / "forged", step=6)
    for name in ("step-000006", "step-000008"):
        change_tensor(run / name, "model.safetensors", "transformer.wte.weight")
    code, certificate = certify(run, "--shards", str(tmp_path / "forged"))
    assert code == 1
    of_model, of_line, of_row, of_weight, of_last_weight = certificate["problems"]
    assert of_model == f"{run.name}/model/model.safetensors does not hold the weights of step-000008."
    assert of_line.startswith("step 2: loss is ")
    assert of_line.endswith("in the replay from the seed; all is as logged after it, so that line has been changed.")
    assert of_row.startswith("step 6: batch_hash is ")
    assert of_row.endswith(" in the replay from step-000003.")
    assert of_weight.startswith("step 7: loss is ")
    assert of_weight.endswith(" in the replay from step-000006.")
    assert of_last_weight.startswith("step 8: validation_loss is ")  # although no step was taken after it
    assert [step["step"] for step in certificate["steps"]] == [4]  # what 1 and 5 did is seen in 2 and 6
    assert "\n## Certificate\n\nNot certified: " in (run / "model/README.md").read_text()


@pytest.mark.slow
def test_a_weight_that_was_changed_is_not_that_of_the_replay_that_ends_there(run):
    change_tensor(run / "step-000006", "model.safetensors", "transformer.wpe.weight")
    code, certificate = certify(run)
    assert code == 1
    before, after = certificate["problems"]
    assert before.startswith("step 6: transformer.wpe.weight in step-000006 is not that of the replay from step-000003")
    assert after.startswith("step 7: ")
    assert [step["step"] for step in certificate["steps"]] == [1, 2, 3, 4]


@pytest.mark.slow
def test_a_moment_that_was_changed_shows_after_the_next_update(run):
    change_tensor(run / "step-000003", "training_state/optimizer.safetensors", "transformer.wte.weight.exp_avg")
    code, certificate = certify(run)
    assert code == 1
    before, after = certificate["problems"]
    assert before.startswith("step 3: transformer.wte.weight.exp_avg in step-000003 is not that of the replay")
    assert after.startswith("step 5: loss is ")
    assert [step["step"] for step in certificate["steps"]] == [1, 7, 8]  # what 2 and 4 did is seen in 3 and 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grad_norm", "learning_rate", "batch_hash"])
def test_any_number_of_a_line_that_was_changed_is_named(run, name):
    then = next(record for record in read_metrics(run) if record["step"] == 5)
    change_line(run, 5, **{name: "0" * 16 if name == "batch_hash" else np.nextafter(then[name], 9.0)})
    code, certificate = certify(run)
    assert code == 1
    [problem] = certificate["problems"]
    assert problem.startswith(f"step 5: {name} is ")
    assert problem.endswith("; all is as logged after it, so that line has been changed.")


@pytest.mark.slow
def test_a_line_that_is_missing_and_a_checkpoint_that_is_damaged_are_named(run):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if not line.startswith('{"step": 5,')))
    with open(run / "step-000006/model.safetensors", "rb+") as file:
        file.truncate(1000)
    code, certificate = certify(run)
    assert code == 1
    of_checkpoint, of_line = certificate["problems"]
    assert of_checkpoint.startswith("step-000006 is damaged (model.safetensors has 1,000 of")
    assert of_line.startswith("step 5: metrics.jsonl has no line of it")
    assert [step["step"] for step in certificate["steps"]] == [1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("with_manifest", [False, True])
def test_data_that_were_changed_without_all_hashes_are_refused(run, shards, tmp_path, with_manifest, capsys):
    forged = Path(shutil.copytree(shards, tmp_path / "forged"))
    ids = np.load(forged / "train_000000.npy")
    ids[7] = 5
    np.save(forged / "train_000000.npy", ids)
    if with_manifest:
        text = (forged / "manifest.json").read_text()
        old = hashlib.sha256(np.load(shards / "train_000000.npy")).hexdigest()
        (forged / "manifest.json").write_text(text.replace(old, hashlib.sha256(ids).hexdigest()))
    code = run_here(["--output_dir", str(run), "--certify", "5", "--shards", str(forged)])
    if with_manifest:
        assert code == 2
        assert "was made with data " in capsys.readouterr().err
    else:
        assert code == 1
        assert (
            "train_000000.npy has other contents than when it was written (sha256 differs)" in capsys.readouterr().out
        )
        assert "/" not in json.loads((run / "model/certificate.json").read_text())["problems"][0]


@pytest.mark.slow
def test_other_micro_batches_are_within_the_tolerance_and_the_batches_are_equal(run):
    code, certificate = certify(run, "--per_device_train_batch_size", "3")
    assert code == 0
    assert certificate["changes"] == ["per_device_train_batch_size 4, now 3"]
    assert certificate["differences"]["batch_hash"] == 0.0
    assert 0 < certificate["differences"]["loss"] < 1e-6 < certificate["tolerance"]
    assert "reproduced up to rounding" in certificate["text"]
    assert "Not all is as it was in the run (per_device_train_batch_size 4, now 3)" in certificate["text"]


def test_a_run_that_was_resumed_with_another_schedule_and_keeps_its_last_checkpoint_only(run, shards, tmp_path):
    """Longer, so that the learning rate of step 9 on is another; only the seed is left to begin with."""
    longer = SHORT | {"train_tokens": 10 * TOKENS_PER_STEP, "save_steps": 0}
    assert train_here(run, shards, hellaswag="none", resume_from_checkpoint="latest", **longer) == 0
    for checkpoint in run.glob("step-00000*"):
        shutil.rmtree(checkpoint)
    code, certificate = certify(run)
    assert code == 0
    assert [step["step"] for step in certificate["steps"]] == list(range(1, 11))
    assert {step["from"] for step in certificate["steps"]} == {"the seed"}
    assert set(certificate["differences"].values()) == {0.0}
    assert certificate["validation"]["step"] == 10


def test_the_steps_are_drawn_from_all_checkpoints_in_turn(tmp_path):
    args = TrainArguments(output_dir=str(tmp_path), train_tokens=300 * 2**19, dataset_name="stories")
    records = [{"step": step, "tokens": step, "loss": 3.0} for step in range(1, 301)]
    made = Run(tmp_path, records, [], {"arguments": asdict(args)}, [(1, 300, asdict(args))])
    drawn = Counter()
    for count in (1, 3, 100):
        args.certify = count
        for _ in range(20):
            windows = draw_windows(args, made, Certificate(300, [100, 150, 300], False, {}, []))
            assert sum(len(window.drawn) for window in windows) == min(count, 3 * REACH)
            for window in windows:
                assert all(window.start < step <= window.start + REACH for step in window.drawn)
                assert list(window.arguments) == list(range(window.start + 1, window.drawn[-1] + 2))
            if count == 3:
                assert [window.start for window in windows] == [0, 100, 150]
                drawn.update(step for window in windows for step in window.drawn)
    assert len(drawn) > 15  # of 30


def test_what_counts_as_a_difference():
    assert relative_difference(2.0, 2.0) == relative_difference(None, float("nan")) == 0.0
    assert relative_difference(None, float("inf")) == relative_difference(0.0, 0.0) == 0.0
    assert relative_difference(2.0, 1.0) == 1.0
    assert relative_difference(1.0, 1.1) == pytest.approx(0.1 / 1.1)
    assert np.isinf(
        [relative_difference(None, 2.0), relative_difference(2.0, 0.0), relative_difference("a", "b")]
    ).all()
    assert np.isnan(relative_difference(2.0, float("nan")))


def test_a_hash_does_not_depend_on_micro_batches_and_processes_but_on_every_id():
    ids = np.random.default_rng(0).integers(0, 300, (6, 33))
    whole = hash_sequences([ids])
    assert whole == hash_sequences([ids[4:], ids[:1], ids[1:4]])
    assert whole == (hash_sequences([ids[::2]]) + hash_sequences([ids[1::2]])) % 2**64
    ids[3, 5] += 1
    assert whole != hash_sequences([ids])


def test_the_card_has_one_certificate_and_keeps_all_else():
    card = "# A model\n\nText.\n"
    once = replace_section(card, "First.")
    assert once == "# A model\n\nText.\n\n## Certificate\n\nFirst.\n"
    assert replace_section(once, "Second.") == once.replace("First", "Second")
    assert replace_section(once + "\n## More\n\nMine.\n", "New.").startswith("# A model\n\nText.\n\n## More\n\nMine.\n")


def test_a_certificate_that_cannot_be_written_is_one_sentence(tmp_path, one_sentence):
    (tmp_path / "model/certificate.json").mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot be written") as error:
        Certificate(8, [], False, {}, ["It is forged."]).write(tmp_path)
    assert one_sentence(error) == f"{tmp_path / 'model'} cannot be written (Is a directory): make it writable."


def test_what_cannot_be_certified_ends_in_one_sentence(trained, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    cases = {
        tmp_path / "none": "is not a run: it has no metrics.jsonl; give the --output_dir of a training.",
        tmp_path / "empty": "is not a run: it has no metrics.jsonl; give the --output_dir of a training.",
        tmp_path / "file": "is a file: give a folder.",
        trained / "model": "is not a run: it has no run.json; give the --output_dir of a training.",
    }
    for folder, sentence in cases.items():
        assert run_here(["--output_dir", str(folder), "--certify", "5"]) == 2
        assert sentence in capsys.readouterr().err
        assert not (tmp_path / "none").exists()
    assert run_here(["--output_dir", str(trained), "--certify", "0"]) == 2
    assert "certify (0) must be at least 1." in capsys.readouterr().err
    assert run_here(["--output_dir", str(trained), "--certify", "1", "--preflight"]) == 2
    assert "certify (1) and preflight exclude each other" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_certify_what_one_has_trained(run, warm_python):
    first, second = warm_python.run_together(2, SCRIPT, "--output_dir", run, "--certify", "1000", **CPU_FP32)
    certificate = json.loads((run / "model/certificate.json").read_text())
    assert "processes 1, now 2" in certificate["changes"]
    assert certificate["differences"]["batch_hash"] == 0.0
    assert certificate["differences"]["loss"] < 1e-6
    assert [step["step"] for step in certificate["steps"]] == list(range(1, 9))
    assert "Loss at steps 1, 2, 3, 4, 5, 6, 7 and 8 of 8 reproduced up to rounding" in first.stdout
    assert second.stdout == ""


@pytest.mark.slow
def test_a_stream_that_two_processes_have_read_is_certified_by_one(shards, hub, warm_python, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [json.loads(line)["text"] for line in (shards.parent / "prose.jsonl").read_text().splitlines()]
    repository = hub.new_repository("datasets/toy/certified")
    pq.write_table(pa.table({"text": texts}), repository / "train.parquet", row_group_size=8)
    stream = {"dataset_name": "toy/certified", "tokenizer": shards / "tokenizer"}
    warm_python.run_together(2, SCRIPT, *toy_flags(tmp_path / "run", None, **SHORT, **stream), **CPU_FP32)
    command = (SCRIPT, "--output_dir", tmp_path / "run", "--certify", "1000")
    warm_python.run(*command, **CPU_FP32)
    certificate = json.loads((tmp_path / "run/model/certificate.json").read_text())
    assert [step["step"] for step in certificate["steps"]] == list(range(1, 9))
    assert certificate["differences"]["batch_hash"] == 0.0
    assert not certificate["data_are_hashed"]
    (repository / "train.parquet").unlink()
    away = warm_python.run(*command, check=False, **CPU_FP32)
    assert away.returncode == 2
    assert "toy/certified" in away.stderr


@pytest.mark.slow
def test_a_run_with_muon_and_the_command_that_began_it_is_certified(shards, tmp_path):
    flags = SHORT | {"hellaswag": "none", "recipe": "muon"}
    assert train_here(tmp_path / "run", shards, **flags) == 0
    assert train_here(tmp_path / "run", shards, certify=1000, **flags) == 0
    certificate = json.loads((tmp_path / "run/model/certificate.json").read_text())
    assert [step["step"] for step in certificate["steps"]] == list(range(1, 9))
    assert set(certificate["differences"].values()) == {0.0}


@pytest.mark.slow
@pytest.mark.parametrize("is_away", [False, True])
def test_a_model_that_was_fine_tuned_is_certified_from_the_model_that_it_began_with(trained, shards, tmp_path, is_away):
    base = Path(shutil.copytree(trained / "model", tmp_path / "base"))
    flags = ["--init_from", str(base), "--shards", str(shards), "--output_dir", str(tmp_path / "run")]
    sizes = {"train_tokens": 8 * TOKENS_PER_STEP, "tokens_per_step": TOKENS_PER_STEP, "save_steps": 3, "eval_steps": 0}
    sizes |= {"num_samples": 0, "hellaswag": "none", "per_device_train_batch_size": 4, "eval_tokens": 320}
    assert run_here([*flags, *as_flags(sizes)]) == 0
    if is_away:
        shutil.rmtree(base)
    code, certificate = certify(tmp_path / "run")
    assert code == 0
    assert [step["step"] for step in certificate["steps"]] == list(range(4 if is_away else 1, 9))
    assert set(certificate["differences"].values()) == {0.0}
