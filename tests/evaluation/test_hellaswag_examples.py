"""HellaSwag's examples: their wording in both protocols, and the checks of the files that hold them."""

import json
from dataclasses import asdict

import pytest

from modeling_gpt2repro.evaluation.hellaswag.examples import Example, example_texts, load_hellaswag

EXAMPLE = Example(
    24,
    "Roof work",
    "A man is sitting on a roof.",
    "he",
    "A man is sitting on a roof. he",
    ("wraps skis.", "rips tiles off.", "holds a cube.", "pulls it up."),
    1,
)
GOOD = asdict(EXAMPLE)


def test_the_wording_of_a_wikihow_example(hellaswag_rows):
    assert example_texts(hellaswag_rows[2], "completion") == (
        "[header] How to roof [title] Sit. [step] Pull a  tile.",
        ["[title] Sit down.", "Up. [substeps] Off.", "[step]", "Sit."],
    )
    # A period replaces [title]; a tag leaves two spaces, which become one; ctx_b is capitalized.
    assert example_texts(hellaswag_rows[2], "lm-eval") == (
        "Roof work: How to roof. Sit. Pull a tile.",
        [" Sit down.", "Up. Off.", "", "Sit."],
    )
    assert example_texts(hellaswag_rows[1], "lm-eval")[0] == "Roof work: The roof is old. The men"


def test_the_examples_of_a_file_are_read_in_order(tmp_path, hellaswag_rows):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(asdict(row)) + "\n" for row in hellaswag_rows), encoding="utf-8")
    path = str(file)
    assert load_hellaswag(path) == hellaswag_rows
    assert load_hellaswag(path, limit=2) == hellaswag_rows[:2]
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())  # a byte-order mark, as Windows writes it
    assert load_hellaswag(path) == hellaswag_rows
    with pytest.raises(ValueError, match=r"limit \(0\) must be at least 1"):
        load_hellaswag(path, limit=0)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (json.dumps({k: v for k, v in GOOD.items() if k not in ("ctx_b", "label")}), "ctx_b, label missing"),
        (json.dumps(GOOD | {"endings": ["a", "b", "c"]}), "found 3 endings; there must be a list of 4"),
        (json.dumps(GOOD | {"endings": "abcd"}), "found endings 'abcd'; there must be a list of 4"),
        (json.dumps(GOOD | {"endings": ["a", "b", "c", 4]}), r"endings\[3\] is 4; it must be text"),
        (json.dumps(GOOD | {"ctx": None}), "ctx is None; it must be text"),
        (json.dumps(GOOD | {"ctx_a": "\ud83d"}), r"ctx_a is '\\ud83d'; it must be text in UTF-8"),
        (json.dumps(GOOD | {"label": 4}), "label is 4; it must be 0, 1, 2 or 3"),
        (json.dumps(GOOD | {"label": True}), "label is True; it must be 0, 1, 2 or 3"),
        (json.dumps(GOOD | {"label": ""}), "label is ''; it must be 0, 1, 2 or 3. The test split has no labels"),
        (json.dumps([GOOD]), "not an object with the fields ind,"),
        (json.dumps(GOOD)[:50], "is not JSON"),
        ("[" * 100_000, "is nested too deeply"),
        (json.dumps(GOOD).encode() + b"\xff", "byte 0xff at column .* is not UTF-8"),
    ],
)
def test_a_malformed_example_is_refused_with_its_line(tmp_path, line, sentence):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, line 3: .*{sentence}"):
        load_hellaswag(str(path))
    assert load_hellaswag(str(path), limit=1) == [EXAMPLE]


def test_a_source_without_examples_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty.jsonl has no examples"):
        load_hellaswag(str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="is a folder: give the jsonl file in it"):
        load_hellaswag(str(tmp_path))
    for name in ("data/hellaswag_val.jsonl", "hellaswag", "../rows/x", str(tmp_path / "none")):
        with pytest.raises(FileNotFoundError, match=f"there is no file {name}: give a local jsonl"):
            load_hellaswag(name)
