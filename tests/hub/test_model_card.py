"""The model card, as text for people and as metadata for the Hub."""

import json
import shlex
from dataclasses import asdict

import pytest
from huggingface_hub import ModelCard, metadata_load

from modeling_gpt2repro.hub.model_card import FROM_SCRATCH, Origin, derived_origin, model_card
from modeling_gpt2repro.training.arguments import TrainArguments


@pytest.fixture
def run_folder(tmp_path):
    """The folder of a finished run with default arguments; every number occurs only once."""
    evaluation = {"step": 19073, "tokens": 9_999_220_736, "validation_loss": 3.25, "validation_perplexity": 25.79}
    evaluation |= {"validation_bits_per_byte": 0.9876, "validation_tokens": 10_485_760}
    for protocol, value in (("completion", 0.3001), ("lm_eval", 0.3155)):
        name = f"hellaswag_{protocol}_acc_norm"
        evaluation |= {name: value, f"{name}_low": value - 0.009, f"{name}_high": value + 0.009}
    earlier = {**evaluation, "step": 0, "tokens": 0, "validation_loss": 10.9}
    steps = [{"step": step, "tokens": step * 2**19, "loss": 4.0, "step_seconds": 1800.0} for step in (1, 2)]
    records = [earlier, *steps, evaluation]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "arguments": asdict(TrainArguments()),
        "data": {"data": "0123456789abcdef"},
        "hardware": {"device": "NVIDIA H100", "processes": 8, "precision": "bf16"},
        "versions": {"python": "3.12.1", "torch": "2.13.0"},
        "commit": "c0ffee",
    }
    (tmp_path / "run.json").write_text(json.dumps(config))
    baselines = {"completion": {"gpt2": 0.2955}, "lm-eval": {"gpt2": 0.3114}}
    (tmp_path / "baselines.json").write_text(json.dumps({"hellaswag_baselines": baselines}))
    (tmp_path / "loss.png").write_bytes(b"a picture")
    return tmp_path


def change_arguments(run_folder, **arguments):
    config = json.loads((run_folder / "run.json").read_text())
    config["arguments"] |= arguments
    (run_folder / "run.json").write_text(json.dumps(config))


def test_the_card_has_the_last_evaluation_and_the_hyperparameters(run_folder, tiny_model):
    card = model_card(tiny_model, run_folder=run_folder)
    for line in (
        "| after | step 19,073, 9,999,220,736 tokens |",
        "| validation loss | 3.2500 nats per token (perplexity 25.79, 0.988 bits per byte) on 10,485,760 tokens |",
        "| HellaSwag acc_norm, completion | 0.3001 (95 %: 0.2911 to 0.3091); OpenAI's gpt2 has 0.2955 |",
        "| HellaSwag acc_norm, lm-eval | 0.3155 (95 %: 0.3065 to 0.3245); OpenAI's gpt2 has 0.3114 |",
        "| data | HuggingFaceFW/fineweb-edu, shards with fingerprint 0123456789ab |",
        "| tokens | 10,000,000,000, 524,288 per step |",
        "| learning rate | 0.0006 after 375,000,000 tokens of warm-up, then a cosine to 6e-05 |",
        "| hardware | 8 x NVIDIA H100, bf16; 1 h 0 min in training steps |",
        "| code | gpt2repro, commit c0ffee |",
        "![loss over training tokens](loss.png)",
    ):
        assert f"{line}\n" in card
    assert "| loss curve | behind: 0.185 above the mean of 4 published runs (95 % of runs lie within 0.081)," in card


def test_results_on_public_data_are_in_the_metadata(run_folder, tiny_model):
    data = ModelCard(model_card(tiny_model, run_folder=run_folder)).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "mit")
    assert data.datasets == ["HuggingFaceFW/fineweb-edu"]
    found = [(result.dataset_type, result.metric_name, result.metric_value) for result in data.eval_results]
    assert found == [
        ("HuggingFaceFW/fineweb-edu", "validation loss, nats per token", 3.25),
        ("Rowan/hellaswag", "acc_norm (completion)", 0.3001),
        ("Rowan/hellaswag", "acc_norm (lm-eval)", 0.3155),
    ]


def test_results_on_private_data_are_not_in_the_metadata(run_folder, tiny_model):
    change_arguments(run_folder, shards=str(run_folder), hellaswag="a-few-rows.jsonl")
    card = model_card(tiny_model, run_folder=run_folder)
    data = ModelCard(card).data
    assert (data.datasets, data.eval_results) == (None, None)
    assert "OpenAI's gpt2" not in card
    assert "| data | private, shards with fingerprint 0123456789ab |" in card
    assert "0.3001 (95 %" in card


def test_a_card_without_a_run_or_before_its_first_evaluation(run_folder, tiny_model, stock):
    assert "## " not in model_card(tiny_model)
    assert "trust_remote_code" in model_card(tiny_model)
    converted = Origin("Converted from a.")
    assert "trust_remote_code" not in model_card(stock, converted)
    assert ModelCard(model_card(stock, converted)).data.license is None
    assert ModelCard(model_card(stock, FROM_SCRATCH)).data.license == "mit"
    (run_folder / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "loss": 2.0}\n')
    card = model_card(tiny_model, run_folder=run_folder)
    assert "## Results" not in card
    assert "## Training" in card


def test_results_of_diverged_runs_and_of_early_versions_can_be_written(run_folder, tiny_model):
    """The loss of a diverged model is null in metrics.jsonl; early versions wrote no interval of HellaSwag."""
    record = {"step": 5, "tokens": 50, "validation_loss": None, "validation_perplexity": None, "validation_tokens": 320}
    record |= {"validation_bits_per_byte": None, "hellaswag_completion_acc_norm": 0.25}
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(record) + "\n")
    card = model_card(tiny_model, run_folder=run_folder)
    assert "| validation loss | not a number on 320 tokens |\n" in card
    assert "| HellaSwag acc_norm, completion | 0.2500; OpenAI's gpt2 has 0.2955 |\n" in card
    assert [result.metric_value for result in ModelCard(card).data.eval_results] == [0.25]


def resume(step, **changed):
    """A line of metrics.jsonl."""
    return json.dumps({"step": step, "event": "resume", "changed": changed}) + "\n"


def train(first, last):
    """Lines of metrics.jsonl."""
    return "".join(json.dumps({"step": step, "tokens": step * 2**19, "loss": 4.0}) + "\n" for step in (first, last))


def test_a_run_resumed_with_other_arguments_is_described_by_those_of_each_stretch(run_folder, tiny_model):
    lower = {"learning_rate": [6e-4, 3e-4]}
    attempts = [train(1, 500), resume(500, learning_rate=[6e-4, 1e-3]), train(501, 502), resume(500, **lower)]
    attempts += [train(501, 1000), resume(1000, **lower, weight_decay=[0.1, 0.2]), train(1001, 1001), resume(1001)]
    with open(run_folder / "metrics.jsonl", "w") as file:
        file.writelines([*attempts, train(1002, 2000), resume(2000, learning_rate=[6e-4, 9e-4], train_tokens=[1, 2])])
    card = model_card(tiny_model, run_folder=run_folder)
    schedule = "after 375,000,000 tokens of warm-up, then a cosine to"
    adam = "AdamW, betas 0.9 and 0.95, weight decay {}, gradient norm at most 1"
    for line in (
        "| tokens | 10,000,000,000, 524,288 per step |",
        f"| learning rate | steps 1 to 500: 0.0006 {schedule} 6e-05; steps 501 to 1,001: 0.0003 {schedule} 3e-05; "
        f"steps 1,002 to 2,000: 0.0006 {schedule} 6e-05 |",
        f"| optimizer | steps 1 to 1,000: {adam.format(0.1)}; steps 1,001 to 1,001: {adam.format(0.2)}; "
        f"steps 1,002 to 2,000: {adam.format(0.1)} |",
    ):
        assert f"{line}\n" in card
    assert "0.001" not in card  # undone by resuming from the same step again
    assert "0.0009" not in card  # no step was trained with it


@pytest.mark.parametrize(
    ("saved", "line"), [(None, "AdamW, betas"), ("muon", "Muon for the matrices in the blocks, AdamW")]
)
def test_the_card_names_the_optimizer_and_runs_of_older_versions_had_adamw(run_folder, tiny_model, saved, line):
    config = json.loads((run_folder / "run.json").read_text())
    del config["arguments"]["optimizer"]
    config["arguments"] |= {"optimizer": saved} if saved else {}
    (run_folder / "run.json").write_text(json.dumps(config))
    assert f"| optimizer | {line}" in model_card(tiny_model, run_folder=run_folder)


def test_scores_on_another_file_are_not_in_the_metadata_whichever_the_run_was_started_with(run_folder, tiny_model):
    metrics = (run_folder / "metrics.jsonl").read_text()
    resumed = resume(1, seed=[1337, 7]) + resume(1, hellaswag=["Rowan/hellaswag", "few.jsonl"])
    (run_folder / "metrics.jsonl").write_text(resumed + metrics)
    card = model_card(tiny_model, run_folder=run_folder)
    assert "| seed | 1337 |\n" in card
    assert [result.dataset_name for result in ModelCard(card).data.eval_results] == ["fineweb-edu"]


def test_the_card_of_a_streamed_run_in_fp32_mentions_no_shards(run_folder, tiny_model):
    config = json.loads((run_folder / "run.json").read_text())
    config["data"]["data"] = {"dataset": "HuggingFaceFW/fineweb-edu", "files": 14}
    config["hardware"]["precision"] = "no"
    (run_folder / "run.json").write_text(json.dumps(config))
    card = model_card(tiny_model, run_folder=run_folder)
    assert "| data | HuggingFaceFW/fineweb-edu |\n" in card
    assert "| hardware | 8 x NVIDIA H100, fp32; 1 h 0 min in training steps |\n" in card


def test_the_first_sentence_and_the_metadata_say_where_the_weights_come_from(tmp_path, tiny_model):
    (tmp_path / "base").mkdir()
    verb = "A GPT-2 fine-tuned from"
    assert derived_origin(verb, str(tmp_path / "base")) == Origin("A GPT-2 fine-tuned from base.", {})

    card = "---\nlicense: cc-by-4.0\nlanguage: [de, en]\nbase_model: openai-community/gpt2\ntags: [a]\n---\n# Base\n"
    (tmp_path / "base/README.md").write_text(card)
    origin = derived_origin(verb, str(tmp_path / "base"))
    data = ModelCard(model_card(tiny_model, origin)).data
    assert (data.license, data.language, data.base_model) == ("cc-by-4.0", ["de", "en"], "openai-community/gpt2")
    assert str(tmp_path) not in model_card(tiny_model, origin)

    (tmp_path / "base/README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match=r"the metadata of its README\.md cannot be read"):
        derived_origin(verb, str(tmp_path / "base"))


def test_a_base_model_on_the_hub_is_named_with_the_license_of_its_card(hub, warm_python):
    repository = hub.new_repository("models/toy/base")
    (repository / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Base\n")
    hub.new_repository("models/toy/bare")
    program = (
        "from modeling_gpt2repro.hub.model_card import derived_origin\n"
        "for name in ('toy/base', 'toy/bare'): print(derived_origin('Converted from', name))"
    )
    assert warm_python.run("-c", program).stdout.splitlines() == [
        str(Origin("Converted from toy/base.", {"license": "apache-2.0", "language": "en", "base_model": "toy/base"})),
        str(Origin("Converted from toy/bare.", {"base_model": "toy/bare"})),
    ]


def test_the_language_is_named_where_the_text_is_known_to_be_english(run_folder, tiny_model):
    def language(**arguments):
        change_arguments(run_folder, **arguments)
        return ModelCard(model_card(tiny_model, run_folder=run_folder)).data.language

    assert language() == "en"  # FineWeb-Edu
    assert language(dataset_name="python-prose") == "en"
    assert language(dataset_name="stories") == "en"
    assert language(shards=str(run_folder)) is None  # prepared from files
    assert language(shards=None, dataset_name="somebody/text") is None
    origin = Origin("A GPT-2 fine-tuned from a/b.", {"language": "de"})
    assert ModelCard(model_card(tiny_model, origin, run_folder)).data.language == "de"
    assert ModelCard(model_card(tiny_model)).data.language is None


def test_a_card_says_that_stories_are_generated_and_how_near_the_floor_the_model_is(run_folder, tiny_model):
    assert 'print(generator("Hello, I\'m a language model,", max' in model_card(tiny_model, run_folder=run_folder)
    change_arguments(run_folder, dataset_name="stories")
    stories = {"story_loss": 96.0, "story_floor": 80.0, "story_mentions_right": 0.9625}
    with open(run_folder / "metrics.jsonl", "a") as file:
        last = {"step": 20_000, "tokens": 10**10, "validation_loss": 0.5, "validation_perplexity": 1.6}
        file.write(json.dumps({**last, "validation_tokens": 10, **stories}) + "\n")
    card = model_card(tiny_model, run_folder=run_folder)
    for line in (
        "| whole held-out stories | 96.00 nats a story, 1.200 times the least that a model can have; 96.2% of names, "
        "animals and things right |",
        "| data | English stories that a program has put together at random, written for this purpose, shards with "
        "fingerprint 0123456789ab |",
        'print(generator("A story of Mila and Tom, Mrs. Plum, a fox, a bell and some honey.", max_new_tokens=30)'
        '[0]["generated_text"])',
    ):
        assert f"{line}\n" in card
    change_arguments(run_folder, shards=str(run_folder))
    assert "| data | private, shards with" in model_card(tiny_model, run_folder=run_folder)


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


LAUNCH = "accelerate launch --config_file accelerate_configs/cpu.yaml train_accelerate.py --output_dir runs/a"
COMMIT = "5f0c" * 10


def change_record(run_folder, **values):
    config = json.loads((run_folder / "run.json").read_text())
    (run_folder / "run.json").write_text(json.dumps({**config, **values}))


def reproduce(run_folder, tiny_model) -> tuple[str, list[str]]:
    """The text, and the lines of the commands, of that section of the card."""
    text, block = model_card(tiny_model, run_folder=run_folder).split("\n## Reproduce\n\n")[1].split("```bash\n")
    assert block.endswith("\n```\n")
    return text, block.removesuffix("\n```\n").split("\n")


def test_the_card_says_how_to_train_the_same_weights(run_folder, tiny_model):
    versions = {"gpt2repro": "0.1.0", "python": "3.12.1", "torch": "2.13.0+cu130", "numpy": "2.4.6"}
    change_record(run_folder, command=LAUNCH, versions=versions, has_uncommitted_changes=True)
    change_arguments(run_folder, output_dir="runs/a", train_tokens=19_073 * 2**19)
    with open(run_folder / "metrics.jsonl", "a") as file:
        file.write(train(19_072, 19_073))
    text, lines = reproduce(run_folder, tiny_model)
    assert text.startswith(
        "Data: HuggingFaceFW/fineweb-edu (fingerprint 0123456789abcdef). Code: gpt2repro 0.1.0, with Python 3.12.1, "
        "seed 1337. GPUs may add numbers up in another order each time, so the weights may differ by rounding."
    )
    assert lines == [
        "git checkout c0ffee  # there were changes to it that no commit has",
        "pip install torch==2.13.0 numpy==2.4.6 -e .",
        LAUNCH,
        "sha256sum runs/a/model/model.safetensors",
    ]
    card = model_card(tiny_model, run_folder=run_folder)
    assert "| code | gpt2repro 0.1.0, commit c0ffee with uncommitted changes |\n" in card
    assert "| software | python 3.12.1, torch 2.13.0+cu130, numpy 2.4.6 |\n" in card


def test_data_on_the_hub_are_those_of_the_commit_that_was_read(run_folder, tiny_model):
    change_record(run_folder, command=LAUNCH)
    stream = {"dataset": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT", "revision": COMMIT}
    change_record(run_folder, data={"data": stream})
    text, lines = reproduce(run_folder, tiny_model)
    assert text.startswith(f"Data: HuggingFaceFW/fineweb-edu at revision {COMMIT}.")
    assert lines[2] == f"{LAUNCH} --dataset_revision {COMMIT}"

    address = f"hf://owner/tokens@{COMMIT}"
    change_record(run_folder, data={"data": "ab" * 32})
    change_arguments(run_folder, shards=address)
    text, lines = reproduce(run_folder, tiny_model)
    assert text.startswith(f"Data: {address} (fingerprint {'ab' * 32}).")
    assert lines[2] == f"{LAUNCH} --shards {address}"

    change_record(run_folder, data={"data": [["ab" * 32, 0.7], ["cd" * 32, 0.3]]})
    change_arguments(run_folder, shards=None, mix=f"{address}:0.7,/home/me/own:0.3")
    text, lines = reproduce(run_folder, tiny_model)
    assert text.startswith(f"Data: {address} (fingerprint {'ab' * 32}); a prepared folder (fingerprint {'cd' * 32}).")
    assert lines[2] == LAUNCH
    assert "/home/me" not in model_card(tiny_model, run_folder=run_folder)


def test_a_run_that_moved_has_the_command_and_the_hardware_of_each_stretch(run_folder, tiny_model):
    change_record(run_folder, command=LAUNCH)
    moved = {"processes": [8, 2], "device": ["NVIDIA H100", "x86_64 CPU"], "commit": ["c0ffee", "decaf"]}
    other = {"command": [LAUNCH, f"{LAUNCH} --find_batch_size"]}
    with open(run_folder / "metrics.jsonl", "w") as file:
        file.writelines([train(1, 500), resume(500), train(501, 600), resume(600, **moved), train(601, 700)])
        file.writelines([resume(700, **other), train(701, 800)])
    text, lines = reproduce(run_folder, tiny_model)
    assert "The run moved" in text
    assert lines[2:] == [
        "# steps 1 to 600, on 8 x NVIDIA H100, bf16",
        LAUNCH,
        "# steps 601 to 700, on 2 x x86_64 CPU, bf16, commit decaf",
        f"{LAUNCH} --resume_from_checkpoint latest",
        "# steps 701 to 800, on 8 x NVIDIA H100, bf16",
        f"{LAUNCH} --find_batch_size --resume_from_checkpoint latest",
    ]


def test_a_run_json_without_the_command_still_gives_the_rest(run_folder, tiny_model):
    text, lines = reproduce(run_folder, tiny_model)
    assert "Code: gpt2repro, with Python 3.12.1, seed 1337." in text
    assert "The command is not known: give the arguments that are listed above." in text
    assert lines == ["git checkout c0ffee", "pip install torch==2.13.0 -e ."]


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


@pytest.mark.parametrize(
    "command", ["rm -rf /", "OMP_NUM_THREADS=2", "A=$(evil) accelerate launch", "'", "", f"{LAUNCH} {'a' * 2000}"]
)
def test_what_starts_no_training_is_no_command_of_a_card(tiny_model, run_folder, command):
    change_record(run_folder, command=command)
    assert "The command is not known" in reproduce(run_folder, tiny_model)[0]


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
