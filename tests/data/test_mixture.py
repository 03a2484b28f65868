"""Several folders in fixed proportions."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_gpt2repro.data.batches.build import build_mixed_data
from modeling_gpt2repro.data.batches.mixture import (
    PERIOD,
    MixedBatches,
    load_mixture,
    mixed_validation,
    parse_mix,
    sequences_per_period,
)
from modeling_gpt2repro.data.batches.sequences import TokenSequences
from modeling_gpt2repro.data.batches.shuffled import BatchConfig
from modeling_gpt2repro.data.sources.resolve import local_source
from modeling_gpt2repro.data.tokenize import prepare_shards
from modeling_gpt2repro.data.tokenizer import train_tokenizer


def made_sequences(first: int, count: int) -> TokenSequences:
    """Sequences of ten tokens that begin with `first`, `first` + 10, ..."""
    return TokenSequences([np.arange(first, first + count * 10 + 1, dtype=np.uint16)], 10)


def mixed(process=0, processes=1, micro_batch_size=4, seed=1, shares=(0.7, 0.3)) -> MixedBatches:
    sources = [made_sequences(0, 150), made_sequences(10_000, 40)]
    return MixedBatches(sources, list(shares), BatchConfig(10, 20, micro_batch_size, seed, process, processes), 0)


def firsts(batches: MixedBatches, steps: range) -> list[int]:
    parts = [batch["input_ids"][:, 0] for step in steps for batch in batches.micro_batches(step)]
    return torch.cat(parts).tolist()


def test_the_shares_hold_and_each_folder_has_its_own_epochs():
    seen = firsts(mixed(), range(2 * PERIOD // 20))  # two periods: 1,400 and 600 rows
    a = [n for n in seen if n < 10_000]
    b = [n for n in seen if n >= 10_000]
    assert (len(a), len(b)) == (1400, 600)
    for seen_of_one, epoch in ((a, range(0, 1500, 10)), (b, range(10_000, 10_400, 10))):
        for start in range(0, len(seen_of_one) - len(epoch) + 1, len(epoch)):
            assert Counter(seen_of_one[start : start + len(epoch)]) == Counter(epoch)
    assert 50 < sum(n < 10_000 for n in seen[:100]) < 90  # mixed, not one after the other
    assert seen != firsts(mixed(seed=2), range(2 * PERIOD // 20))


@pytest.mark.parametrize("processes", [2, 4])
def test_the_order_depends_neither_on_processes_nor_on_the_micro_batch(processes):
    parts = [firsts(mixed(p, processes, micro_batch_size=5), range(60)) for p in range(processes)]
    assert [number for together in zip(*parts, strict=True) for number in together] == firsts(mixed(), range(60))


def test_any_step_can_be_reached_directly():
    assert firsts(mixed(), range(57, 63)) == firsts(mixed(), range(63))[57 * 20 :]


def test_a_period_is_shared_out_by_largest_remainders():
    assert sequences_per_period([0.5, 0.25, 0.25]).tolist() == [500, 250, 250]
    assert sequences_per_period([1 / 3, 2 / 3]).tolist() == [333, 667]
    assert parse_mix("a:7, C:\\b:3") == {"a": 0.7, "C:\\b": 0.3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b:1", "'a' has no share"),
        ("a:x", "'a:x' has no share"),
        ("a:0,b:1", "shares greater than 0, not 'a:0'"),
        (":1", "folders and shares greater than 0, not ':1'"),
        ("a/b:0.5,c:0.2,a//b/:0.3", "names a//b/ twice: give it once, with the sum"),
        ("a:1e-9,b:1", "gives a less than one sequence in 1000"),
    ],
)
def test_an_unusable_mix_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_mix(text)


@pytest.fixture(scope="module")
def two_folders(token_shards, tiny_tokenizer, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("mix")
    (folder / "b.jsonl").write_text("".join(f'{{"text": "the sea was cold {n} times over"}}\n' for n in range(300)))
    source = local_source([str(folder / "b.jsonl")])
    prepare_shards(source, tiny_tokenizer, "tiny", folder / "b", validation_share=0.2)
    return token_shards.folder, folder / "b"


def test_folders_are_opened_and_validated_in_their_proportions(two_folders):
    a, b = two_folders
    shares = parse_mix(f"{a}:0.75,{b}:0.25")
    data = build_mixed_data(shares, BatchConfig(16, 8, 4, 1), validation_tokens=800)
    batch = next(data.batches.micro_batches(0))
    assert batch["input_ids"].shape == (4, 16)
    assert data.summary == f"75.0% {a}, 25.0% {b}"
    validation = mixed_validation(load_mixture(shares), [0.75, 0.25], 16, 800)
    assert [len(part) for part in validation.shards] == [617, 217]
    assert (
        data.data_fingerprint
        != build_mixed_data(parse_mix(f"{a}:1,{b}:1"), BatchConfig(16, 8, 4, 1), 800).data_fingerprint
    )


def test_folders_that_do_not_go_together_are_refused(two_folders, tmp_path, tiny_texts):
    a = two_folders[0]
    (tmp_path / "c.txt").write_text("\n\n".join(tiny_texts))
    other = train_tokenizer(tiny_texts, vocab_size=290)
    prepare_shards(local_source([str(tmp_path / "c.txt")]), other, "other", tmp_path / "c", validation_share=0)
    with pytest.raises(ValueError, match="another tokenizer than"):
        load_mixture({str(a): 0.5, str(tmp_path / "c"): 0.5})
    with pytest.raises(ValueError, match="there is no folder"):
        load_mixture({str(a): 0.5, str(tmp_path / "nowhere"): 0.5})
