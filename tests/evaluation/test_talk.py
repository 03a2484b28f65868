"""The talk command: what is printed for which model and prompt, in a pipe, in a terminal, and for bad input."""

import os
import re
import select
import sys

import pytest
import torch
from patience import PATIENCE_SECONDS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from warm_python import ROOT

from modeling_gpt2repro.data.tokenizer import train_tokenizer
from modeling_gpt2repro.evaluation.sampling import sample_tokens, whole_characters
from modeling_gpt2repro.evaluation.talk import main
from modeling_gpt2repro.hub.export import save_hub_folder

PROMPT = "the cold sea"
COLORS = {"TERM": "xterm-256color", "FORCE_COLOR": "1"}  # rich then takes a file for a terminal with colors


@pytest.fixture
def save(make_model, tiny_tokenizer, tmp_path):
    """save(folder, kind) -> the folder of a random model below `tmp_path`, with the code of ours or without."""

    def saved(folder, kind="ours", tokenizer=tiny_tokenizer):
        model = make_model(kind, len(tokenizer))
        if kind == "ours":
            save_hub_folder(model, tokenizer, tmp_path / folder)
        else:
            model.save_pretrained(tmp_path / folder)
            tokenizer.save_pretrained(tmp_path / folder)
        return folder

    return saved


@pytest.fixture
def talk(capsys):
    """talk(*words) -> what the command prints to stdout and to stderr."""

    def talked(*words):
        main([str(word) for word in ("--device=cpu", *words)])
        return capsys.readouterr()

    return talked


@pytest.fixture
def refused(capsys, one_sentence):
    """refused(*words) -> the one sentence with which the command ends, with exit code 2."""

    def ended(*words):
        with pytest.raises(SystemExit) as end:
            main([str(word) for word in words])
        assert end.value.code == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.endswith(".")
        assert not last.startswith("  - ")  # one of several
        return last

    return ended


@pytest.fixture
def text_of(make_model, tiny_tokenizer):
    """text_of(kind, seed, new_tokens) -> PROMPT and what the loop makes of it."""

    def text(kind, seed, new_tokens, prompt=PROMPT, **options):
        ids = tiny_tokenizer(prompt)["input_ids"]
        list(sample_tokens(make_model(kind, len(tiny_tokenizer)), ids, new_tokens, seed=seed, end_ids={0}, **options))
        return shown(tiny_tokenizer.decode(ids))

    return text


def shown(text):
    """Control characters as the command shows them; only those of Latin-1, which is all that single bytes can make."""
    return "".join(c if c.isprintable() or c in "\n\t" or ord(c) > 0xFF else f"\\x{ord(c):02x}" for c in text)


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_the_text_is_the_prompt_and_its_continuation(save, talk, text_of, kind):
    found = talk(save("model", kind), "--prompt", PROMPT, "--max_new_tokens", 30, "--seed", 7, "--top_k", 9)
    assert found.out == text_of(kind, 7, 30, top_k=9) + "\n\n"
    assert "model          model: " in found.err
    assert "[30 tokens, seed 7]\n" in found.err
    warm = talk("model", "--prompt", PROMPT, "--max_new_tokens", 30, "--seed", 7, "--temperature", 3)
    assert warm.out == text_of(kind, 7, 30, temperature=3) + "\n\n" != found.out
    greedy = talk("model", "--prompt", PROMPT, "--max_new_tokens", 30, "--temperature", 0)
    assert greedy.out == text_of(kind, 0, 30, temperature=0) + "\n\n"


def test_of_a_run_the_final_model_talks_or_else_the_last_checkpoint(save, talk, tmp_path):
    for name in ("step-000020", "step-1000000", "step-999999", "step-preflight"):
        save(f"run/{name}")
    (tmp_path / "run/step-2000000").mkdir()  # without a model
    words = ("run", "--prompt", PROMPT, "--max_new_tokens", 1)
    assert "model          run/step-1000000, so far the last checkpoint of run: " in talk(*words).err
    save("run/model", "stock")
    assert "model          run/model, the final model of run: " in talk(*words).err
    assert "model          run/step-000020: " in talk("run/step-000020", *words[1:]).err


def test_the_folder_of_a_real_run_talks(finished, talk):
    found = talk(finished[0], "--prompt", "the cat sees", "--max_new_tokens", 5)
    assert f"model          {finished[0]}/model, the final model of {finished[0]}: " in found.err
    assert found.out.startswith("the cat sees")


def test_continuations_differ_and_each_has_a_seed_that_repeats_it(save, talk):
    words = (save("model"), "--prompt", PROMPT, "--max_new_tokens", 8)
    found = talk(*words, "--num_return_sequences", 3)
    texts = found.out.split("\n\n")[:-1]
    seeds = re.findall(r"\[(?:8 tokens|end of text), seed (\d+)\]", found.err)
    assert len(texts) == len(set(texts)) == len(set(seeds)) == 3
    assert f", seed {seeds[0]}\n" in found.err
    for text, seed in zip(texts, seeds, strict=True):
        assert talk(*words, "--seed", seed).out == f"{text}\n\n"
    assert len({talk(*words).err for _ in range(4)}) > 1  # without a seed it is another one each time
    last = 2**32 - 1
    assert "seed 0]" in talk(*words, "--seed", last, "--num_return_sequences", 2).err


def test_end_of_text_ends_a_continuation_with_a_note(save, talk, tmp_path):
    bias(tmp_path / save("model", "stock"), 0)
    found = talk("model", "--prompt", PROMPT)
    assert found.out == f"{PROMPT}\n\n"
    assert re.search(r"\[end of text, seed \d+\]\n", found.err)


def bias(folder, token):
    """Make one token all but certain, whatever comes before."""

    def edit(weights):
        weights["transformer.ln_f.weight"].zero_()
        weights["transformer.ln_f.bias"] = 10 * weights["transformer.wte.weight"][token]
        weights["transformer.wte.weight"][token] *= 3

    change(folder, edit)


def change(folder, edit):
    """Edit the weights of a saved model."""
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_control_characters_of_model_and_prompt_are_escaped(save, talk, tmp_path, tiny_tokenizer):
    [escape] = tiny_tokenizer("\x1b")["input_ids"]
    bias(tmp_path / save("model", "stock"), escape)
    prompt = "a\x1b[2J\x07\r\b\x7f\x9b1m\u202eb\u2066\u200f\u2028\u061c\tc\nd"
    found = talk("model", "--prompt", prompt, "--max_new_tokens", 3, "--temperature", 0)
    escaped = r"a\x1b[2J\x07\r\x08\x7f\x9b1m\u202eb\u2066\u200f\u2028\u061c"
    assert found.out == escaped + "\tc\nd" + r"\x1b\x1b\x1b" + "\n\n"


def test_a_text_longer_than_the_context_is_cropped_and_says_so_once(save, talk, text_of, tiny_tokenizer):
    prompt = "the cold sea " * 30
    words = (save("model"), "--prompt", prompt, "--max_new_tokens", 5, "--seed", 3)
    found = talk(*words, "--num_return_sequences", 3)
    note = "[longer than the context: only the last 64 tokens were read at a time]\n"
    assert found.err.count(note) == 1
    assert found.out.startswith(text_of("ours", 3, 5, prompt) + "\n\n")
    assert talk("model", "--prompt", PROMPT, "--max_new_tokens", 70, "--temperature", 0).err.count(note) == 1
    full = 65 - len(tiny_tokenizer(PROMPT)["input_ids"])  # the last token is not read
    for new_tokens, notes in ((full, 0), (full + 1, 1)):
        found = talk("model", "--prompt", PROMPT, "--max_new_tokens", new_tokens, "--temperature", 0)
        assert f"[{new_tokens} tokens, " in found.err
        assert found.err.count(note) == notes
    assert "longer" not in found.out


@pytest.fixture
def pieces_of(tmp_path, tiny_tokenizer):
    """pieces_of(seed, new_tokens, temperature) -> texts and probabilities that the saved model gives after PROMPT."""

    def pieces(seed, new_tokens, temperature):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        ids = tiny_tokenizer(PROMPT)["input_ids"]
        list(sample_tokens(model, ids, new_tokens, temperature, seed=seed, end_ids={0}))
        with torch.no_grad():
            probabilities = model(torch.tensor([ids])).logits[0].softmax(-1)
        known = [probabilities[place, token].item() for place, token in enumerate(ids[1:])]
        texts = whole_characters(tiny_tokenizer, zip(ids, [None, *known], strict=True))
        return [(shown(text), probability) for text, probability in texts]

    return pieces


def test_probabilities_follow_the_tokens_where_there_is_no_color(save, talk, pieces_of):
    words = (save("model", "stock"), "--prompt", PROMPT, "--max_new_tokens", 40, "--seed", 2)
    found = talk("--probabilities", *words)
    (first, _), *others = pieces_of(2, 40, 1.0)
    assert len(others) > 20
    assert found.out == first + "".join(f"{text}({number:.2g})" for text, number in others) + "\n\n"
    assert "probabilities  in parentheses after each token\n" in found.err


def test_probabilities_color_the_tokens_unless_colors_are_unwanted(save, talk, monkeypatch, pieces_of, tmp_path):
    for name, value in COLORS.items():
        monkeypatch.setenv(name, value)
    change(tmp_path / save("model", "stock"), lambda weights: weights["transformer.ln_f.weight"].mul_(2))  # surer
    words = ("model", "--prompt", PROMPT, "--max_new_tokens", 40, "--temperature", 0.3, "--seed", 2)
    found = talk(*words, "--probabilities")
    (first, _), *others = pieces_of(2, 40, 0.3)
    codes = [32 if p >= 0.5 else 36 if p >= 0.1 else 33 if p >= 0.01 else 31 for _, p in others]
    assert set(codes) == {31, 32, 33, 36}
    painted = "".join(f"\x1b[{code}m{text}\x1b[0m" for (text, _), code in zip(others, codes, strict=True))
    assert found.out == f"{first}{painted}\n\n"
    legend = "\x1b[32mfrom 0.5  \x1b[0m\x1b[36mfrom 0.1  \x1b[0m\x1b[33mfrom 0.01  \x1b[0m\x1b[31mless\n\x1b[0m"
    assert legend in found.err
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            plain = talk(*words, "--probabilities")
        assert plain.out == first + "".join(f"{text}({number:.2g})" for text, number in others) + "\n\n"


def test_without_probabilities_only_the_prompt_is_marked_in_a_terminal(save, talk, monkeypatch, text_of):
    for name, value in COLORS.items():
        monkeypatch.setenv(name, value)
    found = talk(save("model"), "--prompt", PROMPT, "--max_new_tokens", 9, "--seed", 1)
    marked = "".join(re.findall(r"\x1b\[1m(.*?)\x1b\[0m", found.out))
    assert marked == PROMPT
    assert re.sub(r"\x1b\[\d*m", "", found.out) == text_of("ours", 1, 9) + "\n\n"
    assert "\x1b[2m[9 tokens, seed 1]\n\x1b[0m" in found.err


def test_two_models_stand_in_two_columns_of_the_terminals_width(save, talk, monkeypatch, text_of, tiny_texts):
    monkeypatch.setenv("COLUMNS", "61")
    other = train_tokenizer(["ship sea the water " * 9, *tiny_texts[:9]], 280)
    save("b", "stock", other)
    words = ("--prompt", PROMPT, "--max_new_tokens", 40, "--seed", 5)
    found = talk(save("a"), "--compare", "b", *words)
    rows = found.out.splitlines()
    assert {len(row) for row in rows} == {61}
    columns = [
        [cell.strip() for cell in column] for column in zip(*(r.split("│") for r in rows if "│" in r), strict=True)
    ]
    assert [column[0] for column in columns] == ["a", "b"]
    alone = [talk(name, *words) for name in ("a", "b")]
    for column, text in zip(columns, alone, strict=True):
        assert "[40 tokens, seed 5]" in column
        body = "".join(column[1 : column.index("[40 tokens, seed 5]")])
        assert body.replace(" ", "") == re.sub(r"\s", "", text.out)
    assert alone[0].out == text_of("ours", 5, 40) + "\n\n" != alone[1].out
    assert found.err.count("model          ") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "MODEL is missing: give the folder of a run or of a model, or the name of a model on the Hub."),
        (["--model", "model"], "there is no flag --model: give MODEL without a flag."),
        (
            ["no/such/folder"],
            "MODEL no/such/folder: there is no such folder, and a model on the Hub is named",
        ),
        (["model", "--compare", "./none"], "--compare ./none: there is no such folder"),
        (["empty"], "MODEL empty has no config.json: give a folder that save_pretrained has written."),
        (["fresh"], "MODEL fresh is the folder of a run that has saved no model yet: wait for its first checkpoint."),
        (["model/config.json"], "MODEL model/config.json is a file: give the folder it is in."),
        (
            ["untokenized"],
            "MODEL untokenized: its tokenizer could not be loaded: it has no tok",
        ),
        (
            ["model", "--compare", "bare"],
            "--compare bare: its tokenizer could not be loaded: it has no tok",
        ),
        (["model", "--prompt", ""], "--prompt is empty: give at least one character."),
        (["model", "--prompt", "\udcff"], r"the prompt '\udcff' is not UTF-8 text: convert it."),
        (["model", "--temperature", "-1"], "temperature (-1.0) must be at least 0 and less than inf."),
        (["model", "--temperature", "nan"], "temperature (nan) must be at least 0 and less than inf."),
        (["model", "--top_k", "0"], "top_k (0) must be at least 1."),
        (["model", "--max_new_tokens", "0"], "max_new_tokens (0) must be at least 1."),
        (["model", "--seed", "-1"], "seed (-1) must be at least 0 and less than 4294967296."),
        (["model", "--temperature", "0", "--num_return_sequences", "2"], "num_return_sequences (2) must be 1 with"),
        (["model", "--device", "cray"], "--device cray cannot be used here"),
        (["damaged", "--prompt", "x"], "damaged gives NaN in place of probabilities: try --dtype float32, or check"),
        (["damaged", "--prompt", "x y", "--probabilities"], "damaged gives NaN in place of probabilities"),
    ],
)
def test_bad_input_ends_in_one_sentence(save, refused, tmp_path, words, message):
    save("model", "stock")
    (tmp_path / "empty").mkdir()
    (tmp_path / "fresh").mkdir()
    (tmp_path / "fresh/run.json").write_text("{}")
    for folder, kind in (("untokenized", "ours"), ("bare", "stock")):
        if folder in words:
            for file in (tmp_path / save(folder, kind)).glob("*tok*"):
                file.unlink()
    if "damaged" in words:
        change(tmp_path / save("damaged", "stock"), lambda weights: weights["transformer.ln_f.weight"].fill_(torch.nan))
    assert f": {message}" in refused(*words)


COMMAND = [sys.executable, "-m", "modeling_gpt2repro.evaluation.talk"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1", "TERM": "xterm"}


def test_each_line_of_a_pipe_is_a_prompt(save, warm_python, text_of, tmp_path):
    words = (save("model"), "--max_new_tokens", "6", "--seed", "11", "--device", "cpu")
    prompts = f"{PROMPT}\n \n\na ship was café\r\n"
    result = warm_python.run("-m", "modeling_gpt2repro.evaluation.talk", *words, cwd=tmp_path, stdin=prompts)
    assert result.stdout == text_of("ours", 11, 6) + "\n\n" + text_of("ours", 12, 6, "a ship was café") + "\n\n"
    assert "> " not in result.stderr + result.stdout
    assert "\x1b" not in result.stderr + result.stdout
    assert re.findall(r"seed \d+\]", result.stderr) == ["seed 11]", "seed 12]"]


def test_a_pipe_without_a_prompt_is_refused(save, warm_python, tmp_path):
    words = ("-m", "modeling_gpt2repro.evaluation.talk", save("model"))
    result = warm_python.run(*words, cwd=tmp_path, check=False, stdin="\n")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "talk.py: stdin has no prompt: give --prompt TEXT, or lines of text."


class Terminal:
    """The command in a terminal of its own: keys go in, and what appears is read until something is there."""

    def __init__(self, *words):
        pty = pytest.importorskip("pty")
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [*COMMAND, *words], ENVIRONMENT)
        self.text = ""

    def press(self, keys):
        os.write(self.terminal, keys.encode())

    def read_until(self, pattern, again=""):
        """What appeared before the pattern, which may be the end: None.

        Args:
            again: Keys to press in each second of silence.
        """
        silent_seconds = 0
        while pattern is None or not re.search(pattern, self.text):
            while not select.select([self.terminal], [], [], 1)[0]:
                silent_seconds += 1
                assert silent_seconds < PATIENCE_SECONDS, f"nothing more after {self.text!r}"
                self.press(again)
            try:
                new = os.read(self.terminal, 4096)
            except OSError:  # on Linux, the end
                new = b""
            if not new:
                break
            self.text += new.decode(errors="replace")
        assert pattern is None or re.search(pattern, self.text), self.text
        before, self.text = (self.text, "") if pattern is None else re.split(f"(?:{pattern})", self.text, maxsplit=1)
        return before

    def exit_code(self, again=""):
        self.read_until(None, again)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def test_in_a_terminal_text_is_streamed_until_ctrl_c_and_a_second_one_ends_the_program(save, terminal_signals):
    terminal = Terminal(save("model"), "--max_new_tokens", "1000000000", "--seed", "3")
    assert "Ctrl-C stops a text, Ctrl-D ends the program." in terminal.read_until("> ")
    terminal.press(f"{PROMPT}\r")
    terminal.read_until(r"sea\x1b\[0m.{20}")  # the text never ends, so this is before its end
    terminal.press("\x03")
    terminal.read_until(r"\[stopped, seed 3\]")
    terminal.read_until("> ")
    terminal.press("\x03")
    # Python's `input` notices a signal that comes just before it waits for keys only after the line.
    assert terminal.exit_code(again="\r") == 130


def test_in_a_terminal_prompts_have_a_history_and_ctrl_d_ends_the_program(save, terminal_signals):
    pytest.importorskip("readline")
    terminal = Terminal(save("model"), "--max_new_tokens", "3", "--seed", "3")
    terminal.read_until("> ")
    terminal.press("\r")  # nothing to continue
    terminal.read_until("> ")
    terminal.press(f"{PROMPT}\r")
    terminal.read_until(r"seed 3\]")
    terminal.read_until("> ")
    terminal.press("\x1b[A\r")  # the line before
    assert PROMPT in terminal.read_until(r"seed 4\]")
    terminal.read_until("> ")
    terminal.press("\x04")
    assert terminal.exit_code() == 0
