"""docs/lecture.md from top to bottom: its snippets with a small random model, its commands in processes."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from markdown_pages import ROOT, Block, blocks_of, commands_of
from patience import PATIENCE_SECONDS
from toy_runs import CPU_FP32, logged_values

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.batches.build import load_built_in_text
from modeling_gpt2repro.data.sources.documents import Document
from modeling_gpt2repro.data.sources.resolve import BUILT_IN_TEXTS
from modeling_gpt2repro.data.sources.stories import write_story
from modeling_gpt2repro.evaluation.hellaswag.score import score_hellaswag

PAGE = ROOT / "docs" / "lecture.md"
OPENAI = "openai-community/gpt2"
REPOSITORY = ("accelerate_configs", "benchmarks", "examples", "modeling_gpt2repro")
REPOSITORY += ("eval_hellaswag.py", "prepare_data.py", "train_accelerate.py")


def test_every_time_leads_to_its_second_of_the_video():
    links = re.findall(r"\[(\d):(\d\d):(\d\d)\]\(https://www\.youtube\.com/watch\?v=l8pRSuU81PU&t=(\d+)s\)",
                       PAGE.read_text(encoding="utf-8"))  # fmt: skip
    seconds = [int(t) for *_, t in links]
    assert seconds == [3600 * int(h) + 60 * int(m) + int(s) for h, m, s, _ in links]
    in_table, in_text = seconds[:31], seconds[31:]
    assert in_table == sorted(set(in_table))
    assert in_text == in_table  # each chapter once, in its order
    assert len(PAGE.read_text(encoding="utf-8").split("youtube.com/watch")) == len(links) + 1


# The snippets


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> tuple[dict, list[tuple[Block, str]]]:
    """The names that all snippets leave, run one after another, and what each has printed."""
    folder = tmp_path_factory.mktemp("lecture")
    documents = [Document(str(number), write_story(number).text) for number in range(300)]
    namespace = {}
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILT_IN_TEXTS, "stories", lambda: documents)
        patch.chdir(folder)
        tokenizer = load_built_in_text("stories", Path("runs/quickstart/data"), 1536, 256, 0.1).tokenizer
        torch.manual_seed(0)
        shape = {"n_layer": 1, "n_embd": 64, "n_head": 2, "n_positions": 256, "vocab_size": len(tokenizer)}
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=0, eos_token_id=0))
        model.save_pretrained("runs/quickstart/model")
        tokenizer.save_pretrained("runs/quickstart/model")
        for block in blocks_of(PAGE):
            if block.language == "python":
                lines = []
                namespace["print"] = lambda *words, lines=lines: lines.append(" ".join(map(str, words)))
                exec(compile(block.text, str(block), "exec"), namespace)
                printed.append((block, "\n".join(lines)))
        assert Path("learning_rate.png").read_bytes().startswith(b"\x89PNG")
        assert Path("runs/fresh/config.json").is_file()
    return namespace, printed


def test_snippets_print_what_the_page_shows_where_no_training_decides_it(session):
    page = PAGE.read_text(encoding="utf-8")
    text = "\n".join(output for _, output in session[1])
    for line in ("124,439,808 parameters", "True", "19,073 steps, 715 of warm-up: 8.4e-07, 6.0e-04, 6.0e-05"):
        assert line in text.splitlines()
        assert line in page.splitlines()
    for pattern in (
        r"[67]\.\d{3} nats per token; ln V is 7\.337",
        r"torch\.Size\(\[1, 20\]\) torch\.Size\(\[1, 20, 1536\]\)",
        r"step 0: sequences \[\d+, \d+, \d+, \d+\]",
        r"1 micro-batch, 4 micro-batches: gradients differ by \de-0\d",
        r"by the sum ending \d and by the mean ending \d",
    ):
        assert re.search(f"^{pattern}$", text, re.MULTILINE), pattern
        assert re.search(f"^{pattern}$", page, re.MULTILINE), pattern


def test_what_the_snippets_find_is_what_the_page_says(session):
    names, printed = session
    [losses] = [output for _, output in printed if "ln V is" in output]
    assert float(losses.split()[0]) == pytest.approx(math.log(1536), abs=0.3)
    assert torch.equal(names["x"][:, 1:], names["y"][:, :-1])
    assert names["text"].shape == (1, 80)
    [by_heart] = [output.splitlines() for _, output in printed if output.startswith("0 ")]
    assert float(by_heart[-1].split()[1]) < float(by_heart[0].split()[1]) - 2
    [order] = [output for _, output in printed if "process 1 of 2" in output]
    first, *halves = [json.loads(line[line.index("[") :]) for line in order.splitlines() if line.startswith("step 0")]
    assert [halves[0][0], halves[1][0], halves[0][1], halves[1][1]] == first
    scaled, unscaled = names["scaled"], names["unscaled"]
    assert scaled[0] == unscaled[0] == pytest.approx(math.hypot(0.02, 0.01), rel=0.05)  # wte and wpe
    assert unscaled[-1] / scaled[-1] == pytest.approx(math.sqrt(24), rel=0.1)
    assert names["norms"][0] > 1
    assert names["norms"][1] == pytest.approx(1, abs=1e-4)
    assert names["rates"].index(max(names["rates"])) == 714
    assert names["difference"] < 1e-5
    [scores] = score_hellaswag(names["model"], names["tokenizer"], [names["example"]], ["completion"])
    assert names["sums"] == pytest.approx([-total for total in scores.log_likelihoods], abs=1e-3)
    assert names["means"].index(min(names["means"])) == scores.prediction_norm


# The commands


def page_commands() -> list[list[str]]:
    return [words for block in blocks_of(PAGE) if block.language == "bash" for words in commands_of(block.text)]


def needs_the_network(words: list[str]) -> bool:
    return OPENAI in words or "prepare_data.py" in words


def run(words: list[str], folder: Path, **environment: str) -> str:
    """What a command prints that is given in a folder with the repository's files."""
    program, *arguments = words
    start = {"python": [], "accelerate": ["-m", "accelerate.commands.accelerate_cli"]}[program]
    python_path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    ended = subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"} | environment,
        capture_output=True,
        text=True,
        timeout=6 * PATIENCE_SECONDS,
    )
    assert ended.returncode == 0, f"{shlex.join(words)}\n{ended.stdout[-2000:]}\n{ended.stderr[-2000:]}"
    return ended.stdout


@pytest.fixture
def checkout(tmp_path) -> Path:
    for name in REPOSITORY:
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_page_run_one_after_another(checkout, make_model, tiny_tokenizer, shards):
    """With a quickstart of ten steps, and a random checkpoint of stock's format where the page has OpenAI's."""
    stock = checkout / "stock"
    make_model("stock", len(tiny_tokenizer)).save_pretrained(stock)
    tiny_tokenizer.save_pretrained(stock)
    (checkout / "runs" / "fresh").mkdir(parents=True)  # which a snippet writes
    for file in stock.iterdir():
        (checkout / "runs" / "fresh" / file.name).write_bytes(file.read_bytes())
    printed = {}
    for words in page_commands():
        if "prepare_data.py" in words:
            continue
        words = [str(stock) if word == OPENAI else word for word in words]
        if words[-2:] == ["--preset", "quickstart"]:
            words += ["--train_tokens", "17920"]
        if "eval_hellaswag.py" in words:
            words += ["--data", str(shards.parent / "hellaswag.jsonl")]
        environment = CPU_FP32 if "--multi_gpu" in words else {}
        printed[shlex.join(words)] = run(words, checkout, **environment)

    def output_of(part: str) -> str:
        return next(output for command, output in printed.items() if part in command)

    assert "A runs/quickstart/model: 1,018,624 parameters in 52 tensors" in output_of("--compare runs/fresh")
    assert (checkout / "weights.png").is_file()
    lines = [line.split() for line in output_of("--compare runs/stock").splitlines()]
    numbers = [line[-4:] for line in lines if "A" in line or "B" in line][2:-2]
    assert numbers[::2] == numbers[1::2]  # of ours and stock, but for their shapes
    assert logged_values(checkout / "runs" / "one-batch")[-1] < 0.05
    averaged, alone = (float(line.split()[-1]) for line in output_of("ddp_gradients").splitlines())
    assert averaged < 1e-5 < 0.1 < alone
    assert "fused AdamW" in output_of("speed_ladder")
    assert "tokens           100,352 in sequences of 224" in output_of("evaluation.validation")
    assert (checkout / "runs" / "quickstart" / "figures.png").is_file()
    [two] = [words for words in page_commands() if "--multi_gpu" in words]
    alone = [word for word in two if word not in ("--multi_gpu", "--num_processes", "2")]
    run([word.replace("two-processes", "one-process") for word in alone], checkout, **CPU_FP32)
    losses = [logged_values(checkout / "runs" / name) for name in ("two-processes", "one-process")]
    assert len(losses[0]) == 10
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


@pytest.mark.network
def test_the_commands_of_the_page_run_with_openais_weights(checkout):
    for words in page_commands():
        if needs_the_network(words) or "gpt2-ours" in words:
            printed = run([word.replace("10e6", "1e5") for word in words], checkout)
            if "evaluation.weights" in words[1:3][-1]:
                assert "124,439,808 parameters in 148 tensors" in printed
    assert (checkout / "gpt2.png").is_file()
