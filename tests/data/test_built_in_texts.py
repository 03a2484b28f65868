"""Texts that need no download: under which names, and that nothing else is taken for one of them."""

import pytest

from modeling_gpt2repro.data.batches.build import load_built_in_text
from modeling_gpt2repro.data.prepare.arguments import PrepareArguments
from modeling_gpt2repro.data.prepare.local import prepare_shards
from modeling_gpt2repro.data.sources.documents import Document
from modeling_gpt2repro.data.sources.resolve import BUILT_IN_TEXTS, PYTHON_PROSE, STORIES, built_in_source, local_source
from modeling_gpt2repro.runs.summary import BUILT_IN_DATA
from modeling_gpt2repro.training.arguments import SAMPLE_PROMPTS


@pytest.fixture
def short_texts(monkeypatch):
    """Both names stand for a hundred documents of their own."""
    for name in (PYTHON_PROSE, STORIES):
        documents = [Document(f"{name}:{number}", f"the {name} number {number}") for number in range(100)]
        monkeypatch.setitem(BUILT_IN_TEXTS, name, lambda documents=documents: documents)


def test_each_name_stands_for_its_own_documents():
    assert (PYTHON_PROSE, STORIES) == ("python-prose", "stories") == tuple(BUILT_IN_TEXTS)
    for name, kinds in ((PYTHON_PROSE, {"topic", "module"}), (STORIES, {"story"})):
        source = built_in_source(name, 224)
        documents = list(source.read(source.partitions[0]))
        assert {document.id.partition(":")[0] for document in documents} <= kinds
        assert len(documents) > 100
    # In the manifest, and of python-prose in the checkpoints of earlier versions.
    assert built_in_source(PYTHON_PROSE, 224).description == {"dataset": "python-prose"}
    assert built_in_source(STORIES, 224).description == {"dataset": "stories", "document_length": 224}


def test_each_name_has_its_prompt_and_its_words_in_a_model_card():
    assert set(BUILT_IN_TEXTS) == set(SAMPLE_PROMPTS) == set(BUILT_IN_DATA)


def test_a_file_of_such_a_name_is_read_as_a_file(tmp_path, monkeypatch, short_texts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stories").write_text("Mine.")
    source = local_source(["stories"])
    assert [document.text for document in source.read(source.partitions[0])] == ["Mine."]


@pytest.mark.parametrize("name", [PYTHON_PROSE, STORIES])
def test_a_text_is_prepared_once_with_a_tokenizer_of_its_own(tmp_path, short_texts, name):
    for _ in range(2):
        dataset = load_built_in_text(name, tmp_path / "data", 260, 32, 0.1)
    assert dataset.manifest["tokenizer"]["name"] == f"trained on {name}"
    assert len(dataset.tokenizer) == 260
    assert sum(totals["documents"] for totals in dataset.manifest["splits"].values()) == 100


def test_a_folder_with_another_text_is_refused(tmp_path, short_texts, tiny_tokenizer, one_sentence):
    load_built_in_text(PYTHON_PROSE, tmp_path / "data", 260, 32, 0.1)
    with pytest.raises(ValueError, match="data holds python-prose, not stories: give that --dataset_name") as error:
        load_built_in_text(STORIES, tmp_path / "data", 260, 32, 0.1)
    one_sentence(error)
    (tmp_path / "text.jsonl").write_text("".join(f'{{"text": "text {number}"}}\n' for number in range(100)))
    prepare_shards(local_source([str(tmp_path / "text.jsonl")]), tiny_tokenizer, "tiny", tmp_path / "mine", 0.1)
    with pytest.raises(ValueError, match="mine holds another text, not stories: give another --output_dir") as error:
        load_built_in_text(STORIES, tmp_path / "mine", 260, 32, 0.1)
    one_sentence(error)


@pytest.mark.parametrize("name", [PYTHON_PROSE, STORIES])
def test_they_are_trained_on_without_a_preparation(name, one_sentence):
    message = rf"dataset_name \({name}\) needs no preparation: give it to train_accelerate.py."
    with pytest.raises(ValueError, match=message) as error:
        PrepareArguments(dataset_name=name)
    one_sentence(error)
