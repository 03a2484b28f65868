"""--decontaminate: training documents that share 13 words in a row with HellaSwag's examples."""

import json
import re
import unicodedata
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest
from preparing import contents, error_of, interrupt_before_the_shards, prepare

import prepare_data
from modeling_gpt2repro.data import contamination, describe
from modeling_gpt2repro.data.batches.build import build_mixed_data, build_shuffled_data
from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.data.contamination import NgramIndex, normalize
from modeling_gpt2repro.data.prepare.local import tokenize_partitions
from modeling_gpt2repro.data.shards.dataset import open_shards, read_manifest
from modeling_gpt2repro.data.sources.documents import Document
from modeling_gpt2repro.data.tokenize import is_validation, tokenize_documents
from modeling_gpt2repro.data.tokenizer import text_encoder, tokenizer_sha256
from modeling_gpt2repro.hub.push_shards import dataset_card
from modeling_gpt2repro.runs.config import write_run_config
from modeling_gpt2repro.runs.read import read_run
from modeling_gpt2repro.runs.summary import plain_text, training_lines
from modeling_gpt2repro.training.arguments import TrainArguments

WORDS = [f"{first}{second}" for first in "bcdfghjklm" for second in ("ab", "ed", "in", "op", "us")]
SHARE = 0.2  # held out


def words_of(text):
    """The definition again, one character at a time."""
    parts = unicodedata.normalize("NFKD", text).lower().split()
    words = ["".join(c for c in part if c.isascii() and c.isalnum()) for part in parts]
    return [word for word in words if word]


def ngrams(text):
    words = words_of(text)
    return {tuple(words[i : i + 13]) for i in range(len(words) - 12)}


def sentence(random, length):
    return " ".join(random.choices(WORDS, k=length))


def test_words_are_in_lower_case_without_punctuation_and_accents():
    line = "Don't — the CAFÉ's “well-known” [door]…\N{NO-BREAK SPACE}It\u2028is\t\uff2f\uff2b: 3.5, cafe\u0301, Ωmega"
    text = f"{line}\x1fend"
    expected = ["dont", "the", "cafes", "wellknown", "door", "it", "is", "ok", "35", "cafe", "mega", "end"]
    assert normalize(text).decode().split() == expected == words_of(text)


@pytest.mark.parametrize("before", range(12))  # wherever they are, also across the places that are looked up
def test_13_words_in_a_row_are_found_and_12_are_not(before):
    item = sentence(Random(1), 40)
    words = item.split()
    index = NgramIndex(["a short one", item])
    filler = ["x"] * before
    for begin in (0, 11, 27):
        assert index.find(" ".join([*filler, *words[begin : begin + 13], "y"])) == {1}
        assert index.find(" ".join([*filler, *words[begin : begin + 12], "y"])) == set()
        apart = [*words[begin : begin + 7], "y", *words[begin + 7 : begin + 13]]
        assert index.find(" ".join([*filler, *apart])) == set()
    assert index.find("A Short one.") == set()
    shouted = ",\n".join(word.upper().replace("E", "é") for word in words[:13])
    assert index.find(" ".join([*filler, shouted])) == {1}


@pytest.mark.parametrize("block_words", [13, 50, 2**20])
def test_every_shared_ngram_is_found_and_no_other(block_words, monkeypatch):
    monkeypatch.setattr(contamination, "BLOCK_WORDS", block_words)
    random = Random(2)
    # Items share beginnings with each other, as HellaSwag's do, and texts hold pieces of them of 5 to 20 words.
    beginnings = [sentence(random, 12) for _ in range(5)]
    items = [f"{random.choice(beginnings)} {sentence(random, random.randint(0, 30))}" for _ in range(60)]
    items.append(f"{items[0]}! {items[1]}")
    index = NgramIndex(items)
    in_items = [ngrams(item) for item in items]
    found = 0
    for _ in range(100):
        parts = [sentence(random, random.randint(0, 12))]
        for _ in range(random.randint(0, 6)):
            words = random.choice(items).split()
            begin = random.randrange(len(words))
            parts += [" ".join(words[begin : begin + random.randint(5, 20)]), sentence(random, random.randint(0, 3))]
        text = "  ".join(parts)
        in_text = ngrams(text)
        expected = {number for number, item in enumerate(in_items) if item & in_text}
        assert index.find(text) == expected
        found += bool(expected)
    assert 20 < found < 80


@pytest.fixture(scope="module")
def planted(tmp_path_factory, tiny_tokenizer):
    """Arguments to prepare 200 documents, of which some hold what some of 6 examples of HellaSwag hold; the documents.

    The first example is too short, the second is in no document, and the third and the fourth share their context.
    """
    folder = tmp_path_factory.mktemp("planted")
    random = Random(3)
    context = sentence(random, 20)
    texts = [
        ("the", "end"),
        *[(sentence(random, 20), sentence(random, 15)), (context, sentence(random, 15)), (context, "it ends")],
        (f"[header] How to {sentence(random, 6)} [title] {sentence(random, 6)}", f"[step] {sentence(random, 6)}"),
        (sentence(random, 10), f", {sentence(random, 10)}"),
    ]
    rows = []
    for number, (ctx, ending) in enumerate(texts):
        endings = [sentence(random, 30), ending, sentence(random, 30), sentence(random, 30)]
        fields = {"ind": number, "activity_label": "", "ctx_a": ctx, "ctx_b": "", "ctx": ctx}
        rows.append({**fields, "endings": endings, "label": 1})
    examples = folder / "hellaswag.jsonl"
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = [re.sub(r" ?\[\w+\] ?", " ", f"{ctx} {ending}") for ctx, ending in texts]
    documents = [sentence(random, random.randint(5, 60)) for _ in range(200)]
    for number in range(20, 200, 20):
        words = random.choice(items[2:]).split()
        words = words[: random.randint(13, 20)] if number < 120 else words[-13:]
        documents[number] += f". {' - '.join(words).title()}…"
    documents[10] += items[2][:40]  # some 10 words
    documents[11] += rows[2]["endings"][0]  # a wrong ending
    lines = [json.dumps({"id": f"id{number}", "text": text}) for number, text in enumerate(documents)]
    tiny_tokenizer.save_pretrained(folder / "tiny")
    files = [folder / f"part{part}.jsonl" for part in range(5)]  # a partition each
    for part, file in enumerate(files):
        file.write_text("\n".join(lines[part * 40 : part * 40 + 40]))
    arguments = ["--train_files", *map(str, files), "--tokenizer", str(folder / "tiny"), "--shard_tokens", "5000"]
    arguments += ["--validation_share", str(SHARE)]
    return arguments, ["--decontaminate", "hellaswag", "--hellaswag", str(examples)], documents, items


def expected_counts(documents, items, drop):
    training = [text for number, text in enumerate(documents) if not is_validation(f"id{number}", SHARE)]
    found = [{number for number, item in enumerate(items) if ngrams(item) & ngrams(text)} for text in training]
    return {
        "benchmark": "hellaswag",
        "drop": drop,
        "ngram_words": 13,
        "items": 6,
        "short_items": 1,
        "documents": len(training),
        "contaminated_documents": sum(map(bool, found)),
        "contaminated_items": len(set().union(*found)),
    }


def is_contaminated(text, items):
    return not set().union(*map(ngrams, items)).isdisjoint(ngrams(text))


def counts_of(folder):
    counts = json.loads((folder / "manifest.json").read_text())["contamination"]
    assert re.fullmatch("[0-9a-f]{64}", counts.pop("items_sha256"))
    return counts


def test_a_phrase_that_is_repeated_is_compared_once():
    """Text of a few phrases, which many items share, must not take minutes."""
    compared = []

    class Item(bytes):
        def __contains__(self, ngram):
            compared.append(ngram)
            return super().__contains__(ngram)

    phrase = sentence(Random(3), 20)
    index = NgramIndex([f"{sentence(Random(seed), 15)} {phrase}" for seed in range(30)])
    index.items = [Item(item) for item in index.items]
    assert index.find(f"{phrase} " * 1000) == set(range(30))
    assert len(compared) < 2 * len(set(compared)) * len(index.items)


def test_contaminated_documents_are_counted_and_all_text_is_kept(tmp_path, planted, capsys):
    arguments, decontaminate, documents, items = planted
    prepare(tmp_path / "plain", arguments, "--workers", 1)
    capsys.readouterr()
    prepare(tmp_path / "out", arguments, *decontaminate, "--workers", 1)
    counts = counts_of(tmp_path / "out")
    assert counts == expected_counts(documents, items, drop=False)
    assert 4 <= counts["contaminated_documents"] < 9  # the others are held out
    assert 2 <= counts["contaminated_items"] <= 4
    plain, out = contents(tmp_path / "plain"), contents(tmp_path / "out")
    assert plain.pop("manifest.json") != out.pop("manifest.json")
    assert plain == out
    sentence = contamination.describe_contamination(open_shards(tmp_path / "out").manifest)
    assert sentence == (
        f"{counts['contaminated_documents']} of {counts['documents']} training documents (kept) share 13 words in a row"
        f" with {counts['contaminated_items']} of the 6 validation items of HellaSwag (1 too short to be found)"
    )
    assert f"benchmark  {sentence}\n" in capsys.readouterr().out
    prepare_data.main(["--verify", str(tmp_path / "out")])
    assert f"{sentence}.\n" in capsys.readouterr().out
    describe.main([str(tmp_path / "out")])
    assert f"\n{sentence}\n" in capsys.readouterr().out


def test_dropped_documents_are_missing_and_nothing_else_changes(tmp_path, planted, tiny_tokenizer):
    arguments, decontaminate, documents, items = planted
    prepare(tmp_path / "out", arguments, *decontaminate, "--drop_contaminated", "--workers", 1)
    counts = counts_of(tmp_path / "out")
    assert counts == expected_counts(documents, items, drop=True)
    shards = open_shards(tmp_path / "out")
    kept = {"train": [], "validation": []}
    for number, text in enumerate(documents):
        split = "validation" if is_validation(f"id{number}", SHARE) else "train"
        if split == "validation" or not is_contaminated(text, items):
            kept[split].append(text)
    for split, texts in kept.items():
        ids = [token for shard in shards.shards(split) for token in shard.tolist()]
        assert ids == [
            token for text in texts for token in [tiny_tokenizer.eos_token_id, *tiny_tokenizer(text).input_ids]
        ]
        assert shards.manifest["splits"][split]["documents"] == len(texts)
        assert shards.manifest["splits"][split]["text_bytes"] == sum(len(text.encode()) for text in texts)


def test_workers_and_an_interruption_change_nothing(tmp_path, planted, monkeypatch):
    def tokenize_by_three(folder, workers):  # one after the other, because a process takes seconds to start
        for rank in (2, 0, 1):
            tokenize_partitions(folder, rank, world_size=3)

    arguments, decontaminate, *_ = planted
    arguments = [*arguments, *decontaminate, "--drop_contaminated"]
    prepare(tmp_path / "one", arguments, "--workers", 1)
    interrupt_before_the_shards(tmp_path / "resumed", [*arguments, "--workers", "1"], monkeypatch)
    for path in sorted((tmp_path / "resumed/units").iterdir())[::2]:
        path.unlink()  # as if it had been killed before they were written
    prepare(tmp_path / "resumed", arguments, "--workers", 1)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "one")
    monkeypatch.setattr(prepare_data, "tokenize_locally", tokenize_by_three)
    prepare(tmp_path / "three", arguments)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


@pytest.mark.slow
def test_three_processes_change_nothing(tmp_path, planted, monkeypatch):
    monkeypatch.setenv("GPT2REPRO_LAZY", "1")
    arguments, decontaminate, *_ = planted
    for workers in ("1", "3"):  # whose hashes of words differ
        prepare(tmp_path / workers, arguments, *decontaminate, "--drop_contaminated", "--workers", workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_counts_end_where_max_tokens_cuts(tmp_path, planted):
    arguments, decontaminate, documents, items = planted
    arguments = [*arguments, *decontaminate, "--workers", "1"]
    prepare(tmp_path / "all", arguments)
    ids = [token for shard in open_shards(tmp_path / "all").shards("train") for token in shard.tolist()]
    starts = [position for position, token in enumerate(ids) if token == ids[0]]
    training = [text for number, text in enumerate(documents) if not is_validation(f"id{number}", SHARE)]
    is_found = [is_contaminated(text, items) for text in training]
    last = max(number for number, found in enumerate(is_found) if found)
    for max_tokens, cut in ((starts[last], last), (starts[last] + 1, last + 1)):
        folder = tmp_path / str(max_tokens)
        prepare(folder, arguments, "--max_tokens", max_tokens)
        counts = counts_of(folder)
        assert counts["documents"] == cut
        assert counts["contaminated_documents"] == sum(is_found[:cut])


def test_a_piece_of_a_document_is_dropped_by_itself(tiny_tokenizer):
    encode = text_encoder(tiny_tokenizer, tokenizer_sha256(tiny_tokenizer))
    item = sentence(Random(4), 15)
    pieces = ["the sea ", "a ship ", f"{item} ", "the wind ", "the land"]
    documents = [Document("a", text, continues=number > 0) for number, text in enumerate(pieces)]
    options = {"end_of_text_id": 0, "validation_share": 0, "benchmark": NgramIndex([item])}
    tokenized = tokenize_documents(documents, encode, **options, drop_contaminated=True)
    expected = [0, *encode(pieces[0]), *encode(pieces[1]), 0, *encode(pieces[3]), *encode(pieces[4])]
    assert tokenized.ids["train"].tolist() == expected  # a new document begins after the hole
    assert tokenized.text_bytes["train"] == sum(len(pieces[number]) for number in (0, 1, 3, 4))
    assert len(tokenized.compared) == 5
    assert tokenized.contaminated == [[1 + len(encode(pieces[0])) + len(encode(pieces[1])), 0]]


def test_another_decontamination_does_not_resume(tmp_path, planted, monkeypatch, capsys):
    arguments, decontaminate, *_ = planted
    interrupt_before_the_shards(tmp_path / "out", [*arguments, *decontaminate, "--workers", "1"], monkeypatch)
    before = contents(tmp_path / "out")
    message = error_of(capsys, tmp_path / "out", arguments)
    assert "with other options (decontamination {'benchmark': 'hellaswag'" in message
    assert "there, {} now)" in message
    message = error_of(capsys, tmp_path / "out", arguments, *decontaminate, "--drop_contaminated")
    assert "(decontamination {'drop': False} there, {'drop': True} now)" in message
    shorter = tmp_path / "shorter.jsonl"
    examples = Path(decontaminate[-1]).read_text().splitlines()
    shorter.write_text("\n".join(examples[:-1]))
    message = error_of(capsys, tmp_path / "out", arguments, *decontaminate[:-1], shorter)
    assert "items_sha256" in message
    assert contents(tmp_path / "out") == before
    shorter.write_text("\n".join(examples))  # the same examples in another place are the same
    prepare(tmp_path / "out", arguments, *decontaminate[:-1], shorter)


def test_what_cannot_work_ends_in_one_sentence(tmp_path, planted, capsys, monkeypatch):
    arguments, decontaminate, *_ = planted
    out = tmp_path / "out"
    assert "decontaminate (mmlu) must be one of hellaswag." in error_of(
        capsys, out, arguments, "--decontaminate", "mmlu"
    )
    message = error_of(capsys, out, arguments, "--drop_contaminated")
    assert "drop_contaminated (True) is for --decontaminate only: add that, or leave it out." in message
    assert "--decontaminate only" in error_of(capsys, out, arguments, "--hellaswag", "official")
    assert "use --drop_contaminated." in error_of(capsys, out, arguments, *decontaminate, "--drop")
    assert "there is no file gone.jsonl" in error_of(capsys, out, arguments, *decontaminate[:-1], "gone.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"ind": 1}')
    bad = error_of(capsys, out, arguments, *decontaminate[:-1], tmp_path / "bad.jsonl")
    assert "bad.jsonl, line 1: activity_label" in bad
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("modeling_gpt2repro.evaluation.hellaswag.official.cached_assets_path", lambda *_: tmp_path)
    assert "HF_HUB_OFFLINE is set" in error_of(capsys, out, arguments, *decontaminate[:-1], "official")
    assert not (out / "manifest.json").exists()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, planted):
    """A folder prepared with --decontaminate, and one without."""
    arguments, decontaminate, *_ = planted
    folder = tmp_path_factory.mktemp("prepared")
    prepare(folder / "compared", arguments, *decontaminate)
    prepare(folder / "plain", arguments)
    return folder / "compared", folder / "plain"


def test_a_push_of_a_folder_that_was_prepared_otherwise_is_refused(planted, prepared, capsys):
    arguments, decontaminate, *_ = planted
    push = ["--push_to_hub", "--hub_dataset_id", "owner/name"]
    wanted = "was prepared with other --decontaminate and --drop_contaminated: leave them out to push it as it is."
    compared, plain = prepared
    assert error_of(capsys, plain, arguments, *decontaminate, *push).endswith(wanted)
    assert error_of(capsys, compared, arguments, *decontaminate, "--drop_contaminated", *push).endswith(wanted)


@pytest.mark.parametrize(
    "change",
    [{"documents": -1}, {"items": "many"}, {"drop": "<b>"}, {"benchmark": "[x](http://x)"}, {"benchmark": []}],
)
def test_a_manifest_with_other_counts_is_refused(tmp_path, prepared, change, one_sentence):
    manifest = json.loads((prepared[0] / "manifest.json").read_text())
    manifest["contamination"].update(change)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"manifest\.json is damaged \(contamination is") as error:
        read_manifest(tmp_path)
    one_sentence(error)


def test_the_cards_of_tokens_and_model_say_what_was_found(tmp_path, prepared):
    compared, plain = (open_shards(folder) for folder in prepared)
    config = BatchConfig(16, 4, 2, 0, 0, 1)
    data = build_shuffled_data(compared, config, 100)
    assert "share 13 words in a row" in data.contamination
    assert build_shuffled_data(plain, config, 100).contamination is None
    mix = {str(folder): 0.5 for folder in prepared}
    assert build_mixed_data(mix, config, 100).contamination is None  # half of the data was not compared
    assert f"| contamination | {plain_text(data.contamination)} |" in dataset_card(compared.manifest, "owner/name", {})
    assert "contamination" not in dataset_card(plain.manifest, "owner/name", {})
    hardware = {"device": "CPU", "processes": 1, "precision": "no"}
    arguments = asdict(TrainArguments())
    write_run_config(tmp_path, arguments, hardware, {}, data.data_fingerprint, contamination=data.contamination)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "tokens": 0}\n')
    assert training_lines(read_run(tmp_path))["contamination"] == plain_text(data.contamination)
