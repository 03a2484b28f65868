"""Names, metadata and commands of somebody else in a model card: one plain line each, or left out."""

import json
import math
import re
import shlex

import pytest
from cards import change_arguments, change_record, model_card, resumed, trained
from huggingface_hub import ModelCard, metadata_load

from modeling_gpt2repro.hub.model_card import Origin, derived_origin

LAUNCH = "accelerate launch train_accelerate.py --output_dir runs/a"
HOSTILE = {
    "script": "<script>alert(1)</script>",
    "link": "[free](http://evil.example) ![i](http://evil.example/i.png)",
    "bare links": "https://evil.example www.evil.example a@evil.example",
    "front matter": "x\n---\nlicense: evil\ntags: [evil]\n---\n# evil",
    "heading": "# evil",
    "code": "```\nevil\n```",
    "table": "a | b |\n|---|---|\n",
    "control": "a\x00b\x1b[31mc\u202ed\u2066e\u200bf\ud800",
    "long": "evil " * 200_000,
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_name_of_somebody_else_is_one_plain_line_of_a_card(tiny_model, run_folder, hostile):
    """The sentence is also read from a checkpoint's state.json, the versions from run.json."""
    text = HOSTILE[hostile]
    config = json.loads((run_folder / "run.json").read_text())
    config |= {"commit": text, "versions": {text: text}, "hardware": config["hardware"] | {"device": text}}
    (run_folder / "run.json").write_text(json.dumps(config))
    (run_folder / "README.md").write_text(model_card(tiny_model, Origin(text, {"license": "mit"}), run_folder))
    plain = model_card(tiny_model, Origin("plain", {"license": "mit"}), run_folder)
    card = (run_folder / "README.md").read_text()
    assert len(card.splitlines()) == len(plain.splitlines())
    assert len(card) < len(plain) + 1_000
    assert metadata_load(run_folder / "README.md") == ModelCard(plain).data.to_dict()
    for line in (line for line in card.splitlines() if "evil" in line):
        assert not {"\x00", "\x1b", "\u202e", "\u2066", "\u200b", "\ud800"} & set(line)
        for active in ("<", "](", "`", "|"):  # escaped wherever it is somebody's
            foreign = line.removeprefix("| ").removesuffix(" |").replace(" | ", " ", 1)
            assert active not in foreign.replace("\\" + active[0], ""), line
        assert "http://" not in line
        assert "https://" not in line
        assert "www." not in line


@pytest.mark.parametrize("hostile", HOSTILE)
def test_no_name_leaves_the_block_of_commands_or_becomes_a_command(tiny_model, run_folder, hostile):
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    text = HOSTILE[hostile].replace("\ud800", "")[:1500]  # a run.json with that, or a longer one, has no command
    typed = f"{LAUNCH} --sample_prompts {shlex.quote(text)} {shlex.quote('`````` $(evil)')} ; evil"
    change_record(run_folder, command=typed)
    card = model_card(tiny_model, run_folder=run_folder)
    [block] = [token for token in parser.parse(card) if token.type == "fence" and token.info == "bash"]
    assert parser.parse(card)[-1].content == block.content  # nothing after it
    line = block.content.splitlines()[2]
    assert line.startswith(LAUNCH)
    assert line.endswith("'`````` $(evil)' ';' evil")
    assert line.isprintable()
    assert len(block.content.splitlines()) == 4


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_renderer_finds_only_text_in_a_name_of_somebody_else(tiny_model, hostile):
    parser = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")

    def structure(sentence: str) -> list[str]:
        tokens = parser.parse(model_card(tiny_model, Origin(sentence)))
        inline = [child.type for token in tokens for child in token.children or []]
        return [token.type for token in tokens] + [kind for kind in inline if kind not in ("text", "text_special")]

    assert structure(HOSTILE[hostile]) == structure("plain")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"license": "mit"}, {"license": "mit"}),
        ({"license": ["mit", "apache-2.0"]}, {"license": ["mit", "apache-2.0"]}),
        ({"license": {"a": 1}}, {"license": "other"}),
        ({"license": 7}, {"license": "other"}),
        ({"license": "evil\n---\n# evil"}, {"license": "other"}),
        ({"license": "x" * 1_000_000}, {"license": "other"}),
        (
            {"license": "other", "license_name": "my licence", "license_link": "https://example.org/LICENSE"},
            {"license": "other", "license_name": "my licence", "license_link": "https://example.org/LICENSE"},
        ),
        ({"license_link": "javascript:alert(1)"}, {}),
        ({"license_link": "https://x.org/)<script>"}, {}),
        ({"language": ["en", "no", "zh-Hant", 5, None, ["de"], "<b>"]}, {"language": ["en", "no", "zh-Hant"]}),
        ({"language": False}, {}),
        ({"language": ["en"] * 10_000}, {"language": ["en"] * 100}),
        ({"base_model": "owner/name"}, {"base_model": "owner/name"}),
        ({"base_model": "../../etc"}, {}),
        ({"base_model": {"a": "b"}}, {}),
        ({"tags": ["evil"], "extra_gated_prompt": "evil", "widget": [{"text": "evil"}]}, {}),
    ],
)
@pytest.mark.parametrize("way", ["card", "checkpoint"])
def test_metadata_of_somebody_else_is_kept_as_words_or_not_at_all(tmp_path, tiny_model, given, kept, way):
    origin = Origin("A model.", given)
    if way == "card":
        (tmp_path / "README.md").write_text(f"---\n{json.dumps(given)}\n---\n# A model\n")
        origin = derived_origin("A GPT-2 fine-tuned from", str(tmp_path))
    (tmp_path / "new.md").write_text(model_card(tiny_model, origin))
    ours = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["gpt2", "gpt2repro"]}
    ours["widget"] = [{"text": "Hello, I'm a language model,"}]
    assert metadata_load(tmp_path / "new.md") == ours | kept


@pytest.mark.parametrize(
    "content",
    [
        b"---\n" + b"[" * 100_000 + b"\n---\n",
        b"---\n- a\n---\n",
        b"---\na: b: c\n---\n",
        b"---\na: 1\n---\n" + b"x" * 2**20,
        b"---\n\xff\n---\n",
        None,  # a folder in its place
    ],
)
def test_a_card_that_cannot_be_read_is_one_sentence(tmp_path, one_sentence, content):
    if content is None:
        (tmp_path / "README.md").mkdir()
    else:
        (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=r"the metadata of its README\.md cannot be read") as error:
        derived_origin("Converted from", str(tmp_path))
    assert len(one_sentence(error)) < 1_000


def test_a_dataset_of_foreign_shards_is_named_only_by_a_hub_id(run_folder, tiny_model):
    shards = run_folder / "shards"
    shards.mkdir()
    (shards / "manifest.json").write_text(json.dumps({"source": {"dataset": "evil/<script>[x](y)"}}))
    change_arguments(run_folder, shards=str(shards))
    assert "evil" not in model_card(tiny_model, run_folder=run_folder)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_values_of_a_foreign_run_add_no_line_to_a_card(run_folder, tiny_model, hostile):
    def card(text) -> list[str]:
        change_record(
            run_folder,
            hardware={"device": text, "processes": text, "precision": text},
            versions={"torch": "2.13.0", "gpt2repro": text, "python": text, text: text},
            data={"data": [[text, 1.0]]},
            has_uncommitted_changes=text,
            command=LAUNCH,
        )
        change_arguments(run_folder, lr_scheduler_type="x", optimizer="x", sample_prompts=[text], train_tokens=2**20)
        change_arguments(run_folder, output_dir=text.replace("\ud800", ""))
        change = {name: ["x", text] for name in ("device", "processes", "precision", "commit", "torch")}
        (run_folder / "metrics.jsonl").write_text(metrics + trained(1, 2) + resumed(2, **change) + trained(3, 4))
        return model_card(tiny_model, run_folder=run_folder).splitlines()

    metrics = (run_folder / "metrics.jsonl").read_text().splitlines()[0] + "\n"
    plain, lines = card("harmless"), card(HOSTILE[hostile][:20_000])
    assert len(lines) == len(plain) - (hostile == "long")  # the line with the hash, whose path is too long
    assert sum(map(len, lines)) < sum(map(len, plain)) + 20_000
    (run_folder / "README.md").write_text("\n".join(lines) + "\n")
    found, expected = metadata_load(run_folder / "README.md"), ModelCard("\n".join(plain) + "\n").data.to_dict()
    assert found.pop("widget")[0]["text"] in ("Hello, I'm a language model,", HOSTILE[hostile])
    assert expected.pop("widget")[0]["text"] == "harmless"
    assert found == expected
    in_rows = [line for line in lines if "evil" in line and line.startswith("| ")]
    for line in in_rows:
        assert line.count("|") - line.count("\\|") == 3
        assert not re.search(r"(?<!\\)(<|`|\]\()|https?://|www\.", line), line


NUMBERS = [math.nan, math.inf, -math.inf, "7", "x\n---\nevil: 1", True, [1], {"a": 1}, 10**400, None]
MEASURED = [
    "validation_loss",
    "validation_perplexity",
    "validation_bits_per_byte",
    "validation_tokens",
    "tokens",
    "step",
]
MEASURED += ["hellaswag_completion_acc_norm", "hellaswag_completion_acc_norm_low", "hellaswag_lm_eval_acc_norm"]


@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: str(value)[:8])
def test_what_is_no_number_is_not_shown_as_one(run_folder, tiny_model, value):
    first = json.loads((run_folder / "metrics.jsonl").read_text().splitlines()[0])
    for name in MEASURED:
        (run_folder / "metrics.jsonl").write_text(
            json.dumps({**first, "step": 4, name: value}) + "\n" + trained(1, 3, 1.0)
        )
        card = model_card(tiny_model, run_folder=run_folder)
        assert not re.search(r"\b(nan|inf|True|None|evil)\b", card.partition("\n## ")[2]), name
        for result in ModelCard(card).data.eval_results or []:
            assert type(result.metric_value) is float, name
            assert math.isfinite(result.metric_value), name
        assert [result.metric_name for result in hub_results_named(card, name)] == []
    step = {"step": 1, "tokens": 2**19, "loss": 4.0, "step_seconds": value}
    (run_folder / "metrics.jsonl").write_text(json.dumps(step) + "\n")
    assert "\n| time |" not in model_card(tiny_model, run_folder=run_folder)


def hub_results_named(card: str, name: str) -> list:
    """Of the results in a card's metadata, the one that a name of metrics.jsonl has."""
    shown = {"validation_loss": "validation loss, nats per token"}
    shown |= {
        "hellaswag_completion_acc_norm": "acc_norm (completion)",
        "hellaswag_lm_eval_acc_norm": "acc_norm (lm-eval)",
    }
    return [each for each in ModelCard(card).data.eval_results or [] if each.metric_name == shown.get(name)]


@pytest.mark.parametrize("value", [each for each in NUMBERS if each is not None], ids=lambda value: str(value)[:8])
def test_a_run_json_with_what_is_no_number_costs_the_card_its_results_only(run_folder, tiny_model, value):
    bare = model_card(tiny_model)
    before = (run_folder / "run.json").read_text()
    for name in ("train_tokens", "tokens_per_step", "learning_rate", "seed", "adam_beta1", "cooldown_tokens"):
        change_arguments(run_folder, **{name: value})
        assert model_card(tiny_model, run_folder=run_folder) == bare, name
        (run_folder / "run.json").write_text(before)
    change_record(run_folder, data={"data": value})
    if not isinstance(value, str | list | dict):
        assert model_card(tiny_model, run_folder=run_folder) == bare
    else:
        assert len(model_card(tiny_model, run_folder=run_folder).splitlines()) > len(bare.splitlines())
