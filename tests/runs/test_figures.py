"""Reading a run's folder, and plotting one or more runs."""

import contextlib
import itertools
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
from modeling_gpt2repro.runs.plots import axis_limits, downsample, mean_width, plot_runs, running_mean
from modeling_gpt2repro.runs.read import (
    STORY_FLOOR,
    drop_undone_records,
    read_metrics,
    read_run,
    read_samples,
    write_baselines,
)

TOKENS_PER_STEP = 100
HELLASWAG = {"hellaswag_completion_acc_norm": 0.28, "hellaswag_lm_eval_acc_norm": 0.3}


def training_record(step, **numbers):
    usual = {"loss": 3 + 5 / step, "grad_norm": 1.0, "learning_rate": 1e-3 * step, "tokens_per_second": 5e4}
    return {"step": step, "tokens": step * TOKENS_PER_STEP, **usual, **numbers}


def evaluation_record(step, **numbers):
    return {"step": step, "tokens": step * TOKENS_PER_STEP, "validation_loss": 3.1 + 5 / (step + 1), **numbers}


def make_run(folder, records, **arguments):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"arguments": arguments}), encoding="utf-8")
    return folder


@pytest.fixture
def run(tmp_path):
    records = [
        evaluation_record(0, **HELLASWAG),
        *(training_record(step) for step in range(1, 31)),
        evaluation_record(30, **HELLASWAG),
    ]
    return make_run(tmp_path / "run", records)


def titles(figure):
    return [axes.get_title(loc="left") for axes in figure.axes]


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title(loc="left").startswith(title))


def texts(axes):
    return [text.get_text() for text in axes.texts]


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_an_interrupted_run_reads_like_an_uninterrupted_one():
    skipped = {"step": 2, "event": "skipped"}
    before = [evaluation_record(0), training_record(1), training_record(2), skipped, evaluation_record(2)]
    resumed = {"step": 2, "event": "resume"}
    after = [evaluation_record(2), training_record(3, loss=1.0)]
    records = [*before, training_record(3), training_record(4), resumed, *after]
    kept = [*before[:4], *after]  # a step is skipped before its checkpoint is saved, but evaluated afterwards
    assert drop_undone_records(records) == (kept, {2: {}})
    again = {"step": 1, "event": "resume"}
    assert drop_undone_records([*records, again]) == (before[:2], {1: {}})
    nothing_to_resume = {"step": 0, "event": "resume"}
    assert drop_undone_records([nothing_to_resume]) == ([], {0: {}})


def test_skipped_steps_are_not_part_of_a_curve(tmp_path):
    records = [
        training_record(1),
        training_record(2, loss=99.0),
        {"step": 2, "tokens": 200, "event": "skipped"},
        training_record(3),
        training_record(4, loss=math.nan),
        {"step": 4, "event": "resume"},
    ]
    run = read_run(make_run(tmp_path / "run", records))
    tokens, losses = run.series("loss")
    assert tokens.tolist() == [100, 300]
    assert losses.tolist() == [8.0, 3 + 5 / 3]
    assert run.skipped_tokens().tolist() == [200]
    assert run.resumed_tokens().tolist() == [400]
    assert [values.tolist() for values in run.series("mfu")] == [[], []]
    figure = plot_runs([run])
    marks = {line.get_marker(): line.get_xdata().tolist() for line in panel(figure, "Loss").lines}
    assert (marks["x"], marks["|"]) == ([200], [400])
    assert legend(figure)[-2:] == ["resumed", "update skipped"]


def test_a_folder_without_metrics_has_no_records(tmp_path):
    assert read_metrics(tmp_path) == []


def test_baselines_are_read_from_files_of_earlier_versions_too(run):
    stored = {"loss_yardsticks": {"guessing evenly": 7.9}, "hellaswag_yardsticks": {"completion": {"gpt2": 0.2955}}}
    (run / "yardsticks.json").write_text(json.dumps(stored))
    assert read_run(run).loss_baselines == {"guessing evenly": 7.9}
    assert read_run(run).hellaswag_baselines == {"completion": {"gpt2": 0.2955}}
    write_baselines(run, {"guessing evenly": 7.5}, BASELINES)
    assert read_run(run).loss_baselines == {"guessing evenly": 7.5}
    assert read_run(run).hellaswag_baselines["lm-eval"] == {"gpt2": 0.3114, "gpt2-xl": 0.5089}
    assert json.loads((run / "baselines.json").read_text()).keys() == {"loss_baselines", "hellaswag_baselines"}


def test_the_running_mean_is_centered():
    values = np.array([1.0, 2.0, 6.0, 4.0, 0.0])
    assert running_mean(values, 3).tolist() == [1.5, 3.0, 4.0, 10 / 3, 2.0]
    assert running_mean(values, 1).tolist() == values.tolist()
    assert [mean_width(count) for count in (0, 3, 100, 19_073)] == [1, 1, 3, 381]


def test_downsampling_keeps_the_order_and_every_spike():
    values = np.sin(np.arange(19_073) / 50)
    values[[7_777, 12_345]] = 100, -100
    x, y = downsample(np.arange(19_073), values)
    assert len(x) <= 1000
    assert np.all(np.diff(x) > 0)
    assert {7_777, 12_345} <= set(x.tolist())
    assert y.tolist() == values[x].tolist()
    few = np.arange(3.0)
    assert downsample(few, few) == (few, few)


def test_an_axis_cuts_off_spikes_and_includes_baselines_close_by():
    losses = np.array([10.0] * 2 + list(np.linspace(4, 3, 198)))
    low, high = axis_limits(losses)
    assert 2.9 < low < 3
    assert 4 < high < 4.1
    low, high = axis_limits(losses, [2.5, 8.0], below=1.0, above=0.1)
    assert low < 2.5
    assert high < 4.2  # the other baseline is too far away
    assert axis_limits(losses, [2.5], below=0.1)[0] > 2.9
    assert axis_limits(losses, [4.5], above=1.0)[1] > 4.6
    assert axis_limits(np.array([3.0, 9.0]))[1] > 9  # nothing is cut off a few values
    assert 10 < axis_limits(losses, included=[10.0])[1] < 10.5


def test_a_figure_has_a_panel_for_each_metric_of_the_run(run, tmp_path):
    steps = ["Learning rate", "Gradient norm, before clipping", "Tokens per second"]
    accuracies = ["HellaSwag acc_norm, completion", "HellaSwag acc_norm, lm-eval"]
    assert titles(plot_runs([read_run(run)])) == ["Loss, nats per token", *accuracies, *steps]
    three = make_run(tmp_path / "three", [training_record(step) for step in (1, 2, 3)])
    assert titles(plot_runs([read_run(three)])) == ["Loss, nats per token", *steps]
    started = make_run(tmp_path / "started", [evaluation_record(0)])
    assert titles(plot_runs([read_run(started)])) == ["Loss, nats per token"]


def test_a_loss_panel_shows_every_step_their_mean_and_the_last_validation_loss(run):
    figure = plot_runs([read_run(run)])
    loss = panel(figure, "Loss")
    expected = [3 + 5 / step for step in range(1, 31)]
    raw, mean, validation = (line for line in loss.lines if len(line.get_xdata()))
    assert raw.get_alpha() < 0.5
    assert list(raw.get_ydata()) == expected
    assert len(mean.get_ydata()) == 30
    assert list(zip(*validation.get_data(), strict=True)) == [(0, 8.1), (3000, 3.1 + 5 / 31)]
    assert texts(loss) == ["3.261"]
    assert legend(figure) == ["training", "validation"]


def test_each_protocol_is_compared_with_its_own_published_numbers(run):
    write_baselines(run, {"guessing evenly": 7.9}, BASELINES)
    figure = plot_runs([read_run(run)])
    assert "guessing evenly: 7.9" in texts(panel(figure, "Loss"))
    completion, lm_eval = (texts(panel(figure, f"HellaSwag acc_norm, {name}")) for name in ("completion", "lm-eval"))
    assert {"gpt2: 0.2955", "GPT-3 124M: 0.337"} <= set(completion)
    assert lm_eval == ["gpt2: 0.3114"]
    assert not any("gpt2-xl" in text for text in completion)  # far above what is shown


def test_labels_do_not_overlap(tmp_path):
    """GPT-2's loss is where the run ends; seven examples of HellaSwag have an interval that holds all baselines."""
    wide = {"hellaswag_completion_acc_norm_low": 0.02, "hellaswag_completion_acc_norm_high": 0.84}
    records = [training_record(step, loss=4 - 0.007 * step) for step in range(1, 101)]
    records += [evaluation_record(step, **HELLASWAG, **wide) for step in (0, 50)]
    records += [evaluation_record(100, **HELLASWAG, **wide) | {"validation_loss": 3.29}]
    run = make_run(tmp_path / "run", records, dataset_name="HuggingFaceFW/fineweb-edu")
    write_baselines(run, {"guessing evenly": 3.9}, BASELINES)
    figure = plot_runs([read_run(run)])
    figure.draw_without_rendering()
    for title, count in (("Loss", 3), ("HellaSwag acc_norm, completion", 5)):
        boxes = [text.get_window_extent() for text in panel(figure, title).texts]
        assert len(boxes) == count
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]


def story_run(folder, above_floor, validation_above=0.02):
    """A run on stories that comes near their floor, of 0.388 nats per token of a sequence."""
    losses = {step: 0.388 * above_floor + 7.2 * 0.5 ** (step / 30) for step in range(1, 401)}
    records = [evaluation_record(0, validation_loss=7.6, story_loss=1700, story_floor=86.9)]
    records += [training_record(step, loss=loss) for step, loss in losses.items()]
    for step in range(50, 401, 50):
        loss = {
            "validation_loss": losses[step] + validation_above,
            "story_loss": 224 * losses[step],
            "story_floor": 86.9,
        }
        records.append(evaluation_record(step, **loss))
    make_run(folder, records)
    guesses = {"guessing evenly, ln(vocabulary)": 7.62, "guessing by frequency, unigram": 5.4}
    write_baselines(folder, {**guesses, STORY_FLOOR: 0.388}, [])
    return read_run(folder)


@pytest.mark.parametrize(("above_floor", "validation_above"), [(1.02, 0.02), (1.1, -0.02), (1.6, 0.0)])
def test_the_floor_of_stories_is_a_baseline_that_is_shown_once(tmp_path, above_floor, validation_above):
    runs = [story_run(tmp_path / name, above_floor, validation_above) for name in "ab"]
    for shown, names in ((runs[:1], ["training (mean of 9 steps)"]), (runs, ["a", "b", "training"])):
        figure = plot_runs(shown)
        figure.draw_without_rendering()
        loss = panel(figure, "Loss")
        assert legend(figure) == [*names, "validation"]  # story_loss is in nats a story, and has no curve
        assert texts(loss).count("the floor: 0.388") == 1
        boxes = [text.get_window_extent() for text in loss.texts]
        assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
        assert all(loss.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_samples_of_a_prompt_are_read_in_their_order_and_damaged_lines_left_out(tmp_path):
    assert read_samples(tmp_path, "A") == []
    lines = [
        {"step": 0, "prompt": "A", "samples": ["A 1", "A 2"]},
        {"step": 0, "prompt": "B", "samples": ["B 1"]},
        {"step": -1, "prompt": "A", "samples": ["x"]},
        {"step": 5, "prompt": "A", "samples": []},
        {"step": 5, "prompt": "A", "samples": [1]},
        {"step": 10, "prompt": "A", "samples": ["A 3"]},
    ]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 20, "pro')
    assert read_samples(tmp_path, "A") == [(0, "A 1"), (10, "A 3")]


def falling_run(folder, start=7.6, end=4.0, steps=400, half_way=0.1, spike=None):
    """A run whose training loss falls from `start` toward `end`, half of it in that share of the steps."""
    losses = {step: end + (start - end) * 0.5 ** (step / steps / half_way) for step in range(1, steps + 1)}
    records = [evaluation_record(0, validation_loss=start)]
    records += [training_record(step, loss=loss if step != spike else 100.0) for step, loss in losses.items()]
    records += [evaluation_record(step, validation_loss=losses[step]) for step in (steps // 2, steps)]
    make_run(folder, records)
    write_baselines(folder, {"guessing evenly, ln(vocabulary)": 7.62, "guessing by frequency, unigram": 6.15}, [])
    return read_run(folder)


def test_the_first_losses_of_every_run_are_shown_and_a_spike_is_not(tmp_path):
    runs = [falling_run(tmp_path / f"{start}", start=start, spike=200) for start in (7.6, 9.5)]
    for shown, top in ((runs[:1], 7.62), (runs, 9.5)):
        low, high = panel(plot_runs(shown), "Loss").get_ylim()
        assert top < high < top + 1
        assert 3 < low < 4


@pytest.mark.parametrize(
    "shapes",
    [
        [{}],
        [{"half_way": 0.02}, {"half_way": 0.5}],
        [{"half_way": 0.9}, {"half_way": 0.02}],  # the first is still high at the right edge of the panel
        [{"end": 6.3}, {"end": 3.0}],  # a run that stops just over the baseline
        [{"end": 5.9, "steps": 200}, {"end": 6.4}, {"half_way": 0.02}],
        [{"start": 6.3, "end": 5.6, "half_way": 0.9}],
    ],
)
def test_no_label_lies_on_a_curve(tmp_path, shapes):
    figure = plot_runs([falling_run(tmp_path / f"{index}", **shape) for index, shape in enumerate(shapes)])
    figure.draw_without_rendering()
    loss = panel(figure, "Loss")
    labels = [text for text in loss.texts if text.get_text().startswith("guessing")]
    assert "guessing by frequency: 6.15" in texts(loss)
    for line in loss.lines:
        x, y = line.get_data()
        if len(x) < 3 or line.get_linestyle() == "None":
            continue  # baselines; points without a line between them
        close = np.linspace(x[0], x[-1], 5000)
        curve = loss.transData.transform(np.stack([close, np.interp(close, x, y)], axis=1))
        for label in labels:
            assert not label.get_window_extent().count_contains(curve), label.get_text()
            assert loss.bbox.contains(*label.get_window_extent().min)
            assert loss.bbox.contains(*label.get_window_extent().max)


@pytest.mark.parametrize(
    ("arguments", "comparable"),
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
def test_gpt2s_loss_is_a_baseline_only_on_fineweb_edu(tmp_path, monkeypatch, arguments, comparable):
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
    records = [training_record(step, loss=3.5 - step / 100) for step in range(1, 50)]
    figure = plot_runs([read_run(make_run(tmp_path / "run", records, **arguments))])
    assert ("GPT-2 124M: 3.292" in texts(panel(figure, "Loss"))) == comparable


def test_several_runs_share_a_figure_in_different_styles(run, tmp_path):
    names = [f"run{i}" for i in range(8)]
    runs = [read_run(make_run(tmp_path / name, [training_record(1), training_record(2)])) for name in names]
    figure = plot_runs(runs)
    assert legend(figure) == [*names, "training"]
    styles = {(handle.get_color(), handle.get_linestyle()) for handle in figure.legends[0].legend_handles[:8]}
    assert len(styles) == 8
    same = make_run(tmp_path / "other" / "run", [training_record(1)])
    assert legend(plot_runs([read_run(run), read_run(same)]))[:2] == [str(run), str(same)]
    longer = make_run(tmp_path / "longer", [training_record(500)])
    assert panel(plot_runs([read_run(run), read_run(longer)]), "Learning").get_xlim()[1] > 50_000


def test_the_command_writes_png_and_svg_and_prints_their_paths(run, tmp_path, capsys):
    figures.main([str(run)])
    assert capsys.readouterr().out == f"{run / 'figures.png'}\n{run / 'figures.svg'}\n"
    with Image.open(run / "figures.png") as image:
        assert image.size == (1650, 1455)
        colors = image.convert("RGB").getcolors(maxcolors=1 << 24)
    assert max(colors)[1] == (255, 255, 255)  # a light background
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= {color for _, color in colors}
    drawing = (run / "figures.svg").read_bytes()
    figures.main([str(run), "--output", str(tmp_path / "new" / "sheet.svg")])
    assert (tmp_path / "new" / "sheet.svg").read_bytes() == drawing  # byte for byte: no date, no random ids
    figures.main([str(run), str(run), "--output", str(tmp_path / "folder.v2")])
    assert sorted(path.name for path in (tmp_path / "folder.v2").iterdir()) == ["comparison.png", "comparison.svg"]
    assert not list(tmp_path.rglob("*.partial"))


def test_a_long_run_is_plotted_in_seconds(tmp_path):
    noise = random.Random(1)
    records = [training_record(step, loss=3 + 5 / step + noise.random()) for step in range(1, 19_074)]
    run = make_run(tmp_path / "long", records)
    started = time.process_time()
    figures.main([str(run)])
    assert time.process_time() - started < 10  # 2 s on one core of an AMD EPYC (Zen 4)
    assert (run / "figures.svg").stat().st_size < 1e6
    started = time.process_time()
    figures.plot_loss(run)
    assert time.process_time() - started < 2.5  # 0.3 s there


@contextlib.contextmanager
def full_disk():
    """Limit the files that this process writes to 1,000 bytes, which fails larger ones as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:  # pytest's own output may be a file, too
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_raises_and_leaves_the_earlier_plot(run, capsys):
    (run / "loss.png").write_bytes(b"old")
    with full_disk(), pytest.raises(OSError, match="File too large"):
        figures.plot_loss(run)
    assert (run / "loss.png").read_bytes() == b"old"
    with full_disk(), pytest.raises(SystemExit) as end:
        figures.main([str(run)])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"{run / 'figures.png'} cannot be written (File too large): give another --output.\n"
    )
    assert not list(run.glob(".*"))


def test_a_loss_plot_needs_no_numbers(tmp_path):
    assert figures.plot_loss(make_run(tmp_path / "run", [])).is_file()  # a full disk may have delayed the records


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere"], "nowhere is not a run: it has no metrics.jsonl; give the --output_dir of a training."),
        (["run", "begun"], "begun has no numbers yet: plot it after its first evaluation."),
        (["run", "--output", "a.pdf"], "output (a.pdf) must be a .png file, a .svg file, or a folder for both."),
        (["run", "--output", "file"], "output (file) must be a .png file, a .svg file, or a folder for both."),
        (["run", "--output", "file/a.png"], "file/a.png cannot be written (File exists): give another --output."),
    ],
)
def test_what_cannot_be_plotted_is_one_sentence_and_exit_code_2(run, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "begun", [{"step": 0, "event": "resume"}])
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as end:
        figures.main(argv)
    assert end.value.code == 2
    assert capsys.readouterr().err == message + "\n"
