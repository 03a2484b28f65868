"""Figures of runs: what is read of a run's folder, what is drawn of it, and what cannot be."""

import contextlib
import json
import math
import random
import resource
import time

import numpy as np
import pytest
from PIL import Image

from modeling_gpt2repro.evaluation.hellaswag.metrics import BASELINES
from modeling_gpt2repro.runs import figures
from modeling_gpt2repro.runs.curves import axis_limits, downsample, mean_width, running_mean
from modeling_gpt2repro.runs.read import read_metrics, read_run, replay, write_yardsticks

TOKENS_PER_STEP = 100
HELLASWAG = {"hellaswag_completion_acc_norm": 0.28, "hellaswag_lm_eval_acc_norm": 0.3}


def train_row(step, **numbers):
    usual = {"loss": 3 + 5 / step, "grad_norm": 1.0, "learning_rate": 1e-3 * step, "tokens_per_second": 5e4}
    return {"step": step, "tokens": step * TOKENS_PER_STEP, **usual, **numbers}


def evaluation_row(step, **numbers):
    return {"step": step, "tokens": step * TOKENS_PER_STEP, "validation_loss": 3.1 + 5 / (step + 1), **numbers}


def make_run(folder, rows, **arguments):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"arguments": arguments}), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path):
    rows = [
        evaluation_row(0, **HELLASWAG),
        *(train_row(step) for step in range(1, 31)),
        evaluation_row(30, **HELLASWAG),
    ]
    return make_run(tmp_path / "run", rows)


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_run_reads_as_if_it_had_never_been_stopped():
    rows = [evaluation_row(0), train_row(1), train_row(2), {"step": 2, "event": "skipped"}, evaluation_row(2)]
    resumed = {"step": 2, "event": "resume"}
    again = [evaluation_row(2), train_row(3, loss=1.0)]
    lines = [json.dumps(row) for row in [*rows, train_row(3), train_row(4), resumed, *again]]
    kept = [*rows[:4], *again]  # the skipped step came before the checkpoint, its evaluation after
    assert replay([*lines, '{"step": 4, "lo']) == (kept, [2], {})
    assert replay([*lines, json.dumps({"step": 1, "event": "resume"})]) == (rows[:2], [1], {})
    assert replay([json.dumps({"step": 0, "event": "resume"})]) == ([], [], {})  # 'latest', and there was nothing


def test_steps_that_were_skipped_are_no_part_of_a_curve(tmp_path):
    rows = [train_row(1), train_row(2, loss=99.0), {"step": 2, "tokens": 200, "event": "skipped"}, train_row(3)]
    log = read_run(make_run(tmp_path / "run", [*rows, train_row(4, loss=math.nan), {"step": 4, "event": "resume"}]))
    tokens, losses = log.series("loss")
    assert tokens.tolist() == [100, 300]
    assert losses.tolist() == [8.0, 3 + 5 / 3]
    assert log.skipped_tokens().tolist() == [200]
    assert log.resumed_tokens().tolist() == [400]
    assert [values.tolist() for values in log.series("mfu")] == [[], []]
    figure = figures.draw_sheet([log])
    marks = {line.get_marker(): line.get_xdata().tolist() for line in panel(figure, "Loss").lines}
    assert (marks["x"], marks["|"]) == ([200], [400])
    assert legend(figure)[-2:] == ["resumed", "update skipped"]


def test_there_are_no_rows_where_there_is_no_log(tmp_path):
    assert read_metrics(tmp_path) == []


def test_the_running_mean_is_that_of_each_value_and_its_neighbours():
    values = np.array([1.0, 2.0, 6.0, 4.0, 0.0])
    assert running_mean(values, 3).tolist() == [1.5, 3.0, 4.0, 10 / 3, 2.0]
    assert running_mean(values, 1).tolist() == values.tolist()
    assert [mean_width(count) for count in (0, 3, 100, 19_073)] == [1, 1, 3, 381]


def test_thinning_keeps_order_ends_of_range_and_every_spike():
    values = np.sin(np.arange(19_073) / 50)
    values[[7_777, 12_345]] = 100, -100
    x, y = downsample(np.arange(19_073), values)
    assert len(x) <= 1000
    assert np.all(np.diff(x) > 0)
    assert {7_777, 12_345} <= set(x.tolist())
    assert y.tolist() == values[x].tolist()
    few = np.arange(3.0)
    assert downsample(few, few) == (few, few)


def test_an_axis_leaves_out_the_fall_at_the_start_and_takes_in_a_near_yardstick():
    losses = np.array([10.0] * 2 + list(np.linspace(4, 3, 198)))
    low, high = axis_limits(losses)
    assert 2.9 < low < 3
    assert 4 < high < 4.1
    low, high = axis_limits(losses, [2.5, 8.0], below=1.0, above=0.1)
    assert low < 2.5
    assert high < 4.2  # guessing is far away by then
    assert axis_limits(losses, [2.5], below=0.1)[0] > 2.9
    assert axis_limits(losses, [4.5], above=1.0)[1] > 4.6
    assert axis_limits(np.array([3.0, 9.0]))[1] > 9  # all of a few


def test_a_sheet_has_a_panel_for_each_number_that_there_is(run, tmp_path):
    steps = ["Learning rate", "Gradient norm, before clipping", "Tokens a second"]
    accuracies = ["HellaSwag acc_norm, completion", "HellaSwag acc_norm, lm-eval"]
    assert titles(figures.draw_sheet([read_run(run)])) == ["Loss, nats per token", *accuracies, *steps]
    three = make_run(tmp_path / "three", [train_row(step) for step in (1, 2, 3)])
    assert titles(figures.draw_sheet([read_run(three)])) == ["Loss, nats per token", *steps]
    begun = make_run(tmp_path / "begun", [evaluation_row(0)])
    assert titles(figures.draw_sheet([read_run(begun)])) == ["Loss, nats per token"]


def test_a_loss_panel_shows_every_step_their_mean_and_the_last_validation_loss(run):
    figure = figures.draw_sheet([read_run(run)])
    loss = panel(figure, "Loss")
    expected = [3 + 5 / step for step in range(1, 31)]
    raw, mean, validation = (line for line in loss.lines if len(line.get_xdata()))
    assert raw.get_alpha() < 0.5
    assert list(raw.get_ydata()) == expected
    assert len(mean.get_ydata()) == 30
    assert list(zip(*validation.get_data(), strict=True)) == [(0, 8.1), (3000, 3.1 + 5 / 31)]
    assert texts(loss) == ["3.261"]
    assert legend(figure) == ["training", "validation"]


def test_each_protocol_is_measured_by_its_own_published_numbers(run):
    write_yardsticks(run, {"guessing evenly": 7.9}, BASELINES)
    figure = figures.draw_sheet([read_run(run)])
    assert "guessing evenly: 7.9" in texts(panel(figure, "Loss"))
    completion, lm_eval = (texts(panel(figure, f"HellaSwag acc_norm, {name}")) for name in ("completion", "lm-eval"))
    assert {"gpt2: 0.2955", "GPT-3 124M: 0.337"} <= set(completion)
    assert lm_eval == ["gpt2: 0.3114"]
    assert not any("gpt2-xl" in text for text in completion)  # far above what is shown


@pytest.mark.parametrize(
    ("arguments", "measured"),
    [
        ({"dataset_name": "HuggingFaceFW/fineweb-edu"}, True),
        ({"dataset_name": "HuggingFaceFW/fineweb-edu", "tokenizer": "mine"}, False),
        ({"dataset_name": "HuggingFaceFW/fineweb-edu", "mix": "a:0.5,b:0.5"}, False),
        ({"dataset_name": "python-prose"}, False),
        ({"dataset_name": "HuggingFaceFW/fineweb-edu", "shards": "mine"}, False),
        ({"dataset_name": "HuggingFaceFW/fineweb-edu", "shards": "edu"}, True),
        ({"dataset_name": "HuggingFaceFW/fineweb-edu", "shards": "edu, other tokenizer"}, False),
        ({"dataset_name": "HuggingFaceFW/fineweb-edu", "shards": "lecture"}, True),
        ({}, False),
    ],
)
def test_gpt2s_loss_is_drawn_where_the_data_is_fineweb_edu(tmp_path, monkeypatch, arguments, measured):
    monkeypatch.chdir(tmp_path)
    for name, dataset, tokenizer in (
        ("mine", None, "gpt2"),
        ("edu", "HuggingFaceFW/fineweb-edu", "gpt2"),
        ("edu, other tokenizer", "HuggingFaceFW/fineweb-edu", "trained on it"),
    ):
        (tmp_path / name).mkdir()
        manifest = {"source": {"dataset": dataset} if dataset else {"files": "*.txt"}, "tokenizer": {"name": tokenizer}}
        (tmp_path / name / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "lecture").mkdir()
    (tmp_path / "lecture" / "edufineweb_val_000000.npy").touch()
    rows = [train_row(step, loss=3.5 - step / 100) for step in range(1, 50)]
    figure = figures.draw_sheet([read_run(make_run(tmp_path / "run", rows, **arguments))])
    assert ("GPT-2 124M: 3.292" in texts(panel(figure, "Loss"))) == measured


def test_several_runs_share_a_sheet_and_are_told_apart(run, tmp_path):
    names = [f"run{i}" for i in range(8)]
    runs = [read_run(make_run(tmp_path / name, [train_row(1), train_row(2)])) for name in names]
    figure = figures.draw_sheet(runs)
    assert legend(figure) == [*names, "training"]
    looks = {(handle.get_color(), handle.get_linestyle()) for handle in figure.legends[0].legend_handles[:8]}
    assert len(looks) == 8
    same = make_run(tmp_path / "other" / "run", [train_row(1)])
    assert legend(figures.draw_sheet([read_run(run), read_run(same)]))[:2] == [str(run), str(same)]
    longer = make_run(tmp_path / "longer", [train_row(500)])
    assert panel(figures.draw_sheet([read_run(run), read_run(longer)]), "Learning").get_xlim()[1] > 50_000


def test_the_command_writes_a_picture_and_a_drawing_and_says_where(run, tmp_path, capsys):
    figures.main([str(run)])
    assert capsys.readouterr().out == f"{run / 'figures.png'}\n{run / 'figures.svg'}\n"
    with Image.open(run / "figures.png") as image:
        assert image.size == (1650, 1455)
        colors = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert max(colors)[1] == (255, 255, 255)  # a light background
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= {color for _, color in colors}
    drawing = (run / "figures.svg").read_bytes()
    figures.main([str(run), "--output", str(tmp_path / "new" / "sheet.svg")])
    assert (tmp_path / "new" / "sheet.svg").read_bytes() == drawing  # no date, no chance
    figures.main([str(run), str(run), "--output", str(tmp_path / "folder.v2")])
    assert sorted(path.name for path in (tmp_path / "folder.v2").iterdir()) == ["comparison.png", "comparison.svg"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_long_run_is_drawn_in_seconds(tmp_path):
    noise = random.Random(1)
    rows = [train_row(step, loss=3 + 5 / step + noise.random()) for step in range(1, 19_074)]
    run = make_run(tmp_path / "long", rows)
    started = time.process_time()
    figures.main([str(run)])
    assert time.process_time() - started < 10  # 2 s on one core of an AMD EPYC (Zen 4)
    assert (run / "figures.svg").stat().st_size < 1e6
    started = time.process_time()
    figures.plot_loss(run)
    assert time.process_time() - started < 2.5  # 0.3 s there


@contextlib.contextmanager
def no_room():
    """Inside, files of this process can be no longer than 1,000 bytes: what a full disk does to a larger one."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:  # before pytest writes, whose output may be a file, too
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_raises_and_leaves_the_picture_that_was_there(run, capsys):
    (run / "loss.png").write_bytes(b"old")
    with no_room(), pytest.raises(OSError, match="File too large"):
        figures.plot_loss(run)
    assert (run / "loss.png").read_bytes() == b"old"
    with no_room(), pytest.raises(SystemExit) as end:
        figures.main([str(run)])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"{run / 'figures.png'} cannot be written (File too large): give another --output.\n"
    )
    assert not list(run.glob(".*"))


def test_a_loss_picture_needs_no_numbers(tmp_path):
    assert figures.plot_loss(make_run(tmp_path / "run", [])).is_file()  # a full disk may have kept the rows back


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["nowhere"], "nowhere is no run: it has no metrics.jsonl; give the --output_dir of a training."),
        (["run", "begun"], "begun has no numbers yet: draw it after its first evaluation."),
        (["run", "--output", "a.pdf"], "output (a.pdf) must be a .png, a .svg, or a folder for both."),
        (["run", "--output", "file"], "output (file) must be a .png, a .svg, or a folder for both."),
        (["run", "--output", "file/a.png"], "file/a.png cannot be written (File exists): give another --output."),
    ],
)
def test_what_cannot_be_drawn_is_told_in_one_sentence(run, tmp_path, monkeypatch, capsys, argv, told):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "begun", [{"step": 0, "event": "resume"}])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        figures.main(argv)
    assert end.value.code == 2
    assert capsys.readouterr().err == told + "\n"
