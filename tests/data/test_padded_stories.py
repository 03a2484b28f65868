"""Each story is one training sequence: it begins at position 0, and line breaks fill the rest."""

import json

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.data import describe
from modeling_gpt2repro.data.batches.build import build_shuffled_data, load_built_in_text
from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.data.shards.verify import verify_shards
from modeling_gpt2repro.data.sources.documents import Document
from modeling_gpt2repro.data.sources.resolve import BUILT_IN_TEXTS
from modeling_gpt2repro.data.sources.stories import write_story
from modeling_gpt2repro.data.tokenize import is_validation, pad_document, tokenize_documents

LENGTH = 512  # enough for 300 stories in a vocabulary of 600
SHARE = 0.2


@pytest.fixture(scope="module")
def documents():
    stories = [write_story(number) for number in range(300)]
    return [Document(f"story:{story.combination}", story.text) for story in stories]


@pytest.fixture(autouse=True)
def few_stories(documents, monkeypatch):
    monkeypatch.setitem(BUILT_IN_TEXTS, "stories", lambda: documents)


@pytest.fixture(scope="module")
def dataset(documents, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUILT_IN_TEXTS, "stories", lambda: documents)
        return load_built_in_text("stories", tmp_path_factory.mktemp("run") / "data", 600, LENGTH, SHARE)


def story_in(ids, tokenizer: PreTrainedTokenizerFast) -> str:
    """The text of a sequence (T,), after which comes an end-of-text, and nothing but line breaks."""
    text, rest = tokenizer.decode(ids).split(tokenizer.eos_token)
    assert set(rest) <= {"\n"}
    return text


def test_a_document_its_end_of_text_and_line_breaks_are_one_sequence():
    """By hand: ids 5 6 7, end-of-text 0, a line break of one token, and one of two tokens."""
    ids = np.array([5, 6, 7], dtype=np.uint16)
    padded = pad_document(ids, 0, np.array([9], dtype=np.uint16), 6)
    assert padded.tolist() == [5, 6, 7, 0, 9, 9]
    assert padded.dtype == np.uint16
    assert pad_document(ids, 0, np.array([9]), 4).tolist() == [5, 6, 7, 0]
    assert pad_document(ids, 0, np.array([8, 9]), 7).tolist() == [5, 6, 7, 0, 8, 9, 8]


def test_every_sequence_is_one_whole_story_from_its_first_token_on(dataset, documents):
    """Two epochs of training sequences, in whatever order they come; and those of validation, in the text's order."""
    texts = {False: [], True: []}
    for document in documents:
        texts[is_validation(document.id, SHARE)].append(document.text)
    config = BatchConfig(block_size=LENGTH, sequences_per_step=1, micro_batch_size=1, seed=5)
    data = build_shuffled_data(dataset, config, 10**6)
    assert [
        story_in(ids, dataset.tokenizer) for ids in data.validation.read(np.arange(len(data.validation)))[:, :-1]
    ] == (
        texts[True][:-1]  # the last one lacks the token after it, a target
    )
    steps = 2 * data.batches.sequences_per_epoch
    assert steps == 2 * (len(texts[False]) - 1)
    read = [
        story_in(batch["input_ids"][0], dataset.tokenizer)
        for step in range(steps)
        for batch in data.batches.micro_batches(step)
    ]
    assert sorted(read) == sorted(2 * texts[False][:-1])


def test_the_manifest_counts_stories_and_their_bytes(dataset, documents):
    splits = dataset.manifest["splits"]
    for split in ("train", "validation"):
        texts = [
            document.text for document in documents if is_validation(document.id, SHARE) == (split == "validation")
        ]
        assert splits[split]["documents"] == len(texts)
        assert splits[split]["tokens"] == LENGTH * len(texts)
        assert splits[split]["shards"][0]["documents"] == len(texts)
    assert dataset.manifest["source"] == {"dataset": "stories", "document_length": LENGTH}
    assert verify_shards(dataset.folder) == []


def test_describe_shows_stories_without_their_padding(dataset, documents, capsys):
    describe.main([str(dataset.folder)])
    printed = capsys.readouterr().out
    rows = {line[:20].strip(): line[20:].split() for line in printed.splitlines() if line.endswith("tokens")}
    lengths = {False: [], True: []}
    for document in documents:
        ids = dataset.tokenizer(document.text, add_special_tokens=False)["input_ids"]
        lengths[is_validation(document.id, SHARE)].append(len(ids))
    for name, choose in (("shortest document", min), ("100 % have at most", max)):
        assert rows[name] == [str(choose(lengths[False])), "tokens", str(choose(lengths[True])), "tokens"]
    counted = next(line for line in printed.splitlines() if line.startswith("documents"))
    assert counted.split() == ["documents", str(len(lengths[False])), str(len(lengths[True]))]
    trained = [document.text for document in documents if not is_validation(document.id, SHARE)]
    for which, text in (("first", trained[0]), ("last", trained[-1])):
        shown = printed.split(f"--- its {which} document, ")[1].partition("\n")[2].split("\n--- ")[0]
        assert shown.startswith(text[:100])
        assert shown.rstrip("\n").endswith(text[-100:])
    assert "cut" not in printed


def test_a_block_size_that_is_too_small_is_refused_with_the_one_that_suffices(documents, tmp_path, one_sentence):
    """And that one, given next, works in the same folder, where the first start has left its preparation."""
    with pytest.raises(ValueError, match="give --block_size") as error:
        load_built_in_text("stories", tmp_path / "data", 600, 100, SHARE)
    one_sentence(error)
    needed = int(str(error.value).rpartition("--block_size ")[2].split()[0])
    dataset = load_built_in_text("stories", tmp_path / "data", 600, needed, SHARE)
    encoded = dataset.tokenizer([document.text for document in documents], add_special_tokens=False)["input_ids"]
    assert needed == max(map(len, encoded)) + 1
    with pytest.raises(ValueError, match=f"data holds stories for --block_size {needed}, not 512: give that") as error:
        load_built_in_text("stories", tmp_path / "data", 600, 512, SHARE)
    one_sentence(error)
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["source"]["document_length"] == needed


def test_a_document_of_the_very_length_is_refused_by_its_length_with_the_end():
    """Three ids and an end-of-text are four tokens."""
    texts = [Document("a", "xx"), Document("b", "xxx"), Document("c", "x")]

    def encode(text):
        return np.ones(len(text), dtype=np.uint16)

    padded = tokenize_documents(texts, encode, 0, 0, document_length=4).ids["train"]
    assert padded.tolist() == [1, 1, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1]
    with pytest.raises(ValueError, match=r"are 4 tokens, .* of 3: give --block_size 4 or more"):
        tokenize_documents(texts, encode, 0, 0, document_length=3)
