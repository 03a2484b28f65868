"""What a model card says to the Hub: license, language, datasets, results, prompts; and the results' own files."""

import ast
import copy
import json
import re

import pytest
import yaml
from cards import COMMIT, change_arguments, change_record, model_card, resumed
from huggingface_hub import (
    EvalResultEntry,
    HfApi,
    ModelCard,
    ModelCardData,
    constants,
    metadata_load,
    parse_eval_result_entries,
)
from huggingface_hub.repocard_data import model_index_to_eval_results
from pushing import push_in_process

from modeling_gpt2repro.hub.export import save_hub_folder
from modeling_gpt2repro.hub.model_card import Origin, derived_origin, hub_results
from modeling_gpt2repro.runs.read import read_run


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
    assert "| data | a prepared folder that is not public (fingerprint 0123456789ab) |" in card
    assert "0.3001 (95 %" in card


def test_scores_on_another_file_are_not_in_the_metadata_whichever_the_run_was_started_with(run_folder, tiny_model):
    metrics = (run_folder / "metrics.jsonl").read_text()
    lines = resumed(1, seed=[1337, 7]) + resumed(1, hellaswag=["Rowan/hellaswag", "few.jsonl"])
    (run_folder / "metrics.jsonl").write_text(lines + metrics)
    card = model_card(tiny_model, run_folder=run_folder)
    assert "| seed | 1337 |\n" in card
    assert [result.dataset_name for result in ModelCard(card).data.eval_results] == ["fineweb-edu"]


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


def metadata(run_folder, model, tokenizer=None) -> dict:
    """The metadata as the Hub reads it: plain YAML at the head of the file."""
    (run_folder / "README.md").write_text(model_card(model, run_folder=run_folder, tokenizer=tokenizer))
    return metadata_load(run_folder / "README.md")


def test_the_results_name_the_commit_of_the_data_and_the_datasets_only_their_names(run_folder, tiny_model):
    stream = {"dataset": "HuggingFaceFW/fineweb-edu", "config": "sample-10BT", "revision": COMMIT, "files": 14}
    change_record(run_folder, data={"data": stream})
    found = metadata(run_folder, tiny_model)
    assert found["datasets"] == ["HuggingFaceFW/fineweb-edu"]
    of_loss, of_hellaswag = found["model-index"][0]["results"]
    task = {"type": "text-generation", "name": "Text Generation"}
    assert of_loss == {
        "task": task,
        "dataset": {
            "name": "fineweb-edu",
            "type": "HuggingFaceFW/fineweb-edu",
            "config": "sample-10BT",
            "revision": COMMIT,
        },
        "metrics": [{"type": "loss", "value": 3.25, "name": "validation loss, nats per token"}],
    }
    assert of_hellaswag == {
        "task": task,
        "dataset": {"name": "HellaSwag", "type": "Rowan/hellaswag", "split": "validation"},
        "metrics": [
            {"type": "acc_norm", "value": 0.3001, "name": "acc_norm (completion)"},
            {"type": "acc_norm", "value": 0.3155, "name": "acc_norm (lm-eval)"},
        ],
    }
    row = f"| data | HuggingFaceFW/fineweb-edu (sample-10BT) at revision {COMMIT} |\n"
    assert row in (run_folder / "README.md").read_text()


def test_the_clients_types_read_back_what_was_written(run_folder, tiny_model):
    (run_folder / "README.md").write_text(model_card(tiny_model, run_folder=run_folder))
    card = ModelCard.load(run_folder / "README.md")
    name, results = model_index_to_eval_results(metadata_load(run_folder / "README.md")["model-index"])
    assert (name, results) == ("gpt2repro", card.data.eval_results)
    run = read_run(run_folder)
    assert results == hub_results(run, run.evaluations()[-1])
    assert ModelCardData(**metadata_load(run_folder / "README.md")).to_dict() == card.data.to_dict()
    assert ModelCard(str(card)).data.to_yaml() == card.data.to_yaml()


def test_shards_name_the_dataset_that_they_were_made_of_and_the_one_on_the_hub(run_folder, tiny_model, monkeypatch):
    source = {"dataset": "owner/text", "config": "small", "revision": COMMIT, "split": "train"}
    manifest = {"source": source, "tokenizer": {"name": "gpt2"}}
    (run_folder / "manifest.json").write_text(json.dumps(manifest))
    change_arguments(run_folder, shards=str(run_folder), hellaswag="none")
    found = metadata(run_folder, tiny_model)
    assert found["datasets"] == ["owner/text"]
    dataset = {"name": "text", "type": "owner/text", "config": "small", "revision": COMMIT}
    assert found["model-index"][0]["results"][0]["dataset"] == dataset

    other_commit = "beef" * 10
    address = f"hf://owner/tokens@{other_commit}"
    change_arguments(run_folder, shards=address)
    found = metadata(run_folder, tiny_model)  # whose manifest is not in the cache
    assert found["datasets"] == ["owner/tokens"]
    dataset = {"name": "tokens", "type": "owner/tokens", "revision": other_commit}
    assert found["model-index"][0]["results"][0]["dataset"] == dataset

    cached = run_folder / "hub/datasets--owner--tokens/snapshots" / other_commit / "manifest.json"
    cached.parent.mkdir(parents=True)
    cached.write_text(json.dumps(manifest))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(run_folder / "hub"))
    found = metadata(run_folder, tiny_model)
    assert found["datasets"] == ["owner/text", "owner/tokens"]
    assert found["model-index"][0]["results"][0]["dataset"]["revision"] == COMMIT
    assert (
        f"owner/text (small) at revision {COMMIT}, prepared as {address} (fingerprint 0123456789ab) |"
        in (run_folder / "README.md").read_text()
    )

    change_record(run_folder, data={"data": [["ab" * 32, 0.7], ["cd" * 32, 0.3]]})
    change_arguments(run_folder, shards=None, mix=f"{address}:0.7,{run_folder}:0.3")
    found = metadata(run_folder, tiny_model)  # a loss of a mixture is of no dataset
    assert (found["datasets"], "model-index" in found) == (["owner/tokens"], False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("revision", "main"),
        ("revision", "x\n---\nlicense: evil"),
        ("revision", 7),
        ("config", "[x](http://evil.example)"),
        ("config", {"evil": True}),
        ("dataset", "evil"),
        ("dataset", "../evil"),
        ("dataset", "a/b/evil"),
        ("dataset", ["evil/evil"]),
    ],
)
def test_a_dataset_in_a_foreign_run_is_a_name_and_a_commit_or_not_there(run_folder, tiny_model, name, value):
    stream = {"dataset": "owner/text", "config": "small", "revision": COMMIT, name: value}
    change_record(run_folder, data={"data": stream})
    change_arguments(run_folder, hellaswag="none")
    found = metadata(run_folder, tiny_model)
    kept = {"name": "text", "type": "owner/text", "config": "small", "revision": COMMIT}
    del kept["name" if name == "dataset" else name]
    if name == "dataset":
        assert not {"datasets", "model-index"} & found.keys()
    else:
        assert found["model-index"][0]["results"][0]["dataset"] == kept
    assert "evil" not in str(found)


WIDGETS = {
    "FineWeb-Edu": ({}, ["Hello, I'm a language model,"]),
    "a built-in text": ({"dataset_name": "python-prose", "sample_prompts": ["Mine"]}, ["This module provides"]),
    "other text": ({"sample_prompts": ["Es war", "Der Wind, die See", 'a: "b" \\', "d"]}, None),
    "foreign prompts": ({"sample_prompts": ["x\n---\nlicense: evil", 7, "", "x" * 301, "a\u202eb"]}, ["Hello, I'm a"]),
    "no list": ({"sample_prompts": {"evil": 1}}, ["Hello, I'm a language model,"]),
}


@pytest.mark.parametrize("kind", WIDGETS)
def test_the_prompts_on_the_hubs_page_fit_the_data(run_folder, tiny_model, kind):
    arguments, expected = WIDGETS[kind]
    change_arguments(run_folder, **arguments)
    found = metadata(run_folder, tiny_model)["widget"]
    prompts = expected or arguments["sample_prompts"][:3]
    assert [entry.keys() for entry in found] == [{"text"}] * len(prompts)
    assert all(entry["text"].startswith(prompt) for entry, prompt in zip(found, prompts, strict=True))
    snippet = re.search(r"^prompt = (.*)$", (run_folder / "README.md").read_text(), re.MULTILINE)
    assert ast.literal_eval(snippet[1]) == found[0]["text"]


def test_a_chat_model_is_asked_in_messages(run_folder, tiny_model, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    found = metadata(run_folder, tiny_model, tokenizer)
    assert found["widget"] == [{"messages": [{"role": "user", "content": "Who are you?"}]}]
    assert found["tags"] == ["gpt2", "gpt2repro", "conversational"]
    card = model_card(tiny_model, Origin("A GPT-2.", prompt="What is in the story?"), tokenizer=tokenizer)
    assert ModelCard(card).data["widget"] == [{"messages": [{"role": "user", "content": "What is in the story?"}]}]


def eval_results(folder) -> dict[str, list]:
    """File name -> entries, by the client's own reader."""
    files = sorted((folder / ".eval_results").glob("*"))
    return {path.name: parse_eval_result_entries(yaml.safe_load(path.read_text())) for path in files}


def expected_entry(protocol, value) -> EvalResultEntry:
    notes = f"acc_norm, zero-shot, {protocol} protocol, after 9,999,220,736 tokens of training"
    return EvalResultEntry(dataset_id="Rowan/hellaswag", task_id="hellaswag", value=value, notes=notes)


def test_public_results_are_files_for_the_hubs_leaderboards(run_folder, tiny_model, tiny_tokenizer):
    folder = run_folder / "model"
    model = resized(tiny_model, tiny_tokenizer)
    save_hub_folder(model, tiny_tokenizer, folder, run_folder=run_folder)
    assert eval_results(folder) == {
        "gpt2repro_hellaswag_completion.yaml": [expected_entry("completion", 0.3001)],
        "gpt2repro_hellaswag_lm-eval.yaml": [expected_entry("lm-eval", 0.3155)],
    }
    (folder / ".eval_results/of_somebody.yaml").write_text("[]")
    change_arguments(run_folder, hellaswag="a-few-rows.jsonl")
    save_hub_folder(model, tiny_tokenizer, folder, run_folder=run_folder)
    assert eval_results(folder) == {"of_somebody.yaml": []}
    save_hub_folder(model, tiny_tokenizer, run_folder / "new", run_folder=run_folder)
    assert not (run_folder / "new/.eval_results").exists()


def test_the_results_arrive_on_the_hub_and_leave_it_with_the_weights(here, run_folder, tiny_model, tiny_tokenizer):
    """Those of a run: tests/hub/test_push_run.py."""
    folder = run_folder / "model"
    model = resized(tiny_model, tiny_tokenizer)
    save_hub_folder(model, tiny_tokenizer, folder, run_folder=run_folder)
    there = here.root / "models/user/scored"
    results = {path.name: path.read_bytes() for path in (folder / ".eval_results").iterdir()}
    assert len(results) == 2
    assert push_in_process(folder, "--hub_model_id", "user/scored").returncode == 0
    assert {path.name: path.read_bytes() for path in (there / ".eval_results").iterdir()} == results
    by_somebody = {"path_or_fileobj": b"[]", "path_in_repo": ".eval_results/hellaswag.yaml"}
    HfApi(here.endpoint, token=here.token).upload_file(repo_id="user/scored", **by_somebody)
    save_hub_folder(model, tiny_tokenizer, run_folder / "other")
    assert push_in_process(run_folder / "other", "--hub_model_id", "user/scored").returncode == 0
    assert [path.name for path in (there / ".eval_results").iterdir()] == ["hellaswag.yaml"]


def resized(model, tokenizer):
    """The model with an embedding for each id."""
    config = copy.deepcopy(model.config)
    config.vocab_size = len(tokenizer)
    return type(model)(config)
