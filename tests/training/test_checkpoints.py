"""Checkpoints: written atomically, verified by checksums, kept and deleted in the right order."""

import errno
import itertools
import json
import os
import re
import shutil
import stat
import sys
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from accelerate import Accelerator
from refusing_disk import ERRORS, RefusingDisk

from modeling_gpt2repro.data.tokenizer import save_tokenizer
from modeling_gpt2repro.runs.folder import checkpoint_name
from modeling_gpt2repro.storage import atomic
from modeling_gpt2repro.storage.checksums import verify_checksums
from modeling_gpt2repro.training import checkpoints
from modeling_gpt2repro.training.checkpoints import RetentionPolicy, find_resume_checkpoint
from modeling_gpt2repro.training.optimization import build_optimizer
from modeling_gpt2repro.training.optimizer_state import load_optimizer, load_random, optimizer_tensors, random_tensors

IDENTITY = {"seed": 1}


@pytest.fixture
def optimizer(tiny_model):
    """AdamW after one step of the tiny model, so that it has moments."""
    ids = torch.randint(0, 97, (2, 9), generator=torch.Generator().manual_seed(5))
    optimizer = build_optimizer(tiny_model, 1e-3)
    tiny_model(ids, labels=ids).loss.backward()
    optimizer.step()
    return optimizer


@pytest.fixture
def save(tiny_model, optimizer, tmp_path):
    """save(step) -> the checkpoint's folder, or the error message."""

    def save(step, keep=RetentionPolicy(), write_model=None, folder=tmp_path):  # noqa: B008 - frozen
        accelerator = Accelerator(cpu=True)
        problem = checkpoints.save_checkpoint(
            accelerator,
            folder / checkpoint_name(step),
            write_model or (lambda temporary: tiny_model.save_pretrained(temporary)),
            optimizer=optimizer_tensors(tiny_model, optimizer, keep=True),
            random=random_tensors(accelerator),
            state={
                "progress": {"step": step, "tokens": 100 * step},
                "data": {"next_step": step, "lanes": {"0": [0, step]}},
                "guard": {},
                "origin": "A GPT-2 trained from scratch.",
                "identity": IDENTITY,
            },
            policy=keep,
        )
        return problem or folder / checkpoint_name(step)

    return save


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_loading_a_checkpoint_restores_what_was_saved(save, tiny_model, optimizer):
    torch.manual_seed(3)
    folder = save(3)
    drawn = torch.rand(4)
    assert folder.name == "step-000003"
    state = checkpoints.read_state(folder, IDENTITY)
    assert state["progress"]["step"] == 3
    assert state["data"] == {"next_step": 3, "lanes": {"0": [0, 3]}}
    fresh = build_optimizer(tiny_model, 1e-3)
    load_optimizer(folder / "training_state", tiny_model, fresh)
    assert len(fresh.state) == len(list(tiny_model.parameters()))
    for parameter, expected in optimizer.state.items():
        assert fresh.state[parameter].keys() == expected.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for kind, tensor in expected.items():
            assert torch.equal(fresh.state[parameter][kind], tensor)
    load_random(folder / "training_state", Accelerator(cpu=True))
    assert torch.equal(torch.rand(4), drawn)


@pytest.mark.parametrize("fused", [True, False])
def test_the_count_of_steps_is_loaded_to_where_adamw_reads_it(save, tiny_model, fused, monkeypatch):
    """A fused kernel reads it on the device; any other AdamW would wait for the device once a tensor."""
    folder = save(3)
    fused_devices = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(fused_devices, "_get_fused_kernels_supported_devices", lambda: ["meta", "cpu"])
    model = tiny_model.to("meta")  # stands for a GPU
    model.tie_weights()
    loaded = build_optimizer(model, 1e-3, device=torch.device("cuda" if fused else "xpu"))
    load_optimizer(folder / "training_state", model, loaded)
    assert {state["step"].device.type for state in loaded.state.values()} == {"meta" if fused else "cpu"}
    assert {state["exp_avg"].device.type for state in loaded.state.values()} == {"meta"}


@pytest.mark.parametrize("kind", ["cuda", "xpu", "hpu", "mps"])
def test_the_random_state_of_a_device_is_saved_and_restored(save, kind, monkeypatch):
    """The device's generator is played by one on the CPU."""
    generator = torch.Generator().manual_seed(5)
    functions = {"get_rng_state": generator.get_state, "set_rng_state": generator.set_state}
    monkeypatch.setattr(torch, "get_device_module", {kind: SimpleNamespace(**functions)}.get)
    monkeypatch.setattr(Accelerator, "device", torch.device(kind))
    folder = save(3)
    drawn = torch.rand(4, generator=generator)
    checkpoints.read_state(folder, IDENTITY)  # which refuses what it does not know
    load_random(folder / "training_state", Accelerator(cpu=True))
    assert torch.equal(torch.rand(4, generator=generator), drawn)


def test_nothing_in_a_checkpoint_can_run_code(save):
    kinds = {path.suffix for path in save(3).rglob("*") if path.is_file()}
    assert kinds == {".safetensors", ".json", ".py"}  # .py: the model's code, which no checkpoint is read with


def test_every_file_is_listed_with_its_size_and_hash(save):
    folder = save(3)
    listed = json.loads((folder / checkpoints.CHECKSUMS_FILE).read_text())
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(listed) == files - {checkpoints.CHECKSUMS_FILE}
    assert listed["model.safetensors"]["bytes"] == (folder / "model.safetensors").stat().st_size
    assert all(re.fullmatch("[0-9a-f]{64}", entry["sha256"]) for entry in listed.values())


def test_every_file_is_flushed_to_disk_before_the_rename(save, tmp_path, monkeypatch):
    events = []
    flush = os.fsync
    rename = os.replace

    def record_flush(descriptor):
        events.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        flush(descriptor)

    def record_rename(old, new):
        events.append((old.name, new.name))
        rename(old, new)

    monkeypatch.setattr(atomic.os, "fsync", record_flush)
    monkeypatch.setattr(atomic.os, "replace", record_rename)
    folder = save(5)
    named = events.index((".step-000005.partial", "step-000005"))
    for path in (folder, *folder.rglob("*")):  # at its full size; and the folders, which hold the names
        assert (path.stat().st_ino, path.stat().st_size) in events[:named], path
    assert [number for number, _ in events[named + 1 :]] == [tmp_path.stat().st_ino]


@pytest.mark.skipif(os.name != "posix", reason="needs a umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660), (0o077, 0o600)])
def test_file_permissions_follow_the_umask(save, umask, mode):
    before = os.umask(umask)
    try:
        folder = save(5)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()} == {mode}


def test_leftovers_of_a_killed_save_do_not_enter_the_next_one(save, tmp_path):
    leftovers = tmp_path / ".step-000005.partial" / "training_state"
    leftovers.mkdir(parents=True)
    (leftovers / "leftover.json").write_text("{}")
    assert not [path for path in save(5).rglob("*") if path.name == "leftover.json"]


def test_old_checkpoints_are_deleted_after_the_new_one_is_complete(save, tmp_path, monkeypatch):
    seen = []

    def record_and_delete(old):
        seen.append(names(tmp_path))
        atomic.delete_dir(old)

    monkeypatch.setattr(checkpoints, "delete_dir", record_and_delete)
    for step in (9, 10, 11):
        save(step, RetentionPolicy(limit=2))
    assert seen == [["step-000009", "step-000010", "step-000011"]]
    assert names(tmp_path) == ["step-000010", "step-000011"]
    assert find_resume_checkpoint("latest", tmp_path)[0].name == "step-000011"


def test_milestones_are_kept_beside_the_newest(save, tmp_path):
    for step in range(10, 70, 10):
        save(step, RetentionPolicy(limit=2, every=20))
    assert names(tmp_path) == ["step-000020", "step-000030", "step-000040", "step-000050", "step-000060"]
    save(70, RetentionPolicy(limit=2, every=20))
    assert names(tmp_path) == ["step-000020", "step-000040", "step-000050", "step-000060", "step-000070"]


def test_the_data_states_of_all_processes_are_joined():
    states = [{"next_step": 3, "lanes": {"0": [1, 2]}}, {"next_step": 3, "lanes": {"1": [0, 5]}}]
    assert checkpoints.join_states(states) == {"next_step": 3, "lanes": {"0": [1, 2], "1": [0, 5]}}


def test_a_half_written_folder_is_not_a_checkpoint(save, tmp_path):
    save(5)
    (tmp_path / ".step-000006.partial" / "training_state").mkdir(parents=True)
    shutil.copytree(tmp_path / "step-000005", tmp_path / "step-000007")
    (tmp_path / "step-000007" / checkpoints.CHECKSUMS_FILE).unlink()
    sentence = f"{tmp_path / 'step-000007'} has no training_state/files.json (an unfinished copy?) and is passed over."
    assert find_resume_checkpoint("latest", tmp_path) == (tmp_path / "step-000005", [sentence])
    with pytest.raises(ValueError, match="step-000007 is not a checkpoint"):
        find_resume_checkpoint(str(tmp_path / "step-000007"), tmp_path)


FILES = [
    "model.safetensors",
    "training_state/optimizer.safetensors",
    "training_state/state.json",
    checkpoints.CHECKSUMS_FILE,
]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "name"),
    [(damage, name) for damage in (truncate, flip_a_bit) for name in FILES[:3]] + [(truncate, FILES[3])],
)
def test_a_damaged_newest_checkpoint_is_reported_and_passed_over(save, tmp_path, damage, name):
    save(4)
    damage(save(5) / name)
    checkpoint, passed_over = find_resume_checkpoint("latest", tmp_path)
    assert checkpoint == tmp_path / "step-000004"
    assert len(passed_over) == 1
    assert re.search(rf"step-000005 is damaged \(.*{name.split('/')[-1]}.*\) and is passed over\.$", passed_over[0])
    with pytest.raises(ValueError, match=r"step-000005 is damaged \(.*\): resume from another one"):
        find_resume_checkpoint(str(tmp_path / "step-000005"), tmp_path)


def test_a_damaged_later_checkpoint_does_not_displace_a_good_one(save, tmp_path):
    save(4)
    truncate(save(6) / "model.safetensors")
    save(5, RetentionPolicy(limit=1))
    assert names(tmp_path) == ["step-000005", "step-000006"]
    assert find_resume_checkpoint("latest", tmp_path)[0].name == "step-000005"
    assert len(names(save(6, RetentionPolicy(limit=1)).parent)) == 1


def test_an_edited_model_card_is_no_damage(save, tiny_model, tmp_path):
    def write(temporary):
        tiny_model.save_pretrained(temporary)
        (temporary / "README.md").write_text("A card.")

    (save(5, write_model=write) / "README.md").write_text("A better card.")
    assert find_resume_checkpoint("latest", tmp_path) == (tmp_path / "step-000005", [])


def test_a_failed_save_changes_nothing(save, tmp_path):
    save(5, RetentionPolicy(limit=1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(temporary):
        (temporary / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    assert save(6, RetentionPolicy(limit=1), full) == "No space left on device"
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert names(tmp_path) == ["step-000005"]


@pytest.fixture
def write_a_model(tiny_model):
    """write_a_model(folder), in the fewest operations of the disk."""
    weights = safetensors.torch.save({name: tensor.data for name, tensor in tiny_model.named_parameters()})
    config = tiny_model.config.to_json_string()

    def write(temporary):
        (temporary / "model.safetensors").write_bytes(weights)
        (temporary / "config.json").write_text(config)

    return write


def count_operations(save, disk, write_a_model) -> int:
    """How often a save that deletes an old checkpoint asks the disk for something."""
    counted = disk.refuse_nth(0, n=-1, and_later=False)
    save(6, RetentionPolicy(limit=1), write_a_model)
    disk.recover()
    return counted()


@pytest.mark.parametrize("and_later", [False, True])
def test_whatever_the_disk_refuses_in_a_save_costs_at_most_this_checkpoint(
    save, write_a_model, tmp_path, monkeypatch, and_later
):
    """Each operation in turn is refused: alone, as by a network disk, or with all later ones, as by a dying disk."""
    disk = RefusingDisk(monkeypatch, tmp_path)
    save(5, write_model=write_a_model)
    total = count_operations(save, disk, write_a_model)
    assert total > 60
    assert names(tmp_path) == ["step-000006"]
    for n, error in zip(range(total), itertools.cycle(ERRORS.values()), strict=False):
        shutil.rmtree(tmp_path / "step-000006")
        save(5, write_model=write_a_model)
        disk.refuse_nth(error, n, and_later)
        outcome = save(6, RetentionPolicy(limit=1), write_a_model)
        disk.recover()
        is_saved = outcome == tmp_path / "step-000006"
        assert is_saved or outcome == os.strerror(error), n
        newest, damaged = find_resume_checkpoint("latest", tmp_path)
        assert damaged == [], n
        if is_saved:
            assert newest == tmp_path / "step-000006", n
        else:  # at most the name of the new one may not survive a power cut, so the old one is kept
            assert verify_checksums(tmp_path / "step-000005", checkpoints.CHECKSUMS_FILE) is None, n
        # The next save works, and deletes what this one has left.
        save(6, RetentionPolicy(limit=1), write_a_model)
        checkpoints.remove_stale_files(tmp_path)
        assert names(tmp_path) == ["step-000006"], n


@pytest.mark.parametrize("error", ERRORS)
def test_an_old_checkpoint_that_cannot_be_deleted_is_no_failed_save(save, tmp_path, monkeypatch, error):
    for step in (3, 4, 5):
        save(step)
    delete = checkpoints.delete_dir

    def refuse(folder):
        if folder.name == "step-000003":
            raise OSError(ERRORS[error], os.strerror(ERRORS[error]))
        delete(folder)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "delete_dir", refuse)
        assert save(6, RetentionPolicy(limit=1)) == tmp_path / "step-000006"
    assert names(tmp_path) == ["step-000003", "step-000006"]  # one that stays does not keep the others
    save(7, RetentionPolicy(limit=1))
    assert names(tmp_path) == ["step-000007"]


def test_a_checkpoint_whose_rewrite_is_refused_keeps_its_name(save, tmp_path, monkeypatch):
    save(5)
    rename = os.replace

    def refuse(old, new):
        if old.name.endswith(".partial"):
            raise OSError(errno.EIO, "Input/output error")
        rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", refuse)
        assert save(5) == "Input/output error"
    assert names(tmp_path) == ["step-000005"]


def test_resuming_from_before_later_checkpoints_is_refused(save, tmp_path):
    for step in (5, 6):
        save(step)
    assert find_resume_checkpoint(str(tmp_path / "step-000006"), tmp_path)[0].name == "step-000006"
    with pytest.raises(ValueError, match=r"later checkpoints than step-000005 \(step-000006\)"):
        find_resume_checkpoint(str(tmp_path / "step-000005"), tmp_path)


def test_checkpoints_are_ordered_by_number(save, tmp_path):
    for step in (1_000_000, 999_999):
        save(step)
    assert find_resume_checkpoint("latest", tmp_path)[0].name == "step-1000000"


def test_checkpoints_are_ordered_by_number_though_the_clock_was_set_back(save, tmp_path):
    a_year = 365 * 24 * 3600
    for step, years in ((5, 2), (6, 1), (7, 0)):  # the newer, the older by the clock
        folder = save(step)
        for path in [folder, *folder.rglob("*")]:
            times = path.stat().st_mtime + years * a_year
            os.utime(path, (times, times))
    assert find_resume_checkpoint("latest", tmp_path)[0].name == "step-000007"
    save(8, RetentionPolicy(limit=2))
    assert names(tmp_path) == ["step-000007", "step-000008"]


def test_a_resumed_optimizer_has_the_decay_of_its_arguments(save, tiny_model):
    folder = save(5)
    optimizer = build_optimizer(tiny_model, 1e-3, weight_decay=0.5)
    load_optimizer(folder / "training_state", tiny_model, optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]


def test_a_resumed_optimizer_does_not_share_memory_with_the_file(save, tiny_model):
    folder = save(5)
    optimizer = build_optimizer(tiny_model, 1e-3)
    load_optimizer(folder / "training_state", tiny_model, optimizer)
    shutil.rmtree(folder)
    for state in optimizer.state.values():
        for tensor in state.values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
            tensor.add_(1)  # a mapped file would not take it


def test_latest_starts_anew_where_there_is_no_checkpoint_yet(tmp_path):
    assert find_resume_checkpoint("latest", tmp_path) == (None, [])


def test_a_checkpoint_of_another_run_is_refused_with_every_difference(save):
    folder = save(5)
    with pytest.raises(ValueError, match="made with seed 1, not 2") as error:
        checkpoints.read_state(folder, {"seed": 2, "block_size": 64})
    assert "made with block_size None, not 64" in str(error.value)


def test_a_kill_between_the_renames_of_a_rewritten_checkpoint_costs_nothing(save, tmp_path, monkeypatch):
    save(5)

    def killed(temporary, folder):
        if temporary.name.endswith(".partial"):
            raise KeyboardInterrupt
        rename(temporary, folder)

    rename = atomic.os.replace
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            save(5)
    assert names(tmp_path) == [".step-000005.old", ".step-000005.partial"]
    assert find_resume_checkpoint("latest", tmp_path) == (tmp_path / "step-000005", [])


def test_a_half_deleted_checkpoint_is_not_recovered(save, tmp_path, monkeypatch):
    save(5)

    def killed(folder, **options):
        if folder.exists():
            (folder / "model.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            atomic.delete_dir(tmp_path / "step-000005")
    assert find_resume_checkpoint("latest", tmp_path) == (None, [])
    checkpoints.remove_stale_files(tmp_path)
    assert names(tmp_path) == []


def test_a_disk_that_is_full_for_the_tokenizer_is_reported_as_for_any_file(save, tmp_path, tiny_tokenizer, monkeypatch):
    def full(self, path, **options):
        raise Exception("No space left on device (os error 28)")

    monkeypatch.setattr(type(tiny_tokenizer), "save_pretrained", full)
    assert "No space left" in save(6, write_model=lambda temporary: save_tokenizer(tiny_tokenizer, temporary))
    assert names(tmp_path) == []


def test_a_disk_that_cannot_flush_folders_takes_checkpoints(save, tmp_path, monkeypatch):
    flush = os.fsync

    def flush_files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", flush_files_only)
    assert save(5) == tmp_path / "step-000005"
    assert find_resume_checkpoint("latest", tmp_path) == (tmp_path / "step-000005", [])


def test_leftovers_of_killed_saves_are_removed(save, tmp_path):
    save(5)
    for name in (".step-000006.partial", ".step-000004.old", ".model.partial", ".push-main-step-000005"):
        (tmp_path / name).mkdir()
    checkpoints.remove_stale_files(tmp_path)
    assert names(tmp_path) == ["step-000005"]
