"""The description of prepared data: figures, documents at the ends of a shard, and marks where they are cut."""

import json
import shutil
import time

import numpy as np
import pytest
from damage import edit_json

from modeling_gpt2repro.data import describe
from modeling_gpt2repro.data.describe import PERCENTILES, ShardIndex, document_lengths, excerpt, index_shards
from modeling_gpt2repro.data.prepare.local import prepare_shards
from modeling_gpt2repro.data.sources.resolve import local_source
from modeling_gpt2repro.data.tokenizer import text_encoder


def prepared(folder, tokenizer, texts, shard_tokens=100_000):
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    source = local_source([str(folder / "texts.jsonl")])
    return prepare_shards(source, tokenizer, "tiny", folder / "shards", 0.0, shard_tokens=shard_tokens)


def description(capsys, *argv):
    describe.main([str(word) for word in argv])
    return capsys.readouterr().out


def table_row(text, name):
    [line] = [line for line in text.splitlines() if line.startswith(name)]
    return line.removeprefix(name).replace(" tokens", "").split()


def test_the_figures_are_those_of_the_documents(token_shards, capsys):
    text = description(capsys, token_shards.folder)
    tokenizer = token_shards.tokenizer
    assert f"{token_shards.folder}: tokenizer tiny, 300 ids" in text
    totals = [token_shards.manifest["splits"][split] for split in ("train", "validation")]
    assert table_row(text, "tokens") == [f"{split['tokens']:,}" for split in totals]
    assert table_row(text, "documents") == [f"{split['documents']:,}" for split in totals]
    assert table_row(text, "shards") == [f"{len(split['shards'])}" for split in totals]
    assert table_row(text, "bytes per token") == [f"{split['text_bytes'] / split['tokens']:.3f}" for split in totals]
    encode = text_encoder(tokenizer)
    for column, split in enumerate(("train", "validation")):
        whole = tokenizer.decode(np.concatenate(token_shards.shards(split))).split("<|endoftext|>")[1:]
        lengths = sorted(len(encode(document)) for document in whole)
        assert sorted(document_lengths(index_shards(token_shards, split)).tolist()) == lengths
        for percent in PERCENTILES:
            shown = table_row(text, f"{percent} % have at most" if percent else "shortest document")[column]
            shown = int(shown.replace(",", ""))
            assert shown in lengths
            assert sum(length <= shown for length in lengths) >= len(lengths) * percent / 100
            assert sum(length < shown for length in lengths) <= len(lengths) * percent / 100


@pytest.mark.parametrize("name", ["\x1b[2Jred", "a\nb"])
def test_names_of_a_manifest_are_no_commands_to_a_terminal(token_shards, tmp_path, capsys, name):
    folder = shutil.copytree(token_shards.folder, tmp_path / "shards")
    edit_json(folder / "manifest.json", lambda manifest: manifest["tokenizer"].update(name=name))
    assert f"tokenizer {name.encode('unicode_escape').decode()}, 300 ids" in description(capsys, folder)


def test_a_split_without_shards_is_described(token_shards, tmp_path, capsys):
    folder = shutil.copytree(token_shards.folder, tmp_path / "shards")
    empty = {"shards": [], "tokens": 0, "documents": 0, "text_bytes": 0}
    edit_json(folder / "manifest.json", lambda manifest: manifest["splits"]["train"].update(empty))
    assert "validation_000000.npy:" in description(capsys, folder)


def test_documents_of_an_equal_length_that_do_not_fill_a_shard(token_shards, tmp_path, capsys):
    folder = shutil.copytree(token_shards.folder, tmp_path / "shards")
    edit_json(folder / "manifest.json", lambda manifest: manifest["source"].update(document_length=7))
    with pytest.raises(SystemExit):
        describe.main([str(folder)])
    sentence = f"shard {folder / 'train_000000.npy'} does not hold whole documents of 7 tokens.\n"
    assert capsys.readouterr().err.endswith(f": {sentence}")


def test_lengths_by_hand():
    # 0 is end-of-text: documents of 2, 0 and 5 tokens, and one of none at the very end; the third lies in three shards.
    shards = [np.array(ids, np.uint16) for ids in ([0, 7, 7, 0, 0, 7], [7, 7], [7, 7, 0])]
    indexes = [ShardIndex(f"{i}.npy", ids, np.flatnonzero(ids == 0)) for i, ids in enumerate(shards)]
    assert document_lengths(indexes).tolist() == [2, 0, 5, 0]
    assert [shard.begins_inside for shard in indexes] == [False, True, True]
    assert [(shard.first.tolist(), shard.last.tolist()) for shard in indexes] == [
        ([7, 7], [7]),
        ([7, 7], [7, 7]),
        ([7, 7], []),
    ]
    assert document_lengths([]).tolist() == []


def test_the_first_and_the_last_document_of_a_shard_are_shown_with_their_cuts(tmp_path, capsys, tiny_tokenizer):
    texts = ["the first document", "a second one in the sea", "the third and last of the land"]
    lengths = [1 + len(text_encoder(tiny_tokenizer)(text)) for text in texts]
    shards = prepared(tmp_path, tiny_tokenizer, texts, shard_tokens=lengths[0] + lengths[1] + 4)
    text = description(capsys, shards.folder)
    shown = text[text.index("train_000000.npy") :].splitlines()
    assert shown[0] == f"train_000000.npy: {sum(lengths[:2]) + 4} tokens, 3 documents begin in it"
    assert shown[2:4] == [f"--- its first document, {lengths[0] - 1} tokens", texts[0]]
    assert shown[5] == "--- its last document, 3 tokens; cut, it continues in the next shard"
    assert texts[2].startswith(shown[6])

    rest = description(capsys, shards.folder, "--shard", "train_000001").splitlines()
    assert rest[-2] == f"--- its only document, {lengths[2] - 4} tokens; cut, it began in the shard before"
    assert shown[6] + rest[-1] == texts[2]
    assert table_row(text, "documents") == ["3", "0"]


def test_a_shard_that_ends_with_a_document_is_not_cut(tmp_path, capsys, tiny_tokenizer):
    texts = ["the sea", "the land"]
    first = 1 + len(text_encoder(tiny_tokenizer)(texts[0]))
    shards = prepared(tmp_path, tiny_tokenizer, texts, shard_tokens=first)
    text = description(capsys, shards.folder)
    assert "cut" not in text
    assert text.endswith(f"--- its only document, {first - 1} tokens\nthe sea\n")


def test_a_shard_within_one_document_is_cut_on_both_sides(tmp_path, capsys, tiny_tokenizer):
    shards = prepared(tmp_path, tiny_tokenizer, ["the sea and the land " * 100], shard_tokens=50)
    text = description(capsys, shards.folder, "--shard", "train_000001.npy")
    assert "0 documents begin in it" in text
    assert "--- its only document, 50 tokens; cut, it began in the shard before; cut, it continues in the next" in text


def test_a_long_document_is_shortened_and_control_characters_are_escaped(tiny_tokenizer):
    encode = text_encoder(tiny_tokenizer)
    ids = encode("the sea " * 1_000)
    text = excerpt(ids, tiny_tokenizer)
    assert text.count(f"\n[... {len(ids) - 240:,} tokens ...]\n") == 1
    assert tiny_tokenizer.decode(ids).startswith(text.split("\n")[0])
    assert tiny_tokenizer.decode(ids).endswith(text.split("\n")[-1])
    assert excerpt(encode("red \x1b[31m\0\r\n\tsea 海"), tiny_tokenizer) == "red \\x1b[31m\\x00\\r\n\tsea 海"


def test_a_hundred_million_tokens_are_described_in_a_second(tmp_path):
    ids = np.lib.format.open_memmap(tmp_path / "large.npy", mode="w+", dtype=np.uint16, shape=(100_000_000,))
    ids[:] = 7
    ids[::1_000] = 0
    starts = np.flatnonzero(np.asarray(ids) == 0)
    started = time.process_time()
    lengths = document_lengths([ShardIndex("large.npy", ids, starts)])
    assert time.process_time() - started < 1
    assert lengths.tolist() == [999] * 100_000


def test_what_cannot_be_described_is_one_sentence_and_exit_code_2(tmp_path, token_shards, capsys):
    for words, sentence in (
        ([tmp_path / "none"], f"there is no folder {tmp_path / 'none'}: prepare it with"),
        ([tmp_path], "has no manifest.json: its preparation was not finished"),
        ([token_shards.folder, "--shard", "train_9"], "has no shard 'train_9'; it has train_000000.npy to train_"),
    ):
        with pytest.raises(SystemExit) as end:
            describe.main([str(word) for word in words])
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert sentence in message
        assert message.count("\n") == 1
        assert message.endswith(".\n")


def test_it_runs_as_a_command(token_shards, warm_python):
    ran = warm_python.run("-m", "modeling_gpt2repro.data.describe", token_shards.folder)
    assert "its first document" in ran.stdout
