"""The comparison of loss curves with published ones: every published curve is named for what it is."""

import json
import math
import re
import shutil

import numpy as np
import pytest
from accelerate import Accelerator, PartialState
from PIL import Image
from toy_runs import ROOT, train_here

from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.evaluation import validation
from modeling_gpt2repro.runs import curve
from modeling_gpt2repro.runs.assessment import assess, default_reference, reason_without
from modeling_gpt2repro.runs.logger import RunLogger
from modeling_gpt2repro.runs.metrics import MetricsLog
from modeling_gpt2repro.runs.plots import legend_handles, loss_panel, plot_panels, save_figure
from modeling_gpt2repro.runs.read import read_run
from modeling_gpt2repro.runs.reference import (
    CURVES_FILE,
    FAULTS,
    GPT2_LOSS,
    NORMAL,
    Reference,
    gpt2_loss_of_shards,
    published_curves,
)

STEP = 2**19
LIKE_NORMAL = [*NORMAL, "agndm-linear_lr", "agndm-group_weight_g2", "wilsoncwu-fixed"]  # the last from another machine
FAULTY = {  # curve -> what it is, and on which side of normal
    "agndm-no_warmup": ("behind", "no warm-up"),
    "agndm-2.5_epoch_full": ("behind", "warm-up too long"),
    "wilsoncwu-unsynced": ("behind", "gradients not averaged over the GPUs under accumulation"),
    "agndm-smaller": ("behind", "a smaller model"),
    "agndm-bigger": ("ahead", "a larger model"),
    "llmc-fineweb-classic": ("behind", "other data"),
    "fast-adamw-rotary-fineweb-classic": ("ahead", "a faster recipe"),
}
LECTURE = {**curve.LECTURE, "dataset_name": "HuggingFaceFW/fineweb-edu"}


def published(name, until=1024):
    """(step, loss) of a published curve up to a step."""
    stored = published_curves()[name]
    first = [(0, stored.first_loss)] if stored.first_loss else []
    points = zip((stored.tokens / STEP).round().astype(int).tolist(), stored.losses.tolist(), strict=True)
    return [*first, *(point for point in points if point[0] <= until)]


def log_of(path, points):
    """The log.txt that the lecture's code writes."""
    lines = [f"{step} val {loss:.4f}\n{step} hella 0.2500\n{step} train 3.0\n" for step, loss in points]
    path.write_text("".join(lines))
    return curve.read_log(path, STEP)


def run_of(folder, points, tokens_per_step=STEP, **arguments):
    """A run's folder with these evaluations, on the lecture's shards unless told otherwise."""
    folder.mkdir()
    (folder / "shards").mkdir()
    (folder / "shards/edufineweb_val_000000.npy").touch()
    arguments = LECTURE | {"shards": str(folder / "shards"), "tokens_per_step": tokens_per_step} | arguments
    (folder / "run.json").write_text(json.dumps({"arguments": arguments, "data": {"data": "f" * 64}}))
    records = [{"step": s, "tokens": s * tokens_per_step, "validation_loss": loss} for s, loss in points]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_interval_shift_and_noise_worked_out_by_hand():
    """At step 10,000 the four have 3.1845 3.1896 3.1883 3.1766: mean 3.18475, in 250 steps 0.0055 less or more."""
    reference = default_reference()
    tokens = 10_000 * STEP
    assert float(reference.mean(tokens)) == pytest.approx(3.18475, abs=1e-4)
    sd = math.hypot(0.006, 4 * 0.0055 / 250)
    assert float(reference.sd(tokens)) == pytest.approx(sd, rel=0.02)
    assert float(reference.half_width(tokens)) == pytest.approx(3.182 * sd * math.sqrt(1.25) + 0.01, rel=0.02)
    assert reference.tokens_at(3.18475) == pytest.approx(tokens, rel=1e-3)
    assert reference.tokens_at(9.0) == pytest.approx(250 * STEP)
    assert reference.tokens_at(1.0) == pytest.approx(19_072 * STEP)


def test_the_noise_model_is_that_of_the_equivalent_runs():
    """Residuals in units of sd have a spread near 1, early and late, and a run from another machine is among them."""
    reference = default_reference()
    residuals = np.stack([published_curves()[name].losses - reference.losses for name in NORMAL])
    spread = residuals / reference.sd(reference.tokens) / math.sqrt(1 - 1 / 4)
    for first, last in ((250, 2000), (2000, 10_000), (10_000, 20_000)):
        inside = (reference.tokens >= first * STEP) & (reference.tokens < last * STEP)
        assert 0.6 < math.sqrt((spread[:, inside] ** 2).mean()) < 1.2
    other = published_curves()["wilsoncwu-fixed"]
    assert (np.abs(other.losses - reference.mean(other.tokens)) < 2 * reference.sd(other.tokens)).all()


@pytest.mark.parametrize("until", [250, 500, 1000, 1500, 5000, 19_072])
@pytest.mark.parametrize("name", LIKE_NORMAL)
def test_a_normal_run_is_normal_without_itself_and_two_hundredths_off(tmp_path, name, until):
    reference = Reference(without=[name])
    for off in (0.0, 0.02, -0.02):
        if off > 0 and name in ("agndm-linear_lr", "agndm-group_weight_g2") and until == 19_072:
            continue  # with another schedule and shared weights they end 0.02 above, which is not noise
        points = [(step, loss + off) for step, loss in published(name, until)]
        assessment = assess(log_of(tmp_path / "log.txt", points), reference=reference)
        assert assessment.verdict == "normal", (off, assessment.sentence)
        if until < 19_000 and name != "wilsoncwu-fixed":
            low, high = (assessment.final_loss[0] + sign * assessment.final_loss[1] for sign in (-1, 1))
            assert low < published(name, 19_072)[-1][1] < high


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_named_by_step_1000(tmp_path, name):
    verdict, fault = FAULTY[name]
    assessment = assess(log_of(tmp_path / "log.txt", published(name)))
    assert (assessment.verdict, assessment.faults[0].name) == (verdict, fault)
    assert len(assessment.faults) == (2 if fault == "warm-up too long" else 1)  # a smaller model looks much like it
    assert fault in assessment.sentence
    by_step_1500 = assess(log_of(tmp_path / "log.txt", published(name, 1536)))
    assert [found.name for found in by_step_1500.faults] == [fault]
    if fault in ("warm-up too long", "a faster recipe"):  # whose published runs were not as long
        assert by_step_1500.final_loss is None
    else:
        center, half = by_step_1500.final_loss
        assert center - half < published(name, 20_000)[-1][1] < center + half


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_that_is_unknown_is_never_called_normal(tmp_path, name):
    """Left out, its curve is named after no other, but for two: the sizes, each of which shows the other's shape."""
    assessment = assess(log_of(tmp_path / "log.txt", published(name)), reference=Reference(without=[name]))
    assert assessment.verdict == FAULTY[name][0]
    found = [fault.name for fault in assessment.faults]
    if name in ("agndm-smaller", "agndm-bigger"):
        assert found[0] == FAULTY[name][1]
    elif name == "agndm-2.5_epoch_full":
        assert found in ([], ["a smaller model"])  # the one fault that can be mistaken, until step 1,500
    else:
        assert found == []
        assert assessment.final_loss is None
        assert assessment.lines()["diagnosis"] == "it looks like no published run"


def test_faults_are_named_through_noise_and_at_other_strengths(tmp_path):
    """10 made-up instances of each: 0.8 to 1.25 times as strong, noise of the model, an offset of up to 0.02."""
    reference = default_reference()
    draw = np.random.default_rng(0)
    for name, (_, fault) in FAULTY.items():
        points = [point for point in published(name) if point[0] == 0 or point[0] >= 250]
        steps = np.array([step for step, _ in points if step])
        losses = np.array([loss for step, loss in points if step])
        first = [(0, loss) for step, loss in points if step == 0]
        mean = reference.mean(steps * STEP)
        named = 0
        for _ in range(10):
            noise = reference.sd(steps * STEP) * draw.normal(size=len(steps)) + draw.uniform(-0.02, 0.02)
            made_up = mean + draw.uniform(0.8, 1.25) * (losses - mean) + noise
            run = log_of(tmp_path / "log.txt", [*first, *zip(steps.tolist(), made_up.tolist(), strict=True)])
            faults = assess(run).faults
            named += bool(faults) and faults[0].name == fault
        assert named >= 9, (fault, named)


def test_a_divergence_is_caught_and_a_small_rise_is_not(tmp_path):
    normal = published("lecture-agndm", 5000)
    for rise, verdict in ((0.3, "diverging"), (0.05, "diverging"), (0.02, "normal")):
        assessment = assess(log_of(tmp_path / "log.txt", [*normal, (5250, normal[-1][1] + rise)]))
        assert assessment.verdict == verdict
    assessment = assess(log_of(tmp_path / "log.txt", [*normal, (5250, 4.0), (5500, 6.5)]))
    assert assessment.sentence == "diverging: the loss is 3.15 above the best one before"
    assert (assessment.final_loss, assessment.faults) == (None, ())
    for name in [*LIKE_NORMAL, *FAULTY]:  # no published run diverges, however wrong it is
        for until in (500, 1000, 5000, 10_000, 19_072):
            assert assess(log_of(tmp_path / "log.txt", published(name, until))).verdict != "diverging"


def test_a_loss_that_is_not_a_number_is_a_divergence_and_can_be_recovered_from(tmp_path):
    points = published("lecture-agndm", 2000)
    lost = assess(log_of(tmp_path / "log.txt", [*points, (2250, math.nan)]))
    assert (lost.verdict, lost.sentence) == ("diverging", "diverging: the loss is not a number")
    assert "not a number" in lost.lines()["evaluation"]
    assert assess(log_of(tmp_path / "log.txt", [*points[:4], (1100, math.inf), *points[5:]])).verdict == "normal"
    only = assess(run_of(tmp_path / "run", [(500, None)]) and read_run(tmp_path / "run"))
    assert only.verdict == "diverging"


def test_the_last_evaluation_of_a_step_counts_and_a_log_may_begin_late(tmp_path):
    points = published("lecture-agndm", 5000)
    twice = log_of(tmp_path / "log.txt", [*points[:-1], (5000, 9.0), points[-1]])
    assert assess(twice) == assess(log_of(tmp_path / "log.txt", points))
    late = assess(
        log_of(tmp_path / "log.txt", [point for point in published("agndm-no_warmup", 8000) if point[0] > 4000])
    )
    assert (late.verdict, late.faults) == ("behind", ())  # after step 2,500 faults are no longer told apart
    center, half = late.final_loss
    assert center - half < published("agndm-no_warmup", 19_072)[-1][1] < center + half


def test_a_resumed_run_is_read_as_if_it_had_not_been_interrupted(tmp_path):
    points = published("lecture-agndm")
    folder = run_of(tmp_path / "run", [*points[:4], (1000, 9.0)])
    with open(folder / "metrics.jsonl", "a") as file:
        for record in ({"event": "resume", "step": 750}, {"step": 750, "validation_loss": points[3][1]}):
            file.write(json.dumps({"tokens": 750 * STEP, **record}) + "\n")
        file.write(json.dumps({"step": 1000, "tokens": 1000 * STEP, "validation_loss": points[4][1]}) + "\n")
    assert assess(read_run(folder)).loss == points[4][1]
    assert assess(read_run(folder)).verdict == "normal"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"n_layer": 6}, "its n_layer is 6, and that of the published runs 12"),
        ({"block_size": 512}, "its block_size is 512, and that of the published runs 1024"),
        ({"init_from": "gpt2"}, "its init_from is gpt2, and that of the published runs None"),
        ({"shards": None, "dataset_name": "stories"}, "it was not trained on FineWeb-Edu"),
        ({"shards": None, "tokenizer": "other/tokenizer"}, "it was not trained on FineWeb-Edu"),
        ({"shards": "gone"}, "its shards (gone) are not here"),
    ],
)
def test_a_run_of_another_setting_has_no_reference(tmp_path, capsys, changed, reason):
    run = read_run(run_of(tmp_path / "run", published("lecture-agndm"), **changed))
    assert assess(run) is None
    assert reason_without(run).startswith(reason)
    curve.main([str(run.folder)])
    assert f"no reference for this setting: {reason}" in capsys.readouterr().out
    assert "95 % of published runs" not in [handle.get_label() for handle in legend_handles([run])]


def test_a_model_of_a_run_stands_for_the_run(tmp_path, capsys):
    run = run_of(tmp_path / "run", published("lecture-agndm", 1000))
    (run / "model").mkdir()
    curve.main([str(run / "model")])
    assert "verdict        normal" in capsys.readouterr().out


def test_a_run_with_too_little_or_too_much_has_no_reference(tmp_path):
    assert assess(read_run(run_of(tmp_path / "early", published("lecture-agndm", 0)))) is None
    assert "no evaluation from 0.13 B tokens" in reason_without(read_run(tmp_path / "early"))
    assert assess(read_run(run_of(tmp_path / "late", [(30_000, 3.0)]))) is None
    both = assess(read_run(run_of(tmp_path / "both", [*published("lecture-agndm", 19_072), (30_000, 2.9)])))
    assert both.step == 19_072
    assert "the published runs end at 10 B tokens, so later evaluations are left out" in both.notes
    (tmp_path / "early/run.json").unlink()
    assert "no run.json" in reason_without(read_run(tmp_path / "early"))


def test_gone_shards_can_be_vouched_for(tmp_path):
    run = read_run(run_of(tmp_path / "run", published("lecture-agndm"), shards="gone"))
    assert assess(run, gpt2_loss=GPT2_LOSS).verdict == "normal"


def test_other_tokens_per_step_compare_by_tokens_with_a_warning(tmp_path):
    points = [(2 * step, loss) for step, loss in published("lecture-agndm")]
    half = assess(read_run(run_of(tmp_path / "run", points, tokens_per_step=STEP // 2)))
    whole = assess(read_run(run_of(tmp_path / "whole", published("lecture-agndm"))))
    assert (half.step, half.tokens, half.sentence) == (2000, 1000 * STEP, whole.sentence)
    assert half.notes == ("tokens_per_step is 262,144, not 524,288, so it is compared by tokens",)
    assert (whole.notes, half.final_loss) == ((), whole.final_loss)
    other = assess(read_run(run_of(tmp_path / "other", published("lecture-agndm"), learning_rate=1.8e-3)))
    assert other.notes == ("learning_rate is 0.0018, not 0.0006, so no end is predicted",)
    assert other.final_loss is None


def test_another_validation_split_is_calibrated_by_gpt2(tmp_path, capsys):
    """A split that is 0.1 harder, for GPT-2 as for the run: the verdict is that on the lecture's."""
    harder = [(step, loss + 0.1) for step, loss in published("agndm-bigger")]
    folder = run_of(tmp_path / "run", harder)
    (folder / "shards/manifest.json").write_text(
        json.dumps({"source": {"dataset": "HuggingFaceFW/fineweb-edu"}, "tokenizer": {"name": "gpt2"}})
    )
    unknown = assess(read_run(folder))
    assert unknown.half_width == pytest.approx(assess(read_run(folder), GPT2_LOSS).half_width + 0.05)
    command = (
        f"python -m modeling_gpt2repro.evaluation.validation --shards {folder}/shards --output {folder}/shards/gpt2"
    )
    assert unknown.notes[1].startswith(f"to measure it, run {command}")
    curve.main([str(folder), "--gpt2", str(GPT2_LOSS + 0.1)])
    assert "ahead: 0.127 below" in capsys.readouterr().out

    report = {"model": "openai-community/gpt2", "shards_fingerprint": "f" * 64}
    report |= {"results": {"validation_loss": GPT2_LOSS + 0.1}, "encoded_again": False}
    score = folder / "shards/gpt2_validation.json"
    score.write_text(json.dumps(report))
    found = assess(read_run(folder))
    assert (found.verdict, found.loss - found.mean) == ("ahead", pytest.approx(4.0191 - 4.1465, abs=2e-4))
    assert "+0.1000" in found.notes[0]
    for wrong in ({"shards_fingerprint": "0" * 64}, {"model": "gpt2-xl"}, {"results": 7}, {"encoded_again": True}):
        score.write_text(json.dumps(report | wrong))
        assert assess(read_run(folder)) == unknown
        with pytest.raises(SystemExit, match="2"):
            curve.main([str(folder), "--gpt2", str(score)])
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    score.unlink()
    (folder / "baselines.json").write_text(json.dumps({"loss_baselines": {"GPT-2 124M": GPT2_LOSS + 0.1}}))
    assert assess(read_run(folder)) == found


def test_loss_png_has_a_band_where_a_reference_applies(tmp_path):
    run = read_run(run_of(tmp_path / "run", published("lecture-agndm", 2000)))
    figure = plot_panels([run], [loss_panel], columns=1, size=(8, 5))
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    at_2000 = [height for tokens, height in band if tokens == 2000 * STEP]
    assert (min(at_2000), max(at_2000)) == pytest.approx((3.6624 - 0.0315, 3.6624 + 0.0315), abs=2e-3)
    assert "95 % of published runs" in [text.get_text() for text in figure.legends[0].get_texts()]
    assert figure.axes[0].get_xlim()[1] == pytest.approx(1.01 * 2000 * STEP)
    [inset] = figure.axes[0].child_axes
    tokens, distances = inset.lines[0].get_data()
    assert (tokens[0], tokens[-1]) == (250 * STEP, 2000 * STEP)
    assert distances[-1] == pytest.approx(3.6588 - 3.6624, abs=1e-3)
    assert not plot_panels([run], [loss_panel, loss_panel], columns=2, size=(8, 5)).axes[0].child_axes  # too small


def test_the_live_log_has_a_line_of_it_only_where_a_reference_applies(tmp_path, capsys):
    numbers = {"validation_loss": 4.15, "evaluation_seconds": 1.0}
    for layers, expected in ((12, ["    curve: normal: 0.003 above the mean of 4 published runs"]), (4, [])):
        folder = run_of(tmp_path / str(layers), [], n_layer=layers)
        log = MetricsLog(folder, resumed_step=None, enabled=True)
        logger = RunLogger(Accelerator(cpu=True), log, total_steps=19_073, tokens_per_step=STEP, logging_steps=10)
        logger.log_evaluation(0, numbers | {"validation_loss": 10.95})
        logger.log_evaluation(1000, numbers)
        logger.close()
        lines = [line for line in capsys.readouterr().out.splitlines() if "curve" in line]
        assert [line.split(" (")[0] for line in lines] == expected


def test_the_command_answers_for_a_published_log(tmp_path, capsys):
    log_of(tmp_path / "log.txt", published("agndm-no_warmup"))
    curve.main([str(tmp_path / "log.txt")])
    answer = dict(
        line.split(None, 1) for line in capsys.readouterr().out.splitlines() if line.startswith(("ver", "dia"))
    )
    assert answer["verdict"].startswith("behind: 0.713 above the mean of 4 published runs")
    assert answer["diagnosis"].startswith("no warm-up: ")
    llmc = tmp_path / "main.log"
    llmc.write_text("".join(f"s:{step} tel:{loss:.4f}\n" for step, loss in published("llmc-fineweb-classic")))
    assert assess(curve.read_log(llmc, STEP)).faults[0].name == "other data"


def test_the_picture_shows_every_published_kind_and_the_run(tmp_path):
    run = log_of(tmp_path / "mine.txt", published("lecture-csabapalfi"))
    figure = curve.curve_figure(run, assess(run))
    labels = [text.get_text().replace("\n", " ") for text in figure.axes[1].texts]
    assert set(labels) == {"normal: 95 % of runs", "mine.txt", *(fault.name for fault in FAULTS)}
    with Image.open(save_figure(figure, tmp_path / "curve.png", dpi=100)) as image:
        assert image.size == (1050, 480)
    boxes = [text.get_window_extent() for text in figure.axes[1].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(figure.bbox.x1 >= box.x1 for box in boxes)
    assert len(curve.curve_figure().axes[1].texts) == len(labels) - 1  # without a run


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["absent"], "absent is not a run: it has no metrics.jsonl"),
        (["empty"], "empty is not a run: it has no metrics.jsonl"),
        (["other.txt"], "other.txt has no line such as '250 val 6.1696'"),
        ([], "There is nothing to do"),
        (["log.txt", "--output", "picture.pdf"], "--output picture.pdf must be a .png or .svg file"),
        (["log.txt", "--output", "log.txt/picture.png"], "--output log.txt/picture.png cannot be written"),
        (["log.txt", "--gpt2", "absent.json"], "--gpt2 absent.json must be a loss"),
        (["log.txt", "--gpt2", "-3"], "--gpt2 -3 must be a loss"),
        (["log.txt", "--tokens_per_step", "0"], "--tokens_per_step (0) must be at least 1"),
    ],
)
def test_bad_input_ends_in_one_sentence(tmp_path, capsys, words, problem):
    log_of(tmp_path / "log.txt", published("lecture-agndm"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.txt").write_bytes(b"\xff\x00 something else")
    with pytest.raises(SystemExit, match="2"):
        curve.main(words)
    message = capsys.readouterr().err.strip()
    assert problem in message
    assert len(message.splitlines()) == 1


@pytest.mark.slow  # a whole toy run
def test_a_run_keeps_gpt2s_loss_on_its_shards(shards, tmp_path):
    data = tmp_path / "shards"
    shutil.copytree(shards, data)
    report = {
        "model": "gpt2",
        "results": {"validation_loss": 3.31},
        "shards_fingerprint": open_shards(data).fingerprint,
    }
    (data / "gpt2_validation.json").write_text(json.dumps(report))
    assert train_here(tmp_path / "run", data, hellaswag="none") == 0
    shutil.rmtree(data)
    assert read_run(tmp_path / "run").loss_baselines["GPT-2 124M"] == 3.31


def test_every_published_curve_has_a_source():
    for name, stored in published_curves().items():
        assert stored.source.startswith("https://github.com/"), name
        assert stored.what, name


def test_the_page_of_expected_results_is_that_of_the_curves(tmp_path, capsys):
    page = (ROOT / "docs/expected-results.md").read_text(encoding="utf-8")
    stored = json.loads(CURVES_FILE.read_text())
    loss = {name: dict(map(tuple, c["validation_loss"])) for name, c in stored.items()}
    accuracy = {name: dict(map(tuple, stored[name]["hellaswag"])) for name in NORMAL}
    rows = re.findall(r"^\| ([\d,]+) \| \d+\.\d\d B \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 15
    for step, cells in rows:
        step = int(step.replace(",", ""))
        normal, hellaswag, *faulty = [cell.strip() for cell in cells.split("|")]
        mean = sum(loss[name][step] for name in NORMAL) / 4
        half_width = f" ± {float(default_reference().half_width(step * STEP)):.3f}" if step else ""
        assert normal == f"{mean:.3f}{half_width}"
        assert hellaswag == f"{sum(accuracy[name][step] for name in NORMAL) / 4:.3f}"
        assert faulty == [f"{loss[name][step]:.3f}" if step in loss[name] else "" for name in list(FAULTY)[:6]]
    log_of(tmp_path / "log.txt", published("agndm-no_warmup"))
    curve.main(["log.txt"])
    assert capsys.readouterr().out.removeprefix("log.txt\n") in page
    for name in (*NORMAL, *FAULTY):
        assert published_curves()[name].source.split(" and ")[0] in page, name


def test_gpt2_is_scored_on_the_shards_of_a_run_by_one_command(token_shards, make_model, tmp_path):
    """With a random model in GPT-2's place, whose name is then put into the report."""
    folder = tmp_path / "shards"
    shutil.copytree(token_shards.folder, folder)
    make_model("stock", 300).save_pretrained(tmp_path / "model")
    token_shards.tokenizer.save_pretrained(tmp_path / "model")
    output = folder / "gpt2_validation.json"
    validation.main(
        [*("--model", str(tmp_path / "model"), "--shards", str(folder)), *("--device", "cpu", "--output", str(output))]
    )
    PartialState._reset_state()
    report = json.loads(output.read_text())
    assert gpt2_loss_of_shards(folder, token_shards.fingerprint) is None  # of another model
    output.write_text(json.dumps(report | {"model": "openai-community/gpt2"}))
    assert gpt2_loss_of_shards(folder, token_shards.fingerprint) == report["results"]["validation_loss"]
    assert open_shards(folder).fingerprint == token_shards.fingerprint  # which the file beside them does not disturb
    assert gpt2_loss_of_shards(folder, "of other shards") is None
