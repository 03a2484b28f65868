"""What the demo page shows of a text, without gradio: the same text as the talk command, its colors, and bad input."""

import json
import socket
import sys
from html.parser import HTMLParser

import pytest
import torch

from modeling_gpt2repro.evaluation import talk
from modeling_gpt2repro.hub import demo
from modeling_gpt2repro.hub.export import save_hub_folder

PROMPT = "the cold sea"


@pytest.fixture
def loaded(make_model, tiny_tokenizer):
    """A random model, with a name, and its tokenizer."""
    return make_model("ours", len(tiny_tokenizer)), tiny_tokenizer


@pytest.fixture
def model_folder(loaded, tmp_path):
    save_hub_folder(*loaded, tmp_path / "tiny")
    return "tiny"


class Spans(HTMLParser):
    """The text of a page, and of each token its classes, title and text."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.tokens, self.notes = "", [], []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tag = tag
        if tag == "span":
            self.tokens.append((dict(attributes).get("class"), dict(attributes).get("title"), ""))

    def handle_endtag(self, tag):
        self.tag = None

    def handle_data(self, data):
        self.text += data
        if self.tag == "span":
            self.tokens[-1] = (*self.tokens[-1][:2], data)
        elif self.tag == "i":
            self.notes.append(data)


def shown(loaded, prompt, *sampling) -> Spans:
    return Spans("".join(demo.continuation_html(loaded, prompt, *sampling)))


@pytest.mark.parametrize("sampling", [(20, 0.0, 50, 7), (80, 2.5, 9, 123)])
def test_the_same_seed_gives_the_text_of_the_talk_command(loaded, model_folder, capsys, sampling):
    flags = zip(("--max_new_tokens", "--temperature", "--top_k", "--seed"), map(str, sampling), strict=True)
    talk.main([model_folder, "--device=cpu", "--prompt", PROMPT, *(word for pair in flags for word in pair)])
    printed = capsys.readouterr()
    found = shown(loaded, PROMPT, *sampling)
    assert found.text == printed.out.removesuffix("\n\n") + "".join(f"\n{note}" for note in found.notes)
    assert [f"[{note}]" for note in found.notes] == [line for line in printed.err.splitlines() if line[:1] == "["]
    assert len(found.notes) == 1 + (sampling[0] == 80)  # that one is longer than the context of 64


def test_each_token_has_the_models_probability_and_its_color(loaded):
    model, tokenizer = loaded
    ids = tokenizer("the cold sea and the old tree")["input_ids"]
    tokens = shown(loaded, "the cold sea and the old tree", 1, 1.0, 50, 3).tokens
    with torch.no_grad():
        probabilities = model(torch.tensor([ids])).logits[0].softmax(-1)
    assert [text for _, _, text in tokens[: len(ids)]] == [tokenizer.decode(token).strip() for token in ids]
    assert tokens[0][:2] == ("prompt", None)
    for place in range(1, len(ids)):
        probability = probabilities[place - 1, ids[place]].item()
        color = "green" if probability >= 0.5 else "cyan" if probability >= 0.1 else "yellow"
        assert tokens[place][0] == (f"{color} prompt" if probability >= 0.01 else "red prompt")
        assert tokens[place][1] == f"probability {probability:.2g}"
    assert "prompt" not in tokens[len(ids)][0]


@pytest.mark.parametrize(
    ("token", "html"),
    [
        ((" <b>", 0.5), ' <span class="green" title="probability 0.5">&lt;b&gt;</span>'),
        (('&"', 0.49), '<span class="cyan" title="probability 0.49">&amp;&quot;</span>'),
        (("\n\n", 0.012), '<span class="yellow" title="probability 0.012">\n\n</span>'),
        (("  x y ", 0.0000123, "prompt"), '  <span class="red prompt" title="probability 1.2e-05">x y </span>'),
        (("first", None, "prompt"), '<span class="prompt">first</span>'),
    ],
)
def test_a_token_as_html_by_hand(token, html):
    assert demo.token_html(*token) == html


def test_a_character_is_shown_when_all_its_bytes_are_there(loaded):
    pieces = list(demo.continuation_html(loaded, "é 😀 \x1b[2J", 1, 0.0, 50, 0))
    assert len(loaded[1]("😀")["input_ids"]) > 1
    assert any(">😀</span>" in piece for piece in pieces)
    assert "\ufffd" not in "".join(pieces[:-2])  # the last two are the sampled token, which may be half a character
    assert "\\x1b" in "".join(pieces)


def test_what_cannot_be_continued_is_said_below(loaded):
    assert shown(loaded, "", 5, 1.0, 50, 0).text.startswith("\nthe prompt '' has no tokens for ")
    assert "is not UTF-8 text" in shown(loaded, "\ud83d", 5, 1.0, 50, 0).text  # half of an emoji, as JSON can have it
    with torch.no_grad():
        loaded[0].transformer.wte.weight.fill_(torch.nan)
    assert "gives NaN" in shown(loaded, "<i>", 5, 1.0, 50, 0).text


def test_two_texts_grow_side_by_side_until_the_longer_one_ends(monkeypatch):
    monkeypatch.setattr(demo, "REFRESH_SECONDS", -1)
    assert list(demo.side_by_side([iter("abc"), iter("x")])) == [
        ["a", "x"],
        ["ab", "x"],
        ["abc", "x"],
        ["abc", "x"],
    ]
    monkeypatch.setattr(demo, "REFRESH_SECONDS", 1e9)
    assert list(demo.side_by_side([iter("abc"), iter("x")])) == [["abc", "x"]]


def test_the_seed_is_a_whole_number_or_random():
    assert [demo.read_seed(text) for text in ("7", " 0 ", "4294967295")] == [7, 0, 2**32 - 1]
    assert len({demo.read_seed(" ") for _ in range(20)}) > 1
    for text in ("-1", "1.5", "x", "4294967296", "9" * 5000):
        with pytest.raises(ValueError, match=r"^The seed \(.{1,20}\) must be a whole number below 4,294,967,296, or "):
            demo.read_seed(text)


def test_the_first_prompt_is_the_one_that_the_run_sampled_from(tmp_path):
    config = {"arguments": {"sample_prompts": ["A story", "B"]}, "hardware": {}, "data": {}, "versions": {}}
    (tmp_path / "run.json").write_text(json.dumps(config))
    for folder in (tmp_path, tmp_path / "model"):
        assert demo.prompt_of_run(str(folder)) == "A story"
    (tmp_path / "run.json").write_text("{")
    assert demo.prompt_of_run(str(tmp_path)) is demo.prompt_of_run("owner/name") is None


def test_bad_input_ends_in_one_sentence(model_folder, capsys, tmp_path, monkeypatch):
    def refused(*words):
        with pytest.raises(SystemExit) as end:
            demo.main([str(word) for word in (*words, "--device=cpu")])
        [message] = capsys.readouterr().err.splitlines()
        assert end.value.code == 2
        assert message.endswith(".")
        return message

    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    assert "MODEL is missing" in refused()
    assert "MODEL empty has no config.json" in refused("empty")
    assert "MODEL2 file is a file" in refused(model_folder, "file")
    assert "MODEL ./missing: there is no such folder" in refused("./missing")
    assert "port (70000)" in refused(model_folder, "--port", 70000)
    with socket.socket() as other:
        other.bind((demo.HOST, 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"--port {port} cannot be used (" in refused(model_folder, "--port", port)
    monkeypatch.setitem(sys.modules, "gradio", None)  # as if it were not installed
    assert "needs the package gradio, which is not installed: pip install gradio." in refused(
        model_folder, "--port", port
    )
