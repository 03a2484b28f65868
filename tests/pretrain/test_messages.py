"""What a run prints for people."""

import ast
import json
import re
import shlex
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import prepare_data
from modeling_gpt2repro.data.shards.dataset import open_shards
from modeling_gpt2repro.pretrain import messages
from modeling_gpt2repro.runs.read import STORY_FLOOR
from modeling_gpt2repro.training.arguments import TrainArguments
from modeling_gpt2repro.training.presets import PRESETS


def test_the_warning_of_a_slow_cpu_counts_the_operations_of_the_model_that_is_trained(monkeypatch, tmp_path):
    printed = []
    operations = []

    def estimate(flops: float, dtype: torch.dtype) -> float:
        operations.append(flops)
        return flops / 1e9

    monkeypatch.setattr(messages, "estimate_cpu_seconds", estimate)
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", print=printed.append)
    for preset in ("quickstart", "gpt2-124m"):
        args = TrainArguments(preset=preset, **PRESETS[preset])
        messages.warn_of_slow_cpu(args, accelerator)
        messages.warn_of_slow_cpu(args, accelerator, 50257)  # once the data are open; it has been said
    # 6 operations a parameter and token, and those of attention: 12 * layers * width * context.
    # The quickstart: 1,536 ids and 4 blocks of 12 * 128^2 weights, 1.0 M without positions, biases and norms.
    assert operations[0] == pytest.approx(1_433_600 * (6 * 983_040 + 12 * 4 * 128 * 224), rel=0.03)
    assert operations[1] == pytest.approx(1e10 * (6 * 124_439_808 + 12 * 12 * 768 * 1024), rel=0.03)
    assert "Fewer --train_tokens take less time." in printed[0]
    assert "--preset quickstart trains a small GPT-2 in minutes" in printed[1]

    # A run so short that no CPU takes an hour for it: nothing is measured.
    args.train_tokens = 400
    messages.warn_of_slow_cpu(args, accelerator)
    args.train_tokens = 430
    assert len(operations) == 2
    messages.warn_of_slow_cpu(args, accelerator)
    assert operations.pop() == pytest.approx(430 * (6 * 124_439_808 + 12 * 12 * 768 * 1024), rel=0.03)
    assert len(printed) == 2

    # What the arguments leave open is in the model and the data.
    args = TrainArguments(init_from="gpt2", shards=str(tmp_path), n_layer=None, block_size=None)
    messages.warn_of_slow_cpu(args, accelerator)
    assert len(printed) == 2
    args.n_layer, args.block_size = 12, 512
    messages.warn_of_slow_cpu(args, accelerator, 1000)
    parameters = 124_439_808 - (50_257 - 1000 + 1024) * 768
    assert operations[2] == pytest.approx(1e10 * (6 * parameters + 12 * 12 * 768 * 512), rel=0.03)
    assert len(printed) == 3


@pytest.mark.parametrize("name", ["my run", "it's", 'the "best"', "a\\b", "тест-模型-🙂", "two\nlines", "{x}", "'''"])
def test_the_python_line_at_the_end_of_a_run_holds_for_any_name_of_its_folder(name, tiny_tokenizer):
    folder = Path("runs") / name / "model"
    args = SimpleNamespace(output_dir=str(folder.parent), sample_prompts=[name], block_size=64, built_in_text=None)
    text = messages.end_message(args, SimpleNamespace(step=1, tokens=2, train_seconds=3), folder, tiny_tokenizer)
    code = ast.parse(textwrap.dedent(text.partition("Make it talk:")[2]))
    calls = [node for node in ast.walk(code) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    (pipeline,) = [call for call in calls if call.func.id == "pipeline"]
    (talk,) = [call for call in calls if call.func.id == "talk"]
    assert {word.arg: ast.literal_eval(word.value) for word in pipeline.keywords}["model"] == f"runs/{name}/model"
    assert ast.literal_eval(talk.args[0]) == name


def end_of_a_run(tmp_path, tokenizer, samples=(), **arguments):
    """What a run with these lines of samples.jsonl prints at its end."""
    lines = [json.dumps({"step": step, "prompt": "the sea", "samples": texts}) for step, *texts in samples]
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    given = {"sample_prompts": ["the sea", "B"], "block_size": 64, "built_in_text": None, **arguments}
    state = SimpleNamespace(step=200, tokens=2, train_seconds=3)
    args = SimpleNamespace(output_dir=str(tmp_path), **given)
    return messages.end_message(args, state, tmp_path / "model", tokenizer)


def test_a_run_ends_with_what_it_wrote_first_and_last(tmp_path, tiny_tokenizer):
    samples = [(0, "the sea xq\x1b[2Jzz\n\n\tv", "second"), (100, "the sea was"), (2000, "the sea was cold. " * 99)]
    text = end_of_a_run(tmp_path, tiny_tokenizer, samples)
    before, after = text.split("At step 0 it wrote:\n\n")[1].split("\n\nNow, at step 2,000, it writes:\n\n")
    assert before == "    the sea xq\\x1b[2Jzz v"  # an escape sequence that would clear the screen
    shown, _, _ = after.partition("\n\nMake it talk:")
    assert len(shown.splitlines()) == 10
    assert all(
        line.startswith("    the sea" if number == 0 else "    ") for number, line in enumerate(shown.splitlines())
    )
    assert all(len(line) <= 100 for line in shown.splitlines())
    assert shown.endswith(" ...")
    assert not re.search(r"\n\n\n", text)


@pytest.mark.parametrize("samples", [[], [(200, "the sea")]])
def test_a_run_with_less_than_two_samples_ends_without_the_pair(tmp_path, tiny_tokenizer, samples):
    text = end_of_a_run(tmp_path, tiny_tokenizer, samples)
    assert "wrote" not in text
    assert not re.search(r"\n\n\n", text)


def test_a_resumed_run_without_a_first_sample_shows_the_earliest_that_there_is(tmp_path, tiny_tokenizer):
    text = end_of_a_run(tmp_path, tiny_tokenizer, [(50, "the sea xq"), (200, "the sea was cold")])
    assert "At step 50 it wrote:\n\n    the sea xq\n\nNow, at step 200, it writes:\n\n    the sea was cold\n" in text


@pytest.mark.parametrize(
    ("built_in_text", "block_size", "new_tokens"),
    [("stories", 300, "300 - prompt"), ("python-prose", 300, "40"), (None, 300, "40"), (None, 12, "12 - prompt")],
)
def test_a_story_may_fill_the_context_and_other_text_is_short(
    tmp_path, tiny_tokenizer, built_in_text, block_size, new_tokens
):
    prompt = len(tiny_tokenizer("the sea")["input_ids"])
    text = end_of_a_run(tmp_path, tiny_tokenizer, built_in_text=built_in_text, block_size=block_size)
    expected = block_size - prompt if "prompt" in new_tokens else int(new_tokens)
    assert f"talk('the sea', max_new_tokens={expected}, " in text


def test_the_start_of_a_run_names_the_floor_of_stories_only(tiny_model):
    accelerator = SimpleNamespace(
        num_processes=1,
        device=torch.device("cpu"),
        mixed_precision="no",
        state=SimpleNamespace(dynamo_plugin=SimpleNamespace(backend=SimpleNamespace(value="NO"))),
    )

    def start(baselines):
        args = TrainArguments()
        optimizer = torch.optim.AdamW(tiny_model.parameters(), fused=True)
        return messages.start_message(args, accelerator, tiny_model, optimizer, "data", (1, 1), {}, baselines, 0)

    guess = {"guessing evenly": 7.62451}
    assert "no model can do better" not in start(guess)
    text = start({**guess, STORY_FLOOR: 0.07422})
    assert "\nbaselines    guessing evenly 7.62 (nats per token)\n" in text
    # A sequence is a story, and has 1,024 tokens by default: 0.07422 * 1,024 = 76.0.
    assert "\nfloor        no model can do better than 0.074 nats per token, 76.0 a story\n" in text


def test_commands_that_are_printed_are_quoted_for_the_shell(capsys):
    folder = "data/it's mine"
    totals = {"tokens": 1, "documents": 1, "shards": []}
    manifest = {"splits": {"train": totals}, "tokenizer": {"name": "any", "vocab_size": 1, "sha256": ""}}
    prepare_data.report(SimpleNamespace(folder=Path(folder), manifest=manifest), seconds=1)
    with pytest.raises(ValueError, match="no folder") as refused:
        open_shards(folder)
    with pytest.raises(ValueError, match="no folder") as refused_by_training:
        TrainArguments(shards=folder)
    sentences = [str(error.value).removesuffix(".") for error in (refused, refused_by_training)]
    for message in (capsys.readouterr().out, *sentences):
        command = re.search(r"(prepare_data|train_accelerate)\.py --.*", message)[0]
        assert shlex.split(command)[2:] == [folder]


def test_the_message_of_a_jump_holds_where_a_schedule_ends_at_zero():
    before = {"train_tokens": 100, "tokens_per_step": 1, "warmup_tokens": 0, "learning_rate": 0.01}
    before["final_learning_rate_ratio"] = 0.0
    longer = {**before, "train_tokens": 200}
    for schedules, step, jump in (
        ((before, longer), 100, "after step 100 from 0.00e+00 to 5.00e-03, because"),
        ((longer, before), 100, "after step 100 from 5.00e-03 to 0.00e+00, because"),
    ):
        message = messages.learning_rate_message(*schedules, step)
        assert jump in message
        assert "--learning_rate" not in message
    assert messages.learning_rate_message({}, longer, 100) is None
