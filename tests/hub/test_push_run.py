"""The push command with a run's folder, --dry_run and --stock_twin: what arrives, and what does not."""

import json
import os
import re
import shutil
import tempfile

import pytest
import torch
from huggingface_hub import HfApi, metadata_load
from pushing import as_pushed, files_in, push_in_process
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from modeling_gpt2repro.hub import conversion
from modeling_gpt2repro.hub.export import save_hub_folder
from modeling_gpt2repro.hub.push import push_folder
from modeling_gpt2repro.hub.push_run import REPORT_HEADING, TEMPORARY, TWIN_HEADING, add_section

MACHINE = "/home/jane doe/secret"
ARGUMENTS = {"train_tokens": 1000, "tokens_per_step": 100, "learning_rate": 1e-3, "warmup_tokens": 100, "seed": 1}
ARGUMENTS |= {"final_learning_rate_ratio": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1}
ARGUMENTS |= {"max_grad_norm": 1.0, "shards": f"{MACHINE}/tokens", "hellaswag": "none", "init_from": f"{MACHINE}/older"}
CONFIG = {
    "arguments": {**ARGUMENTS, "output_dir": f"{MACHINE}/run"},
    "hardware": {"device": "a CPU", "processes": 2, "precision": "no"},
    "data": {"data": "0123456789abcdef"},
    "versions": {"torch": "2.13.0"},
    "commit": "c0ffee",
}
OF_THE_RUN = {"loss.png", "samples.jsonl", "certificate.json", "report/report.md", "report/report-loss.png"}
OF_THE_RUN |= {"report/report-steps.png"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, model_and_tokenizer):
    folder = tmp_path_factory.mktemp("models") / "model"
    save_hub_folder(*model_and_tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def model_and_tokenizer(tiny_tokenizer):
    from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=len(tiny_tokenizer), **sizes))
    return model.eval(), tiny_tokenizer


@pytest.fixture
def run_without_numbers(run):
    """Which saves the seconds that a report takes."""
    (run / "metrics.jsonl").unlink()
    return run


@pytest.fixture
def run(tmp_path, model_folder):
    """A finished run, with all that a run and a person may leave in its folder."""
    folder = tmp_path / "mine"
    shutil.copytree(model_folder, folder / "model")
    (folder / "model/.eval_results").mkdir()
    (folder / "model/.eval_results/gpt2repro_hellaswag_completion.yaml").write_text("[]")
    shutil.copytree(model_folder, folder / "step-000008")
    (folder / "step-000008/training_state").mkdir()
    (folder / "step-000008/training_state/optimizer.safetensors").write_bytes(b"moments")
    records = [{"step": n, "tokens": 100 * n, "loss": 8 - n / 2, "grad_norm": 1.0} for n in range(1, 11)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    (folder / "model/metrics.jsonl").write_text(lines)
    (folder / "run.json").write_text(json.dumps(CONFIG))
    (folder / "stopped.json").write_text(json.dumps({"message": f"{MACHINE}/run and /mnt/disk7/x are full."}))
    (folder / "samples.jsonl").write_text('{"step": 10, "prompt": "One", "samples": ["One day"]}\n')
    for name in ("loss.png", "certificate.json", "run.lock", "push.log", "notes.txt", "data/0.npy"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture
def change_twin(monkeypatch):
    """change_twin(number): a fault of the conversion, which adds it to a weight of each twin from then on."""
    convert = conversion.to_hf_gpt2

    def change(number):
        def wrong(model):
            twin = convert(model)
            twin.transformer.h[1].ln_2.weight.data[3] += number
            return twin

        monkeypatch.setattr(conversion, "to_hf_gpt2", wrong)

    return change


def commits(hub, name):
    return sum(bool(re.search(f"{name}/commit/", line["path"])) and line["status"] == 200 for line in hub.log())


def test_a_run_is_pushed_in_one_commit_with_what_it_has_to_show_and_nothing_private(here, run):
    before = files_in(run)
    result = push_in_process(run, "--hub_model_id", "user/whole-run")
    assert result.returncode == 0, result.stderr
    assert "finished" not in result.stderr
    pushed = files_in(here.root / "models/user/whole-run")
    model = files_in(run / "model")
    assert pushed.keys() == model.keys() | OF_THE_RUN
    assert commits(here, "user/whole-run") == 1
    assert {name: pushed[name] for name in model if name != "README.md"} == {
        name: content for name, content in model.items() if name != "README.md"
    }
    card = pushed["README.md"].decode()
    assert card.startswith(as_pushed(run / "model", "user/whole-run")["README.md"].decode().rstrip())
    links = re.findall(r"\]\(([^)]*)\)", card + pushed["report/report.md"].decode())
    assert "report/report.md" in links
    assert all(link in pushed or f"report/{link}" in pushed for link in links)
    for name, content in pushed.items():
        assert not re.search(rb"jane|secret|disk7", content), name
    assert b"run and x are full" in pushed["report/report.md"]
    assert files_in(run) == before
    again = push_in_process(run, "--hub_model_id", "user/whole-run")
    assert (again.returncode, again.stdout) == (0, result.stdout)  # the same commit
    assert commits(here, "user/whole-run") == 1


@pytest.mark.parametrize("twin", [(), pytest.param(("--stock_twin",), marks=pytest.mark.slow)])
def test_a_dry_run_lists_every_file_that_is_pushed_then_and_needs_no_hub(here, run_without_numbers, monkeypatch, twin):
    words = (run_without_numbers, "--hub_model_id", f"user/listed{len(twin)}", *twin)
    asked = len(here.log())
    monkeypatch.delenv("HF_TOKEN")
    listed = push_in_process(*words, "--dry_run")
    assert listed.returncode == 0, listed.stderr
    assert len(here.log()) == asked
    monkeypatch.setenv("HF_TOKEN", here.token)
    assert push_in_process(*words).returncode == 0
    _, *parts = re.split(r"^To (\S+), branch main, .*:\n", listed.stdout, flags=re.MULTILINE)
    assert parts[::2] == [words[2], f"{words[2]}-gpt2"][: 1 + len(twin)]
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        *files, total = re.findall(r"^ *([\d,]+) bytes  (.+)$", part, flags=re.MULTILINE)
        pushed = {path: len(content) for path, content in files_in(here.root / "models" / name).items()}
        assert {path: int(size.replace(",", "")) for size, path in files} == pushed
        assert total == (f"{sum(pushed.values()):,}", f"in {len(pushed)} files")


@pytest.mark.parametrize("is_continued", [False, True])
def test_a_run_that_is_not_finished_pushes_its_last_checkpoint_and_says_so(run_without_numbers, is_continued):
    run = run_without_numbers
    if is_continued:  # for more steps, after its model was written
        (run / "step-000008").rename(run / "step-000012")
    else:
        shutil.rmtree(run / "model")
    name = "step-000012" if is_continued else "step-000008"
    result = push_in_process(run, "--hub_model_id", "user/any", "--dry_run")
    assert result.returncode == 0
    assert f"{run} is not finished: its model is that of the last checkpoint, {name}." in result.stderr
    assert "optimizer" not in result.stdout


@pytest.mark.parametrize("kind", ["no model", "nothing", "link"])
def test_a_run_that_cannot_be_pushed_ends_in_one_sentence(run, kind):
    reason = "has saved no model yet: wait for its first checkpoint"
    if kind == "link":
        (run / "samples.jsonl").rename(run / "elsewhere")
        (run / "samples.jsonl").symlink_to(run / "elsewhere")
        reason = "samples.jsonl is a link: to push that file, put a copy in the link's place"
    else:
        shutil.rmtree(run / "model")
        shutil.rmtree(run / "step-000008")
    if kind == "nothing":
        (run / "run.json").unlink()
        reason = "give the folder of a run or of a model"
    result = push_in_process(run, "--hub_model_id", "user/any", "--dry_run")
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.endswith(f"{reason}.\n")


def test_a_model_goes_without_a_report_where_there_are_no_numbers(run_without_numbers):
    result = push_in_process(run_without_numbers, "--hub_model_id", "user/any", "--dry_run")
    assert result.returncode == 0
    assert result.stderr.startswith("There is no report to push: ")
    assert "model.safetensors" in result.stdout
    assert "report" not in result.stdout


def test_files_of_the_run_that_did_not_arrive_are_named(here, run_without_numbers):
    run = run_without_numbers
    here.new_repository("models/user/run-never-arrived")
    api = HfApi(here.endpoint)
    api.upload_folder(repo_id="user/run-never-arrived", folder_path=run / "model")
    before = {"commitOid": api.repo_info("user/run-never-arrived").sha, "commitUrl": f"{here.endpoint}/a/b/commit/0"}
    with here.faults({"match": "commit/main", "status": 200, "body": before}):
        result = push_in_process(run, "--hub_model_id", "user/run-never-arrived")
    assert result.returncode == 4
    assert result.stderr.endswith(": certificate.json, loss.png, samples.jsonl.\n")


def test_the_twin_is_a_plain_gpt2_whose_card_says_how_equal_it_is(here, run, change_twin):
    model_folder = run / "model"
    change_twin(1e-3)  # because the two may be equal to the last bit
    result = push_in_process(model_folder, "--hub_model_id", "twins", "--stock_twin")
    assert result.returncode == 0, result.stderr
    assert re.findall(r"pushed to http://[^/]*/(\S+) ", result.stdout) == ["user/twins", "user/twins-gpt2"]
    ours, twin = (here.root / "models/user" / name for name in ("twins", "twins-gpt2"))
    assert f"]({here.endpoint}/user/twins-gpt2)" in (ours / "README.md").read_text()
    assert "twins-gpt2" not in (model_folder / "README.md").read_text()
    assert metadata_load(twin / "README.md")["base_model"] == "user/twins"
    assert metadata_load(twin / "README.md")["license"] == "mit"
    assert not list(twin.glob("*.py"))
    stock = AutoModelForCausalLM.from_pretrained(twin)
    assert type(stock) is GPT2LMHeadModel
    model, _ = conversion.load_gpt2(str(model_folder))
    ids = torch.randint(len(model.transformer.wte.weight), (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (stock(ids).logits - model(ids).logits).abs().max()
    claim = re.search(r"2 sequences of\s32 random tokens differ by at most (\S+) ", (twin / "README.md").read_text())
    assert 1e-6 < float(claim[1]) == float(f"{difference:.0e}")
    assert push_in_process(model_folder, "--hub_model_id", "user/twins", "--stock_twin").stdout == result.stdout
    assert commits(here, "user/twins-gpt2") == 1


@pytest.mark.parametrize("are_new_weights", [False, True])
def test_a_push_of_the_model_keeps_what_the_card_says_of_files_that_stay(here, run_without_numbers, are_new_weights):
    name = f"user/kept-{are_new_weights}"
    model, extra = run_without_numbers / "model", run_without_numbers / "extra"
    (extra / "report").mkdir(parents=True)
    (extra / "report/report.md").write_text("# Report")
    add_section(model, extra, REPORT_HEADING, "[The report](report/report.md).")
    add_section(model, extra, TWIN_HEADING, "The twin has the same weights.")
    push_folder(HfApi(here.endpoint), model, name, extra=extra)
    whole = (here.root / "models" / name / "README.md").read_text()
    if are_new_weights:
        weights = bytearray((model / "model.safetensors").read_bytes())
        weights[-1] ^= 1
        (model / "model.safetensors").write_bytes(weights)
    for _ in range(2):
        assert push_in_process(model, "--hub_model_id", name).returncode == 0
    card = (here.root / "models" / name / "README.md").read_text()
    assert "[The report](report/report.md)." in card
    assert ("The twin has the same weights." in card) is not are_new_weights
    assert (card == whole) is not are_new_weights
    assert commits(here, name) == 1 + are_new_weights
    (here.root / "models" / name / "report/report.md").unlink()
    assert push_in_process(model, "--hub_model_id", name).returncode == 0
    assert "report.md" not in (here.root / "models" / name / "README.md").read_text()


def test_folders_of_pushes_that_were_killed_are_deleted_by_the_next(here, run_without_numbers, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folders = [tmp_path / f"{TEMPORARY}{process}-x" for process in (2**31 - 1, os.getppid(), "older")]
    for folder in folders:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
    assert push_in_process(run_without_numbers, "--hub_model_id", "user/any", "--dry_run").returncode == 0
    assert sorted(tmp_path.glob(f"{TEMPORARY}*")) == sorted(folders[1:])


def test_without_stock_twin_no_card_names_one(here, run):
    assert push_in_process(run / "model", "--hub_model_id", "user/single").returncode == 0
    assert files_in(here.root / "models/user/single") == as_pushed(run / "model", "user/single")
    assert not (here.root / "models/user/single-gpt2").exists()


def test_a_twin_that_is_not_equal_is_not_pushed(here, run, change_twin):
    change_twin(0.5)
    result = push_in_process(run / "model", "--hub_model_id", "user/unequal", "--stock_twin")
    assert result.returncode == 2
    assert f"{run / 'model'} as a plain GPT-2 has other logits (they differ by " in result.stderr.splitlines()[-1]
    assert not (here.root / "models/user/unequal").exists()


def test_a_plain_gpt2_has_no_twin(model_and_tokenizer, tmp_path):
    model, tokenizer = model_and_tokenizer
    save_hub_folder(conversion.to_hf_gpt2(model), tokenizer, tmp_path / "plain")
    result = push_in_process(tmp_path / "plain", "--hub_model_id", "user/any", "--stock_twin", "--dry_run")
    assert result.returncode == 2
    assert "plain is a plain GPT-2 already: leave out --stock_twin." in result.stderr.splitlines()[-1]


def test_a_check_with_a_twin_tries_both_repositories(here):
    result = push_in_process("--check", "--hub_model_id", "user/both", "--stock_twin")
    addresses = f"{here.endpoint}/user/both, {here.endpoint}/user/both-gpt2"
    assert (result.returncode, result.stdout) == (0, f"can be written: {addresses}\n")
