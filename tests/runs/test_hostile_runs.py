"""Folders of runs by a stranger: no command waits forever, writes elsewhere, or lets a name command a terminal."""

import json
import os
import signal
from contextlib import suppress

import pytest
from damage import ENDLESS
from pushing import push_in_process
from test_report import CONFIG, SIZES, evaluation, make_run

from modeling_gpt2repro.hub.push_run import add_section
from modeling_gpt2repro.runs import curve, figures
from modeling_gpt2repro.runs.config import make_writable
from modeling_gpt2repro.runs.read import read_all_samples, read_run
from modeling_gpt2repro.runs.report import __main__ as report_command
from modeling_gpt2repro.runs.report.markdown import Report
from modeling_gpt2repro.runs.report.results import count_examples
from modeling_gpt2repro.storage.lock import LOCK_FILE, FolderLock, describe

SECONDS = 30  # after which a read is taken to wait forever
NAME = "\x1b[2J\x1b]0;title\x07\x9b31m\u202eevil"  # clears the screen, sets the title, turns the text around


@pytest.fixture(autouse=True)
def no_waiting():
    def late(*_):
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def run(tmp_path):
    folder = make_run(tmp_path / "run", [evaluation(0, 4.0), evaluation(2, 3.0)])
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(json.dumps(SIZES))
    (folder / "model/README.md").write_text("# A model")
    return folder


@pytest.mark.parametrize("put", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_file_without_end_is_left_out_or_named(run, put, one_sentence):
    for name in ("samples.jsonl", "hellaswag.jsonl"):
        put(run / name)
    assert read_all_samples(run) == {}
    assert count_examples(run / "hellaswag.jsonl", report := Report("")) == 0
    assert "hellaswag.jsonl was left out: it is" in report.remarks[0]
    (run / "metrics.jsonl").unlink()
    put(run / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"metrics\.jsonl cannot be read|is not a run") as error:
        read_run(run)
    assert str(error.value).isprintable()


def test_a_card_or_a_gitignore_that_is_no_text_is_named(run, tmp_path):
    (tmp_path / "extra").mkdir()
    for content in (b"\xff\xfe", b"x" * (2**22 + 1)):
        (run / "model/README.md").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"README\.md cannot be read: it is (not UTF-8|larger than 4,194,304 bytes)\."
        ):
            add_section(run / "model", tmp_path / "extra", "## Report", "x")


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "push.log"])
def test_no_lines_are_appended_to_the_file_that_a_link_names(run, tmp_path, name, one_sentence):
    (tmp_path / "precious").write_text("precious")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "precious")
    with pytest.raises(ValueError, match=rf"run/{name} is a link") as error:
        make_writable(run)
    one_sentence(error)


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe"])
def test_a_lock_overwrites_no_file_that_a_link_names(run, tmp_path, kind, capfd):
    outside = tmp_path / "outside"
    if kind == "link":
        outside.write_text("precious")
    if kind == "pipe":
        os.mkfifo(run / LOCK_FILE)
    else:
        (run / LOCK_FILE).symlink_to(outside)
    if kind == "dangling link":
        FolderLock(run).acquire()
        assert "run.lock cannot be written (" in capfd.readouterr().err
        assert not outside.exists()
        return
    with pytest.raises(ValueError, match=r"run\.lock cannot be written \(.*delete that file if there is none"):
        FolderLock(run).acquire()
    assert kind == "pipe" or outside.read_text() == "precious"


def test_the_holder_of_a_lock_is_no_command_to_a_terminal():
    assert describe({"pid": 7, "host": "node", "since": "today"}) == "process 7 on host node since today"
    assert describe({"pid": NAME, "host": NAME, "since": [NAME]}).isprintable()


def printed(command, capfd) -> str:
    with suppress(SystemExit):
        command()
    return "".join(capfd.readouterr())


def shown_files(folder) -> None:
    result = push_in_process(folder, "--hub_model_id", "user/any", "--dry_run")
    print(result.stdout, result.stderr)


COMMANDS = {
    "the pushed files": lambda run: shown_files(run / "model"),
    "a report": lambda run: report_command.main([str(run)]),
    "a figure": lambda run: figures.main([str(run), str(run / NAME)]),
    "a curve": lambda run: curve.main([str(run)]),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_names_are_no_commands_to_a_terminal(run, kind, capfd):
    arguments = CONFIG["arguments"] | {"dataset_name": NAME, "tokenizer": NAME, "shards": NAME, NAME: NAME}
    config = CONFIG | {"arguments": arguments, "commit": NAME, "versions": {NAME: NAME}, "command": NAME}
    (run / "run.json").write_text(json.dumps(config | {"hardware": CONFIG["hardware"] | {"device": NAME}}))
    (run / "stopped.json").write_text(json.dumps({"message": NAME}))
    (run / "model" / f"{NAME}.json").write_text("{}")
    (run / f"step-000001{NAME}").mkdir()
    (run / f"step-000001{NAME}/config.json").write_text("[")
    (run / "model/config.json").write_text(json.dumps(SIZES) if kind == "the pushed files" else "[")
    text = printed(lambda: COMMANDS[kind](run), capfd)
    assert text.strip()
    assert all(character.isprintable() or character in "\n" for character in text), text
    if kind == "a report":
        page = (run / "report.md").read_text()
        assert all(character.isprintable() or character in "\n" for character in page)
