"""Tokenizers: GPT-2's own and trained ones, their encoders and hashes, and which ones are refused."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_gpt2repro.data.tokenizer import (
    GPT2_SHA256,
    check_vocab_size,
    load_tokenizer,
    load_tokenizer_folder,
    save_tokenizer,
    text_encoder,
    tokenizer_class,
    tokenizer_sha256,
    train_tokenizer,
)

SHARED = Path(__file__).parents[2] / "../shared/data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="GPT-2's vocabulary is not in ../shared/data")

END = "<|endoftext|>"


@pytest.fixture
def gpt2_files(tmp_path, monkeypatch):
    """GPT-2's vocabulary where tiktoken looks for it; a copy, because tiktoken deletes what it finds damaged."""
    shutil.copytree(SHARED / "tiktoken_cache", tmp_path / "tiktoken")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))


@needs_shared
def test_gpt2_from_tiktokens_files_is_the_published_tokenizer(gpt2_tokenizer):
    ours = gpt2_tokenizer
    published = AutoTokenizer.from_pretrained(SHARED / "gpt2_tokenizer")
    text = (SHARED / "text/wikitext2_valid.txt").read_text(encoding="utf-8")[:50_000]
    assert tokenizer_sha256(ours) == tokenizer_sha256(published) == GPT2_SHA256
    assert ours(text)["input_ids"] == published(text)["input_ids"]
    assert ours.decode(ours(text)["input_ids"]) == text
    assert ours("Hello, I'm a language model,")["input_ids"] == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert (len(ours), ours.eos_token_id, ours.bos_token_id) == (50257, 50256, 50256)


@needs_shared
def test_the_encoder_gives_tiktokens_ids_and_no_end_of_text(gpt2_files, gpt2_tokenizer):
    import tiktoken

    encode = text_encoder(gpt2_tokenizer)
    reference = tiktoken.get_encoding("gpt2")
    real = (SHARED / "text/tinyshakespeare.txt").read_text(encoding="utf-8")
    for text in (real, f"before{END} {END}after", "\x1c\n 中文 \u2028 \U0001f600's  \t\r\n", real[:999] + END + real):
        assert encode(text).tolist() == reference.encode_ordinary(text)
    assert encode(real).dtype == np.uint16


@needs_shared
def test_the_encoder_encodes_a_text_that_overflows_tiktoken(gpt2_tokenizer):
    spaces = " " * 1_100_000 + "x"
    assert gpt2_tokenizer.decode(text_encoder(gpt2_tokenizer)(spaces)) == spaces


def test_the_encoder_gives_the_tokenizers_ids_and_spells_a_literal_end_of_text(tiny_tokenizer, tiny_texts):
    encode = text_encoder(tiny_tokenizer)
    assert encode(tiny_texts[0]).tolist() == tiny_tokenizer(tiny_texts[0])["input_ids"]
    ids = encode(f"the sea{END}the sea").tolist()
    assert tiny_tokenizer.eos_token_id not in ids
    assert tiny_tokenizer.decode(ids) == f"the sea{END}the sea"


def test_the_encoder_does_not_truncate_or_pad(tmp_path, tiny_tokenizer, tiny_texts):
    tiny_tokenizer.save_pretrained(tmp_path)
    cutting = AutoTokenizer.from_pretrained(tmp_path)
    cutting.backend_tokenizer.enable_truncation(5)
    cutting.backend_tokenizer.enable_padding(length=100_000)
    assert np.array_equal(text_encoder(cutting)(tiny_texts[0]), text_encoder(tiny_tokenizer)(tiny_texts[0]))


def test_a_trained_tokenizer_survives_the_disk_and_another_one_has_another_hash(tmp_path, tiny_tokenizer, tiny_texts):
    saved = save_tokenizer(tiny_tokenizer, tmp_path / "tokenizer")
    loaded = load_tokenizer(str(tmp_path / "tokenizer"))
    assert saved == tokenizer_sha256(loaded) == tokenizer_sha256(tiny_tokenizer)
    assert loaded(tiny_texts[0])["input_ids"] == tiny_tokenizer(tiny_texts[0])["input_ids"]
    assert tokenizer_sha256(train_tokenizer(tiny_texts, 301)) != saved
    assert tokenizer_sha256(train_tokenizer(["other words entirely " * 20, *tiny_texts[:100]], 300)) != saved


@pytest.fixture
def digits_folder(tmp_path):
    """make(class name, **settings) -> a folder whose tokenizer.json splits digits, which GPT2Tokenizer does not."""
    backend = train_tokenizer(["2023,2023,2023"], 260).backend_tokenizer  # three merges, to "2023"
    assert len(backend.encode("2023").ids) == 1
    split = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(split)

    def make(tokenizer_class, **settings) -> Path:
        folder = tmp_path / "digits"
        folder.mkdir()
        backend.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": tokenizer_class, "eos_token": END, "model_max_length": 64, **settings}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        return folder

    return make


def ids_of_file(folder: Path, text: str) -> list[int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("model_type", [None, "gpt2", "llama"])
@pytest.mark.parametrize("name", ["GPT2Tokenizer", "GPT2TokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_the_ids_are_those_of_tokenizer_json_whatever_class_is_named_beside_it(
    digits_folder, tmp_path, name, model_type
):
    folder = digits_folder(name, pad_token="[PAD]")
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    text = "the year 2023, 650841823 items"
    expected = ids_of_file(folder, text)
    assert len(ids_of_file(folder, "2023")) == 4
    loaded = load_tokenizer(str(folder))
    assert loaded(text)["input_ids"] == text_encoder(loaded)(text).tolist() == expected
    assert (loaded.eos_token, loaded.pad_token) == (END, "[PAD]")

    save_tokenizer(loaded, tmp_path / "saved")
    for again in (load_tokenizer(str(tmp_path / "saved")), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert again(text)["input_ids"] == expected
        assert (again.eos_token, again.pad_token, len(again)) == (END, "[PAD]", len(loaded))


def test_special_tokens_that_only_the_class_knows_are_kept(digits_folder):
    """OpenAI's folder on the Hub has a tokenizer_config.json with a length and nothing else."""
    folder = digits_folder("GPT2Tokenizer")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    loaded = load_tokenizer(str(folder))
    assert (loaded.eos_token, loaded.bos_token, len(loaded)) == (END, END, 260)
    assert loaded("2023")["input_ids"] == ids_of_file(folder, "2023")


def test_settings_that_change_the_ids_of_tokenizer_json_are_refused(digits_folder, one_sentence):
    word = {"content": "year", "special": False, "lstrip": False, "rstrip": False, "normalized": True}
    folder = digits_folder("GPT2Tokenizer", added_tokens_decoder={"260": {**word, "single_word": False}})
    with pytest.raises(ValueError, match=r"its tokenizer_config\.json changes the ids that its tokenizer\.json gives"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_damaged_tokenizer_json_or_one_of_a_newer_library_is_refused(digits_folder, name, one_sentence):
    folder = digits_folder(name)
    whole = (folder / "tokenizer.json").read_text()
    for damaged in (whole[:500], "{}", "[]", whole.replace('"Digits"', '"OfTheFuture"')):
        (folder / "tokenizer.json").write_text(damaged)
        with pytest.raises(ValueError, match="is neither 'gpt2' nor a folder or Hub id that loads") as error:
            load_tokenizer(str(folder))
        one_sentence(error)
        with pytest.raises(ValueError, match=r"does not load .*: prepare the data again") as error:
            load_tokenizer_folder(folder)
        one_sentence(error)


def test_a_folder_of_vocabulary_and_merges_gives_gpt2s_ids(tmp_path, tiny_tokenizer, tiny_texts):
    tiny_tokenizer.backend_tokenizer.model.save(str(tmp_path))  # vocab.json and merges.txt
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    loaded = load_tokenizer(str(tmp_path))
    assert loaded(tiny_texts[0])["input_ids"] == tiny_tokenizer(tiny_texts[0])["input_ids"]
    assert loaded.eos_token == END


def test_a_tokenizer_of_its_own_code_is_refused_without_a_question(digits_folder, capfd):
    folder = digits_folder("StrangeTokenizer", auto_map={"AutoTokenizer": [None, "strange.StrangeTokenizer"]})
    (folder / "strange.py").write_text("print('run')")
    with pytest.raises(ValueError, match=r"folder or Hub id that loads \(it needs Python code of its own"):
        load_tokenizer(str(folder))
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_on_the_hub_gives_the_ids_of_its_tokenizer_json(hub, digits_folder, warm_python):
    folder = digits_folder("GPT2Tokenizer")
    repository = hub.new_repository("models/toy/digits")
    shutil.copytree(folder, repository, dirs_exist_ok=True)
    program = folder / "program.py"
    program.write_text(
        "from modeling_gpt2repro.data.tokenizer import load_tokenizer\n"
        "print(load_tokenizer('toy/digits')('the year 2023')['input_ids'])\n"
    )
    assert json.loads(warm_python.run(program).stdout) == ids_of_file(folder, "the year 2023")


def test_what_is_saved_says_nothing_of_this_machine_and_names_no_class_of_transformers_5(tmp_path, digits_folder):
    loaded = load_tokenizer(str(digits_folder("GPT2Tokenizer", additional_special_tokens=["<|user|>"])))
    save_tokenizer(loaded, tmp_path / "saved", max_length=48)
    settings = json.loads((tmp_path / "saved/tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only", "extra_special_tokens"} & settings.keys()
    assert (settings["tokenizer_class"], settings["model_max_length"]) == ("PreTrainedTokenizerFast", 48)
    assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert (again.extra_special_tokens, again.model_max_length) == (["<|user|>"], 48)


def test_code_in_the_folder_of_a_tokenizer_is_neither_run_nor_asked_about(tmp_path, tiny_tokenizer, capfd):
    tiny_tokenizer.save_pretrained(tmp_path)
    strange = {"model_type": "strange", "auto_map": {"AutoConfig": "configuration_strange.StrangeConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(strange))
    assert tokenizer_sha256(load_tokenizer(str(tmp_path))) == tokenizer_sha256(tiny_tokenizer)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("class_name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_a_folder_that_names_its_class_loads_without_autotokenizer_to_the_same(tmp_path, tiny_tokenizer, class_name):
    tiny_tokenizer.save_pretrained(tmp_path / "named")
    settings = tmp_path / "named/tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "tokenizer_class": class_name}))
    assert tokenizer_class(str(tmp_path / "named")) is PreTrainedTokenizerFast
    load_tokenizer(str(tmp_path / "named")).save_pretrained(tmp_path / "direct")
    AutoTokenizer.from_pretrained(tmp_path / "named").save_pretrained(tmp_path / "auto")
    files = [path.name for path in (tmp_path / "auto").iterdir()]
    assert set(files) == {path.name for path in (tmp_path / "direct").iterdir()}
    for name in files:
        assert json.loads((tmp_path / "direct" / name).read_text()) == json.loads(
            (tmp_path / "auto" / name).read_text()
        )


@pytest.mark.parametrize(
    "changes", [{"tokenizer_class": "GPT2Tokenizer"}, {"tokenizer_class": None}, {"auto_map": {"AutoTokenizer": "x.X"}}]
)
def test_any_other_folder_is_left_to_autotokenizer(tmp_path, tiny_tokenizer, changes):
    tiny_tokenizer.save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changes))
    assert tokenizer_class(str(tmp_path)) is tokenizer_class("openai-community/gpt2") is AutoTokenizer
    settings.write_text("[]")
    assert tokenizer_class(str(tmp_path)) is AutoTokenizer


def test_unusable_tokenizers_are_refused(tmp_path, tiny_tokenizer, tiny_texts, one_sentence):
    with pytest.raises(ValueError, match=r"holds 257 to 65536 ids, not 256\.") as error:
        train_tokenizer(tiny_texts, 256)
    one_sentence(error)
    with pytest.raises(ValueError, match=r"enough for a vocabulary of 2\d\d, not 5000: ask for fewer ids\.") as error:
        train_tokenizer(["the sea"], 5000)
    one_sentence(error)

    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is neither 'gpt2' nor a folder or Hub id that loads") as error:
        load_tokenizer(str(tmp_path / "empty"))
    one_sentence(error)

    save_tokenizer(tiny_tokenizer, tmp_path / "endless")
    settings = tmp_path / "endless/tokenizer_config.json"
    settings.write_text(re.sub(r'.*"eos_token".*\n', "", settings.read_text()))
    with pytest.raises(ValueError, match=r"must be a fast tokenizer with an end-of-text \(eos\) token") as error:
        load_tokenizer(str(tmp_path / "endless"))
    one_sentence(error)

    check_vocab_size("large", tiny_tokenizer, limit=300)
    with pytest.raises(ValueError, match=r"has ids up to 299; shards hold 16-bit ids, less than 299\.") as error:
        check_vocab_size("large", tiny_tokenizer, limit=299)
    one_sentence(error)
    large = Tokenizer(models.WordLevel({str(i): i for i in range(2**16 + 1)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=large, eos_token="1").save_pretrained(tmp_path / "large")
    with pytest.raises(ValueError, match=r"has ids up to 65536; shards hold 16-bit ids, less than 65536\.") as error:
        load_tokenizer(str(tmp_path / "large"))
    one_sentence(error)
