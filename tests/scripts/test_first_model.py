"""The lesson's four runs: how many steps they get, what is collected, and the picture and page made of it."""

import json
import os
from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from warm_python import ROOT

from benchmarks import first_model
from benchmarks.reports import first_model_page

NAMES = ("story", "table", "samples", "kinds")
SECONDS = {"2-lecture": 10.0, "2-muon": 10.4, "4-lecture": 9.6, "4-muon": 10.0}


def measured(n_layer: int, recipe: str, right: float = 0.5) -> dict:
    """What one run gives, made by hand."""
    seconds = SECONDS[f"{n_layer}-{recipe}"]
    curve = [
        {"step": 0, "seconds": 0.0, "loss": 7.3, "floor": 0.4, "right": 0.0},
        {"step": 600, "seconds": seconds / 2, "loss": 1.0, "floor": 0.4, "right": right},
        {"step": 1200, "seconds": seconds, "loss": 0.5, "floor": 0.4, "right": 0.903},
    ]
    kinds = {"hero": 1.0, "animal": 0.806}
    return {**curve[-1], "times_floor": 1.25, "right_by_kind": kinds, "sample": f"{n_layer} {recipe}", "curve": curve}


def flags_for(folder) -> list[str]:
    """The command's flags that let it write into this folder, and a page for it to write into."""
    marks = (first_model_page.BEGIN + "\nearlier text\n" + first_model_page.END + "\n" for _ in NAMES)
    (folder / "page.md").write_text("".join(mark.format(name, name) for mark, name in zip(marks, NAMES, strict=True)))
    files = {"output": "results.json", "picture": "images/a.png", "page": "page.md", "runs_dir": "runs"}
    return [word for flag, name in files.items() for word in (f"--{flag}", str(folder / name))]


@pytest.fixture
def results(tmp_path) -> list[dict]:
    """The results file of four runs that were made by hand."""
    first_model.main(flags_for(tmp_path), lambda args, n_layer, recipe: measured(n_layer, recipe))
    return json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))


def test_steps_are_those_that_fit_by_the_median_after_the_warm_up():
    timed = [9.0] * 10 + [1.0, 2.0, 2.0, 2.5, 30.0]
    assert first_model.steps_that_fit(timed, 11.0) == 5
    assert first_model.steps_that_fit(timed, 12.0) == 6
    assert first_model.steps_that_fit(timed, 0.5) == 1


def test_what_is_collected_is_at_the_seconds_of_the_steps_before_it(tmp_path):
    def scores(step, loss, right):
        numbers = {"story_floor": 0.4, "story_tokens": 9, "story_mentions_right": right, "story_hero_right": right / 2}
        return {"step": step, "tokens": 8 * step, "validation_loss": 3.0, "story_loss": loss, **numbers}

    steps = [{"step": n, "tokens": 8 * n, "loss": 2.0, "step_seconds": n / 4} for n in (1, 2, 3)]
    records = [scores(0, 7.0, 0.0), steps[0], steps[1], scores(2, 1.0, 0.25), steps[2], scores(3, 0.5, 0.75)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    samples = [{"step": n, "prompt": first_model.prompt(), "samples": [f"after {n}"]} for n in (0, 2, 3)]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)))
    found = first_model.collect(tmp_path)
    assert [(point["step"], point["seconds"]) for point in found["curve"]] == [(0, 0.0), (2, 0.75), (3, 1.5)]
    assert (found["step"], found["seconds"], found["loss"], found["right"]) == (3, 1.5, 0.5, 0.75)
    assert found["times_floor"] == 1.25
    assert found["right_by_kind"] == {"hero": 0.375}
    assert found["sample"] == "after 3"


def test_an_interrupted_command_continues_with_the_runs_that_are_missing(tmp_path):
    flags = flags_for(tmp_path)
    begun = []

    def interrupted(args, n_layer, recipe):
        begun.append((n_layer, recipe))
        if len(begun) == 3:
            raise KeyboardInterrupt
        return measured(n_layer, recipe)

    with pytest.raises(SystemExit, match="the same command continues"):
        first_model.main(flags, interrupted)
    assert "| 2 | Muon | 1,200 |" in (tmp_path / "page.md").read_text(encoding="utf-8")
    first_model.main(flags, interrupted)
    assert begun == [(2, "lecture"), (2, "muon"), (4, "lecture"), (4, "lecture"), (4, "muon")]
    first_model.main(flags, interrupted)
    assert len(begun) == 5
    first_model.main([*flags, "--seconds", "20"], interrupted)  # other results are no reason to skip a run
    assert len(begun) == 9
    assert {r["settings"]["seconds"] for r in json.loads((tmp_path / "results.json").read_text())} == {20}


def test_the_page_has_the_results_and_keeps_what_is_around_them(results, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n\n{page.read_text(encoding='utf-8')}\nafter\n", encoding="utf-8")
    results[3]["curve"][1]["right"] = 0.49
    results[3]["sample"] = "A `fox` <b>\n\nand\x1b[0m " + "word " * 200
    first_model_page.rewrite_page(results, page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "earlier text" not in text
    assert "| 2 | Muon | 1,200 | 10 | 0.500 | 1.25 | 90% | 5 s |" in text
    assert "| 4 | Muon | 1,200 | 10 | 0.500 | 1.25 | 90% | 10 s |" in text
    assert "| right, of | hero | animal |" in text
    assert "| 4 layers, Muon | 100% | 81% |" in text
    assert "2 layers, AdamW:\n\n> 2 lecture\n" in text
    assert "> A \\`fox\\` \\<b\\>\n>\n> and�\\[0m word" in text
    assert "word ...\n" in text
    assert text.count("word") == first_model_page.QUOTED_WORDS - 4
    assert first_model.prompt() in text.replace("\n> ", " ")
    assert "Toy figures" not in text
    results[0]["settings"]["seconds"] = 20
    assert "Toy figures" in first_model_page.sections(results)["table"]
    page.write_text("no marks")
    with pytest.raises(ValueError, match=r"page\.md has no <!-- story: "):
        first_model_page.rewrite_page(results, page)


def test_labels_that_are_too_near_are_moved_apart():
    assert first_model_page.spread([0.5, 0.52, 1.0], gap=0.1) == pytest.approx([0.5, 0.6, 1.0])
    assert first_model_page.spread([0.98, 1.0], gap=0.1) == pytest.approx([0.9, 1.0])
    assert first_model_page.spread([0.1, 0.1, 0.1], gap=0.1) == pytest.approx([0.1, 0.2, 0.3])


def test_no_text_of_the_picture_is_on_top_of_another_or_outside(results):
    figure = first_model_page.figure_of(results)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    for axes in figure.axes:
        boxes = [label.get_window_extent(canvas.get_renderer()) for label in axes.texts]
        assert len(boxes) == 4 + (axes is figure.axes[0])  # the floor's
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
        assert all(figure.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def test_the_command_times_trains_and_writes(results, tmp_path, warm_python):
    """Three of the four runs are there already: the fourth is trained, for a fifth of a second, on a tenth of the text.

    Python imports `sitecustomize` when it starts: the trainings are processes that the command starts.
    """
    (tmp_path / "few").mkdir()
    fewer = "from modeling_gpt2repro.data.sources import stories\n\nstories.NUM_STORIES = 1000\n"
    (tmp_path / "few" / "sitecustomize.py").write_text(fewer)
    path = os.pathsep.join([str(tmp_path / "few"), str(ROOT)])
    train_flags = "--n_embd 8 --warmup_tokens 1792 --eval_tokens 1792 --sample_tokens 3"
    for result in results:
        result["settings"] |= {"seconds": 0.2, "train_flags": train_flags}
    (tmp_path / "results.json").write_text(json.dumps(results[:3]), encoding="utf-8")
    flags = [*flags_for(tmp_path), "--seconds", "0.2", "--train_flags", train_flags]
    printed = warm_python.run("-m", "benchmarks.first_model", *flags, PYTHONPATH=path).stdout
    assert "run 4 of 4: 4 layers, --recipe muon" in printed
    *others, ours = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert others == results[:3]
    assert ours["command"].startswith("python -m benchmarks.first_model --output ")
    assert ours["settings"]["n_layer"] == 4
    assert set(ours["versions"]) == {"python", *first_model.PACKAGES}
    assert ours["curve"][0]["step"] == ours["curve"][0]["seconds"] == 0
    assert ours["curve"][-1]["step"] == ours["step"] > 1
    assert ours["loss"] > ours["floor"] > 0.1
    assert ours["sample"].startswith(first_model.prompt())
    recorded = json.loads((tmp_path / "runs" / "4-muon" / "run.json").read_text(encoding="utf-8"))["arguments"]
    assert (recorded["n_layer"], recorded["n_embd"], recorded["recipe"]) == (4, 8, "muon")
    assert recorded["train_tokens"] == 1792 * ours["step"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["4-muon"]
    assert (tmp_path / "images" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert f"| 4 | Muon | {ours['step']:,} |" in (tmp_path / "page.md").read_text(encoding="utf-8")
