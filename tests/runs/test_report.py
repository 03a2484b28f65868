"""The report on a run: what it says of finished, running, stopped and damaged runs, in Markdown and in HTML."""

import io
import json
import shutil
from base64 import b64decode
from html.parser import HTMLParser

import pytest
from PIL import Image

from modeling_gpt2repro.runs.read import FINEWEB_EDU, read_run, write_baselines
from modeling_gpt2repro.runs.reference import RECIPE, SETTING, published_curves
from modeling_gpt2repro.runs.report import __main__ as command
from modeling_gpt2repro.runs.report.markdown import Report, bar, readable_count
from modeling_gpt2repro.runs.report.page import html_page
from modeling_gpt2repro.runs.report.progress import fault_part, status, stopped_message, time_parts
from modeling_gpt2repro.runs.report.results import count_examples, curve_parts, early_ones
from modeling_gpt2repro.runs.report.sections import write_report
from modeling_gpt2repro.runs.summary import count_parameters

TOKENS = 100  # of a step
SIZES = {"n_layer": 2, "n_head": 2, "n_embd": 8, "n_positions": 16, "vocab_size": 300}
HOSTILE = "<script>alert(1)</script> ![x](http://x/y.png) **bold** | cell\n# Heading"
ARGUMENTS = {"train_tokens": 1000, "tokens_per_step": TOKENS, "learning_rate": 1e-3, "warmup_tokens": 100, "seed": 1}
ARGUMENTS |= {"final_learning_rate_ratio": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1}
ARGUMENTS |= {"max_grad_norm": 1.0, "dataset_name": "stories", "hellaswag": "Rowan/hellaswag", "init_from": None}
CONFIG = {
    "arguments": ARGUMENTS,
    "hardware": {"device": "a CPU", "processes": 2, "precision": "no"},
    "data": {"data": "0123456789abcdef"},
    "versions": {"python": "3.12.1", "torch": "2.13.0"},
    "commit": "c0ffee",
}


def step(number, **more):
    usual = {"loss": 8.0 - number / 2, "grad_norm": 1.0, "learning_rate": 1e-3, "tokens_per_second": 50.0}
    return {"step": number, "tokens": number * TOKENS, **usual, "step_seconds": 2.0, "data_seconds": 0.5, **more}


def evaluation(number, loss, **more):
    numbers = {
        "validation_loss": loss,
        "validation_perplexity": 9.0,
        "validation_tokens": 320,
        "evaluation_seconds": 4.0,
    }
    return {"step": number, "tokens": number * TOKENS, **numbers, **more}


def scored(accuracy):
    name = "hellaswag_completion_acc_norm"
    bounds = {f"{name}_low": accuracy - 0.01, f"{name}_high": accuracy + 0.01}
    return {name: accuracy, **bounds, "hellaswag_seconds": 1.0}


def make_run(folder, records, config=CONFIG):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if config:
        (folder / "run.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A finished run of ten steps, resumed once at step 4 after it had come to step 6; it skipped the eighth update."""
    again = [{"step": 4, "event": "resume", "changed": {"learning_rate": [1e-3, 5e-4]}}]
    records = [
        evaluation(0, 5.71, **scored(0.25)),
        *map(step, range(1, 5)),
        {"step": 4, "tokens": 400, "save_seconds": 6},
    ]
    records += [step(5), step(6), *again, *map(step, range(5, 9)), {"step": 8, "tokens": 800, "event": "skipped"}]
    records += [step(9), step(10), {"step": 10, "tokens": 1000, "save_seconds": 6}, evaluation(10, 3.2, **scored(0.31))]
    folder = make_run(tmp_path_factory.mktemp("runs") / "toy", records)
    published = [("gpt2", "completion", None, 0.2955, "x"), ("gpt2-xl", "completion", None, 0.4893, "x")]
    write_baselines(folder, {"guessing evenly, ln(vocabulary)": 5.7038}, published)
    samples = [
        {"step": n, "prompt": "One day", "samples": [f"One day at {n} {HOSTILE}", "another"]} for n in (0, 4, 4, 10)
    ]
    samples[2]["samples"][0] = "One day it was made again"
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    lines = [{"row": row, "protocol": "completion"} for row in (0, 1, 2)]
    (folder / "hellaswag.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(SIZES))
    return folder


@pytest.fixture(scope="module")
def report(folder):
    return write_report(folder)


class Tags(HTMLParser):
    """The start tags of a page, and its text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_was_trained_and_what_came_of_it(report):
    page = report.markdown({name: f"{name}.png" for name in report.pictures})
    assert page.startswith("# toy: a GPT-2 with 4.29 k parameters\n\n**Finished**: 10 of 10 steps.\n")
    assert "| 3.2000 | 31.0 % | 1 k | 20 s | 50 |" in page
    assert "## What was trained\n\n| | |\n|---|---|\n| model | GPT-2 with 4,288 parameters: 2 layers, 2 heads, " in page
    assert "| hardware | 2 x a CPU, fp32 |\n" in page
    undone = "4 s more in 2 steps undone by a resume from an earlier checkpoint"
    assert f"| time | 20 s in training steps; {undone} |\n" in page
    assert "| learning rate | steps 1 to 4: 0.001 after 100 tokens" in page
    assert "| code | gpt2repro, commit c0ffee |" in page
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    first = [
        "Results",
        "Loss",
        "Is the curve normal?",
        "What it wrote",
        "HellaSwag",
        "What was trained",
        "Step by step",
    ]
    assert headings == [*first, "Where the time went", "Faults"]
    assert [f"]({name}.png)" in page for name in ("loss", "hellaswag", "steps")] == [True] * 3
    assert report.remarks == []


def test_the_html_is_one_file_in_which_nothing_is_markup_but_the_reports_own(report):
    page = Tags(html_page(report))
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert [Image.open(io.BytesIO(b64decode(source.split(",")[1]))).format for source in images] == ["PNG"] * 3
    own = {"html", "head", "meta", "title", "style", "body", "main", "div", "dl", "dt", "dd", "p", "ul", "li", "img"}
    own |= {"h1", "h2", "table", "thead", "tbody", "tr", "th", "td", "strong", "blockquote", "code"}
    assert {tag for tag, _ in page.tags} <= own
    allowed = {"alt", "class", "lang", "charset", "name", "content", "src"}
    assert {name for _, attributes in page.tags for name in attributes} <= allowed
    assert "<script>alert(1)</script> ![x](http://x/y.png) **bold** | cell # Heading" in page.text
    assert "url(" not in page.text
    assert "@import" not in page.text


def parts_of(report, heading):
    """The paragraphs, tables and pictures of a section."""
    [section] = [section for section in report.sections if section.startswith(f"## {heading}\n")]
    return section.split("\n\n")[1:]


def test_losses_and_accuracies_lie_among_what_they_are_compared_with(report):
    *_, losses = parts_of(report, "Loss")
    assert losses.splitlines()[2:] == [
        r"| guessing evenly, ln\(vocabulary\) | 5.7038 |",
        "| **lowest validation loss of this run** | **3.2000** |",
    ]
    _, accuracies, remark = parts_of(report, "HellaSwag")
    assert accuracies.splitlines()[2:] == [
        "| gpt2-xl | 0.4893 |",
        "| **this run, step 10** | 0.3100 (95 %: 0.3000 to 0.3200) |",
        "| gpt2 | 0.2955 |",
        "| guessing | 0.2500 |",
    ]
    assert "a sample of 3 questions" in remark


def test_the_curve_is_compared_with_published_ones_where_there_are_any(folder, tmp_path):
    [reason] = curve_parts(read_run(folder), Report(""))
    assert reason.startswith("There is no published run to compare with: its n_layer is None")
    arguments = {**SETTING, **RECIPE, "dataset_name": FINEWEB_EDU, "tokenizer": "gpt2"}
    lecture = published_curves()["lecture-agndm"]
    records = [
        {**evaluation(int(tokens) // 2**19, loss), "tokens": int(tokens)}
        for tokens, loss in zip(lecture.tokens[:5], lecture.losses[:5], strict=True)
    ]
    report = Report("")
    picture, lines = curve_parts(read_run(make_run(tmp_path, records, config={"arguments": arguments})), report)
    assert picture == "![The loss among those of published runs](picture:curve)"
    assert report.pictures["curve"].startswith(b"\x89PNG")
    assert "| verdict | normal\\: " in lines


def test_no_page_names_the_folders_of_a_machine(tmp_path):
    shards = tmp_path / "a disk" / "tokens"
    shards.mkdir(parents=True)
    (shards / "manifest.json").write_text(json.dumps({"source": {"dataset": FINEWEB_EDU}, "tokenizer": {}}))
    arguments = ARGUMENTS | SETTING | RECIPE | {"dataset_name": None, "tokenizer": "gpt2", "shards": str(shards)}
    records = [{**evaluation(n, 6.0), "tokens": n * 2**19} for n in (250, 500)]
    records[0]["loss"] = 6.0
    records.insert(1, {"step": 250, "event": "resume", "changed": {"tokenizer": ["/mnt/a disk/x", "~jane/y"]}})
    folder = make_run(tmp_path / "run", records, config={**CONFIG, "arguments": arguments})
    message = f"{folder} and C:\\Users\\jane\\z are full (see https://a.b/c/d and data/e).\n\nmore"
    (folder / "stopped.json").write_text(json.dumps({"message": message}))
    run, report = read_run(folder), Report("")
    stopped = stopped_message(run, report)
    page = "\n".join([stopped, *curve_parts(run, report), fault_part(run, stopped)]).replace("\\", "")
    assert "run python -m modeling_gpt2repro.evaluation.validation --shards 'tokens' --output 'tokens/" in page
    assert "run and z are full (see https://a.b/c/d and data/e)." in page
    assert "with --tokenizer y instead of " in page
    for private in (str(tmp_path), "disk", "jane"):
        assert private not in page
    shutil.rmtree(shards)
    [reason] = curve_parts(run, report)
    assert "its shards \\(tokens\\) are not here" in reason


def test_samples_are_of_few_steps_and_of_a_repeated_step_the_later_one(report):
    _, at_0, at_4, at_10 = parts_of(report, "What it wrote")
    assert at_0.startswith("> step 0, validation loss 5.710\n>\n> **One day** at 0 ")
    assert at_4 == "> step 4\n>\n> **One day** it was made again"
    assert at_10.startswith("> step 10, validation loss 3.200\n>\n> **One day** at 10 ")
    assert early_ones(range(0, 900, 100)) == [0, 100, 300, 500, 800]
    assert early_ones(list(range(77)))[0::5] == [0, 76]
    assert early_ones([7]) == [7]


def test_time_is_divided_among_what_it_went_into(folder):
    lines, _ = time_parts(read_run(folder))
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines.splitlines()[2:]]
    # 44 s: 10 steps of 2 s with waits of 0.5 s, 2 evaluations of 4 s with 1 s for HellaSwag, 2 saves of 6 s, and 2
    # steps once more.
    assert [cell[:3] for cell in cells] == [
        ["training steps", "15 s", "34.1%"],
        ["waiting for data", "5 s", "11.4%"],
        ["evaluation: loss", "6 s", "13.6%"],
        ["evaluation: HellaSwag", "2 s", "4.5%"],
        ["saving checkpoints", "12 s", "27.3%"],
        ["undone by resuming", "4 s", "9.1%"],
    ]
    assert bar(0.5) == "█" * 10
    assert bar(0.0001) == "▏"
    assert [readable_count(count) for count in (12, 4288, 999_999, 1_433_600, 10**10)] == [
        "12",
        "4.29 k",
        "1 M",
        "1.43 M",
        "10 B",
    ]


def test_faults_are_listed(folder, tmp_path):
    assert fault_part(read_run(folder), "").splitlines() == [
        "- 1 update skipped for an unusable loss or gradient: step 8.",
        "- Resumed at step 4, with \\--learning_rate 0\\.0005 instead of 0\\.001.",
        "- 2 steps undone by a resume from an earlier checkpoint.",
    ]
    assert fault_part(read_run(make_run(tmp_path / "fine", [step(1)])), "").startswith("None: no update was skipped")
    damaged = make_run(
        tmp_path / "damaged", [step(1), step(2, loss=None), step(3, loss=None), step(4, overflowed=True)]
    )
    with (damaged / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "lo')
    assert fault_part(read_run(damaged), "Stopped by SIGTERM after step 4.").splitlines() == [
        "- 1 update left out for an overflow in fp16, as is normal now and then.",
        "- The loss was not a number in 2 steps: steps 2, 3.",
        "- Stopped by SIGTERM after step 4.",
        "- 1 damaged line of metrics.jsonl left out.",
    ]


def test_a_run_is_finished_running_stopped_or_ended_without_a_word(folder, tmp_path):
    assert status(read_run(folder), "") == "**Finished**: 10 of 10 steps."
    killed = read_run(make_run(tmp_path, list(map(step, range(1, 5)))))
    assert status(killed, "").startswith("**Not finished**: 4 of 10 steps, and no program is writing here now.")
    (tmp_path / "run.lock").touch()  # as its holder does every two seconds
    assert status(killed, "").startswith("**Running**: 4 of 10 steps so far, about 12 s left, on 2")  # 6 steps of 2 s
    (tmp_path / "run.lock").unlink()
    message = "Stopped by SIGTERM after step 4. Resume with:\n\n    python /home/me/train.py"
    (tmp_path / "stopped.json").write_text(json.dumps({"step": 4, "message": message}))
    stopped = stopped_message(killed, Report(""))
    assert status(killed, stopped) == "**Stopped early**: 4 of 10 steps. Stopped by SIGTERM after step 4."
    of_card = read_run(make_run(tmp_path / "alone", [step(3)], config=None))
    assert status(of_card, "").startswith("**As of step 3**")


def test_damaged_files_beside_the_numbers_are_left_out_in_a_sentence_each(tmp_path, capsys):
    make_run(tmp_path, [evaluation(0, 4.0)])
    (tmp_path / "model").mkdir()
    for name in ("samples.jsonl", "stopped.json", "model/config.json", "hellaswag.jsonl"):
        (tmp_path / name).write_text('{"step": ')
    command.main([str(tmp_path)])
    page = (tmp_path / "report.md").read_text()
    assert "# " + tmp_path.name.replace("_", "\\_")[:4] in page
    assert (tmp_path / "report-loss.png").exists()
    of_scores = Report("")
    assert count_examples(tmp_path / "hellaswag.jsonl", of_scores) == 0
    remarks = [*capsys.readouterr().err.splitlines(), *of_scores.remarks]
    assert len(remarks) == 4
    for name in ("samples.jsonl", "stopped.json", "config.json", "hellaswag.jsonl"):
        assert sum(f"{name} was left out" in remark for remark in remarks) == 1


def test_a_models_folder_leads_to_its_run_or_is_reported_by_what_it_holds(folder, tmp_path):
    assert command.find_run(folder / "model") == folder
    (folder / "step-000004").mkdir(exist_ok=True)
    assert command.find_run(folder / "step-000004") == folder
    elsewhere = tmp_path / "model"
    shutil.copytree(folder / "model", elsewhere)
    shutil.copy(folder / "metrics.jsonl", elsewhere)  # as an export does
    assert command.find_run(elsewhere) == elsewhere


@pytest.mark.parametrize(
    ("make", "words", "sentence"),
    [
        (lambda folder: None, ["none"], "there is no folder none"),
        (lambda folder: (folder / "empty").mkdir(), ["empty"], "empty is not a run: it has no metrics.jsonl"),
        (lambda folder: (folder / "file").touch(), ["file"], "there is no folder file"),
        (lambda folder: make_run(folder / "new", []), ["new"], "metrics.jsonl has no numbers yet"),
        (lambda folder: (make_run(folder / "r", [step(1)]) / "run.json").write_text("{"), ["r"], "run.json is damaged"),
        (
            lambda folder: make_run(folder / "r", [step(1)]),
            ["r", "--output", "r/metrics.jsonl/a.md"],
            "cannot be written",
        ),
        (
            lambda folder: make_run(folder / "r", [step(1)]),
            ["r", "--output", "a.html"],
            "must be a file that ends in .md",
        ),
        (lambda folder: make_run(folder / "r", [step(1)]), ["r", "--html", "--output", "a.md"], "ends in .html"),
    ],
)
def test_bad_input_ends_in_one_sentence(make, words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    with pytest.raises(SystemExit) as end:
        command.main(words)
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sentence in line


def test_parameters_are_counted_from_the_sizes(tiny_model):
    assert count_parameters(tiny_model.config.to_dict()) == tiny_model.num_parameters()
    gpt2 = {"n_layer": 12, "n_embd": 768, "n_positions": 1024, "vocab_size": 50257}
    assert count_parameters(gpt2) == 124_439_808
