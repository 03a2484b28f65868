"""`python -m benchmarks` and those of its programs that compare whole ways of doing things: the ladder, generation."""

import json
from importlib import import_module
from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks import __main__ as all_benchmarks
from benchmarks import generation, harness, speed_ladder
from benchmarks.peers.lecture_gpt import LectureGPT, generate_without_cache
from benchmarks.reports import ladder, results_table
from benchmarks.training_step import SHAPES, build_our_model, initial_weights
from modeling_gpt2repro.runtime.command_line import parse_command_line

TOY = SHAPES["toy"]
RUNGS = ["fp32", "TF32", "bf16", "compile", "flash attention", "aligned vocabulary", "fused AdamW", "ours"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A results file after a quick call that ran two benchmarks."""
    file = tmp_path_factory.mktemp("all") / "results.json"
    all_benchmarks.main(["--quick", "--only", "generation", "speed_ladder", "--output", str(file)])
    return file


# All of them


def test_each_planned_benchmark_is_one_that_its_program_accepts():
    full_plan = all_benchmarks.full_plan
    plans = {"cpu": full_plan(None), "gpu": full_plan(80 * 10**9), "quick": all_benchmarks.quick_plan()}
    for name, plan in plans.items():
        parts = list(plan)
        for part in parts:
            parse_command_line(import_module(f"benchmarks.{part.name}").BenchmarkArguments, list(part.flags))
            if part.data:
                parse_command_line(import_module("benchmarks.generated_data").DataArguments, list(part.data))
        left_out = all_benchmarks.SLOW_START if name == "quick" else ()
        assert {part.name for part in parts} == set(all_benchmarks.NAMES) - set(left_out)


def test_a_second_call_continues_with_what_is_missing(measured, tmp_path, capfd):
    before = json.loads(measured.read_text())
    assert [harness.benchmark_of(result) for result in before] == ["speed_ladder", "generation"]
    file = tmp_path / "results.json"
    file.write_text(json.dumps(before[:1]))  # as after an interruption
    call = ["--quick", "--only", "generation", "speed_ladder", "--output", str(file)]
    all_benchmarks.main(call)
    after = json.loads(file.read_text())
    assert after[0] == before[0]  # not measured again
    assert after[1]["settings"] == before[1]["settings"]
    assert after[1]["seconds"] != before[1]["seconds"]
    printed = capfd.readouterr().out
    assert printed.count("measured before") == 1
    assert "| generation, toy, 5 texts of 8 + 40 tokens | the lecture's loop without a cache |" in printed
    after[0]["versions"]["torch"] = "2.0.0"
    arguments = parse_command_line(speed_ladder.BenchmarkArguments, all_benchmarks_flags("speed_ladder"))
    assert harness.was_measured(before, "speed_ladder", arguments, "cpu")
    assert not harness.was_measured(after, "speed_ladder", arguments, "cpu")  # by another version
    after[0]["versions"]["torch"] = torch.__version__
    after[0]["machine"]["cpu"] = "another"
    assert not harness.was_measured(after, "speed_ladder", arguments, "cpu")


def all_benchmarks_flags(name: str) -> list[str]:
    return next(list(part.flags) for part in all_benchmarks.quick_plan() if part.name == name)


def test_a_benchmark_without_a_result_is_named_at_the_end(tmp_path, monkeypatch):
    broken = [all_benchmarks.Part("generation", ("--shape", "toy", "--new_tokens", "64"))]
    with pytest.raises(SystemExit, match="2"):  # its flags are wrong, which is a mistake of the plan
        all_benchmarks.run_part(broken[0], tmp_path / "results.json", "cpu", again=False)
    monkeypatch.setattr(
        all_benchmarks, "full_plan", lambda device: [all_benchmarks.Part("hellaswag", ("--data", "no.jsonl"))]
    )
    with pytest.raises(SystemExit, match=r"no result of hellaswag: see its error above; the same command tries it"):
        all_benchmarks.main(["--output", str(tmp_path / "results.json")])
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--only", "speed"], "only (speed) must be of training_step, speed_ladder, generation"),
        (["--quick", "--only", "prepare"], "only, with --quick, (prepare) must be of training_step"),
        (["--page", "no.md"], "no.md"),
    ],
)
def test_bad_input_of_all_benchmarks_is_one_sentence(flags, sentence, capfd):
    with pytest.raises(SystemExit) as ended:
        all_benchmarks.main(flags)
    assert ended.value.code == 2
    [line] = capfd.readouterr().err.splitlines()
    assert sentence in line


def test_a_gpus_memory_decides_how_many_sequences_a_step_has():
    sizes = {16e9: 1, 24e9: 4, 40e9: 8, 80e9: 16, 141e9: 16}
    assert {size: all_benchmarks.rows_that_fit(int(size)) for size in sizes} == sizes


def test_the_table_has_the_ratios_of_the_results():
    ratio = {"lower_quartile": 1.1, "median": 1.234, "upper_quartile": 1.3}
    result = {
        "command": "python -m benchmarks.training_step",
        "settings": {"shape": "tiny", "dtype": "fp32", "compile": True},
        "machine": {"cpu": "A", "threads": 4},
        "versions": {"torch": "2.13.0"},
        "peak_memory_bytes": {"ours": 30, "trainer": 40},
        "trainer_over_ours": {"seconds": ratio, "cpu_seconds": ratio | {"median": 9.0}},
    }
    line = (
        "| a step of training, tiny, fp32, compiled | stock GPT-2, transformers' Trainer | 1.23 (1.10 to 1.30) | "
        "0.75 of its memory, the same losses |\n"
    )
    assert line in results_table.table([result])
    assert "9.00" in results_table.table([result | {"machine": {"cpu": "A", "threads": 1}}])  # processor time


# The lecture's model and loops


@pytest.mark.parametrize("fused", [True, False])
def test_the_lectures_model_computes_what_ours_does(fused):
    ours = build_our_model(TOY, initializer_range=0.1)
    lecture = LectureGPT(**TOY, fused_attention=fused)
    lecture.load_weights(ours.state_dict())
    ids = torch.randint(TOY["vocab_size"], (2, 17))
    torch.testing.assert_close(lecture(ids), ours(ids).logits)
    assert sum(p.numel() for p in lecture.parameters()) == sum(p.numel() for p in ours.parameters())


def test_a_larger_vocabulary_adds_logits_of_zero():
    ours = build_our_model(TOY)
    lecture = LectureGPT(**(TOY | {"vocab_size": 576}))
    lecture.load_weights(initial_weights(TOY))
    ids = torch.randint(TOY["vocab_size"], (1, 5))
    torch.testing.assert_close(lecture(ids)[..., :512], ours(ids).logits)
    assert not lecture(ids)[..., 512:].any()


def test_generation_with_and_without_a_cache_write_the_same_and_count_their_positions(measured):
    [result] = [r for r in json.loads(measured.read_text()) if harness.benchmark_of(r) == "generation"]
    assert result["different_tokens"] > 5  # or equal samples would show little
    assert result["positions"] == {"ours": 5 * 47, "lecture": 5 * sum(range(8, 48))}
    assert result["tokens_per_second"]["ours"] == pytest.approx(200 / np.median(result["seconds"]["ours"]))
    model = build_our_model(TOY, initializer_range=0.1).eval()
    ids = torch.randint(TOY["vocab_size"], (3, 8))
    written = generate_without_cache(model, ids, 20)
    assert torch.equal(written[:, :8], ids)
    assert torch.equal(written, generation.generate_with_cache(model, ids, 20))
    for end in (8, 27):  # by hand: the most probable token after the first `end` ones
        assert torch.equal(written[:, end], model(written[:, :end]).logits[:, -1].argmax(-1))


def test_generation_beyond_the_context_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        generation.main(["--shape", "toy", "--new_tokens", "57"])
    assert "prompt_tokens and new_tokens (65 together) must be at most the toy model's context, 64." in (
        capsys.readouterr().err
    )


# The ladder


def rungs_of(**machine) -> list[speed_ladder.Rung]:
    return list(speed_ladder.plan(speed_ladder.Machine(**{"tf32": True, "bf16": True, "compiler": True} | machine)))


def test_each_rung_adds_one_thing_to_those_below_it():
    gpu = rungs_of()
    assert [rung.name for rung in gpu] == RUNGS
    assert not any(rung.note for rung in gpu)
    settings = ("matmul_precision", "dtype", "compiled", "fused_attention", "aligned", "fused_optimizer", "ours")
    values = [[getattr(rung, name) for name in settings] for rung in gpu]
    for number, (below, rung) in enumerate(pairwise(values)):
        assert [i for i in range(7) if below[i] != rung[i]] == [number]
    assert set(speed_ladder.LECTURE_MS) == set(RUNGS[:-1])


def test_a_rung_that_does_not_exist_here_says_so_and_is_not_built_upon():
    cpu = {rung.name: rung for rung in rungs_of(tf32=False, bf16=False, compiler=False)}
    assert list(cpu) == RUNGS
    assert cpu["TF32"].note == "same as fp32 here"
    assert [name for name in cpu if not cpu[name].exists] == ["TF32", "compile"]
    assert cpu["bf16"].dtype == "bf16"
    assert all(cpu[name].dtype == "fp32" and not cpu[name].compiled for name in RUNGS[4:])


def test_the_ladder_measures_every_rung_and_compares_its_losses(measured, tmp_path):
    [result] = [r for r in json.loads(measured.read_text()) if harness.benchmark_of(r) == "speed_ladder"]
    rungs = {rung["name"]: rung for rung in result["rungs"]}
    assert list(rungs) == RUNGS
    first = rungs["fp32"]["losses"]
    assert first[0] - first[-1] > 0.05  # it learns
    for name in ("flash attention", "fused AdamW", "ours"):
        assert len(rungs[name]["losses"]) == 2 + 1
        assert rungs[name]["gain"]["median"] > 0
    np.testing.assert_allclose(rungs["ours"]["losses"], first, rtol=0, atol=1e-5)
    shown = ladder.table(result)
    assert "| 1000 | |\n| TF32 (same as fp32 here) | | | | 333 | 3.00 |\n" in shown
    speed_ladder.save_figure(ladder.draw(result), tmp_path / "ladder.png")
    assert (tmp_path / "ladder.png").stat().st_size > 10_000


def test_a_rung_that_computes_something_else_ends_the_ladder():
    args = parse_command_line(speed_ladder.BenchmarkArguments, ["--shape", "small", "--device", "cpu"])
    rungs = rungs_of(tf32=False)
    losses = {rung.name: [8.5, 8.0] for rung in rungs}
    speed_ladder.check_losses(args, rungs, losses)
    added = float(np.log(5056 / 5027))  # the vocabulary's rows that belong to no token
    for name in ("aligned vocabulary", "fused AdamW"):
        speed_ladder.check_losses(args, rungs, losses | {name: [8.5 + added, 8.0 + added]})
    in_fp32 = rungs_of(tf32=False, bf16=False)
    for wrong in ({"ours": [8.5, 8.0 + added]}, {"flash attention": [8.5, 8.5]}, {"compile": [8.5, float("nan")]}):
        with pytest.raises(SystemExit, match=f"the rung {next(iter(wrong))} computes something else: its losses are"):
            speed_ladder.check_losses(args, in_fp32, losses | wrong)


def test_a_gpu_that_is_too_small_is_named(monkeypatch):
    def climb(args, rungs):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed_ladder, "climb", climb)
    with pytest.raises(SystemExit, match="7 sequences a step do not fit into the GPU's memory: give a smaller"):
        speed_ladder.main(["--shape", "toy", "--batch_rows", "7", "--device", "cpu"])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--picture", "a.gif"], "picture (a.gif) must end in .png or .svg."),
        (["--rounds", "0"], "rounds (0) must be at least 1."),
    ],
)
def test_bad_input_of_the_ladder_is_one_sentence(flags, sentence, capsys):
    with pytest.raises(SystemExit, match="2"):
        speed_ladder.main(flags)
    assert sentence in capsys.readouterr().err
