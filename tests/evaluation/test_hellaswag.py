"""HellaSwag's scores: both protocols against a reference that scores one ending at a time."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer

from modeling_gpt2repro.evaluation.hellaswag.examples import PROTOCOLS, Example, load_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.metrics import evaluate_hellaswag, summarize_by_protocol
from modeling_gpt2repro.evaluation.hellaswag.prefix_sharing import group_by_prefix
from modeling_gpt2repro.evaluation.hellaswag.score import score_hellaswag, score_task, without_autocast
from modeling_gpt2repro.evaluation.hellaswag.tokenize import default_batch_tokens, prepare_hellaswag, tokenize_example

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
N_POSITIONS = 64  # of `make_model`
KINDS = ("ours", "stock")


@pytest.fixture(params=KINDS)
def model(request, hellaswag_tokenizer, make_model):
    return make_model(request.param, len(hellaswag_tokenizer))


def reference(model, tokenizer, example, protocol):
    """An example's sums and lengths, each ending alone, from the protocol's definition."""

    def ids(text):
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def clean(text):
        text = text.strip().replace(" [title]", ". ")
        while "[" in text and "]" in text[text.index("[") :]:
            before, rest = text.split("[", 1)
            text = before + rest.split("]", 1)[1]
        return text.replace("  ", " ")

    sums = []
    lengths = []
    for ending in example.endings:
        if protocol == "completion":
            context = ids(example.ctx)
            continuation = ids(" " + ending)
        else:
            ending = clean(ending)
            query = clean(example.activity_label + ": " + example.ctx_a + " " + example.ctx_b.capitalize())
            spaces = query[len(query.rstrip()) :]
            context = ids(query.rstrip())
            continuation = ids(query.rstrip() + (spaces + " " + ending))[len(context) :]
        kept = (context + continuation)[-(model.config.n_positions + 1) :]
        continuation = continuation[-(len(kept) - 1) :]
        with torch.no_grad():
            logits = model(torch.tensor([kept[:-1]])).logits[0]
        log_probs = logits[len(kept) - 1 - len(continuation) :].log_softmax(-1)
        sums.append(sum(log_probs[t, token].item() for t, token in enumerate(continuation)))
        lengths.append(len(continuation) if protocol == "completion" else len(ending))
    return sums, lengths


def assert_equals_reference(model, tokenizer, examples):
    results = score_hellaswag(model, tokenizer, examples, batch_tokens=600)
    assert [(result.index, result.protocol) for result in results] == [
        (i, p) for i in range(len(examples)) for p in PROTOCOLS
    ]
    for result in results:
        sums, lengths = reference(model, tokenizer, examples[result.index], result.protocol)
        assert result.log_likelihoods == pytest.approx(sums, abs=1e-4, rel=1e-6)
        assert list(result.lengths) == lengths
        norms = [a / b if b else -math.inf for a, b in zip(sums, lengths, strict=True)]
        assert result.correct == (max(range(4), key=sums.__getitem__) == result.label)
        assert result.correct_norm == (max(range(4), key=norms.__getitem__) == result.label)


def test_scores_equal_a_reference_that_takes_one_ending_at_a_time(model, hellaswag_tokenizer, hellaswag_rows):
    assert_equals_reference(model, hellaswag_tokenizer, hellaswag_rows)


@pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs ../shared/data: real HellaSwag rows and GPT-2's tokenizer")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_real_examples_equal_the_reference(kind, make_model):
    tokenizer = AutoTokenizer.from_pretrained(REAL_DATA / "gpt2_tokenizer")
    examples = load_hellaswag(str(REAL_DATA / "hellaswag_val_1000.jsonl"), limit=24)
    assert_equals_reference(make_model(kind, len(tokenizer), n_positions=128), tokenizer, examples)


def test_a_literal_end_of_text_is_text(hellaswag_tokenizer, hellaswag_rows):
    assert hellaswag_tokenizer.eos_token_id in hellaswag_tokenizer(hellaswag_rows[4].ctx)["input_ids"]
    for protocol in PROTOCOLS:
        assert all(
            hellaswag_tokenizer.eos_token_id not in continuation.tokens
            for continuation in tokenize_example(hellaswag_rows[4], protocol, hellaswag_tokenizer)
        )


def test_an_ending_without_a_token_to_score_is_refused(hellaswag_tokenizer):
    # The space before the ending is the only token.
    example = Example(24, "Roof work", "", "", "", ("", "x", "y", "z"), 1)
    with pytest.raises(ValueError, match="example 24: the ending '' after '' has no token to score"):
        tokenize_example(example, "completion", hellaswag_tokenizer)


@pytest.mark.parametrize("batch_tokens", [1, 200, 10**6])
def test_the_batch_size_changes_no_score_and_is_respected(model, hellaswag_tokenizer, batch_tokens, hellaswag_rows):
    shapes = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: shapes.append(kw["input_ids"].shape), with_kwargs=True)
    results = score_hellaswag(model, hellaswag_tokenizer, hellaswag_rows, batch_tokens=batch_tokens)
    hook.remove()
    for result in results:
        sums, _ = reference(model, hellaswag_tokenizer, hellaswag_rows[result.index], result.protocol)
        assert result.log_likelihoods == pytest.approx(sums, abs=1e-4, rel=1e-6)
    assert all(size == 1 or size * length <= batch_tokens for size, length in shapes)
    # Four endings share their context, but for those that are cut at different places on the left.
    requests = 10 + 16  # prefix groups, single endings
    assert sum(size for size, _ in shapes) == requests
    assert len(shapes) == {1: requests, 10**6: 1}.get(batch_tokens, len(shapes))


def test_a_prefix_group_shares_what_its_sequences_have_in_common():
    group = group_by_prefix([[5, 6, 7, 8], [5, 6, 9]], [1, 1])
    assert (group.context, group.endings, group.num_inputs) == ([5, 6], [[7, 8], [9]], 3)
    # Scored tokens are no context, even where all endings begin alike.
    assert group_by_prefix([[5, 6, 7], [5, 6, 8]], [2, 2]).context == [5]
    assert group_by_prefix([[5, 6], [4, 6]], [1, 1]).context == []


def test_a_model_without_prefix_sharing_is_scored_ending_by_ending(
    model, hellaswag_tokenizer, hellaswag_rows, monkeypatch
):
    together = score_hellaswag(model, hellaswag_tokenizer, hellaswag_rows)
    shapes = []
    hook = model.register_forward_pre_hook(lambda _, __, kw: shapes.append(kw["input_ids"].shape), with_kwargs=True)
    monkeypatch.setattr("modeling_gpt2repro.evaluation.hellaswag.tokenize.supports_prefix_sharing", lambda model: False)
    apart = score_hellaswag(model, hellaswag_tokenizer, hellaswag_rows)
    hook.remove()
    assert sum(size for size, _ in shapes) == len(hellaswag_rows) * len(PROTOCOLS) * 4
    for one, other in zip(apart, together, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4, rel=1e-6)


@pytest.mark.parametrize("num_processes", [3, 11])
def test_processes_together_score_what_one_does(hellaswag_tokenizer, num_processes, hellaswag_rows, make_model):
    model = make_model("ours", len(hellaswag_tokenizer))
    alone = score_hellaswag(model, hellaswag_tokenizer, hellaswag_rows)
    tasks = [
        prepare_hellaswag(model, hellaswag_tokenizer, hellaswag_rows, process_index=index, num_processes=num_processes)
        for index in range(num_processes)
    ]
    shares = [score_task(model, task) for task in tasks]
    union = sorted((result for share in shares for result in share), key=lambda result: result.index)
    assert [(r.index, r.protocol, r.label, r.lengths) for r in union] == [
        (r.index, r.protocol, r.label, r.lengths) for r in alone
    ]
    for one, other in zip(union, alone, strict=True):
        assert one.log_likelihoods == pytest.approx(other.log_likelihoods, abs=1e-4, rel=1e-6)
    summaries = summarize_by_protocol(union)
    assert summaries == summarize_by_protocol(alone)
    assert summaries["lm-eval"]["rows"] == len(hellaswag_rows)


def test_progress_reports_every_example_once(hellaswag_tokenizer, hellaswag_rows, make_model):
    reported = []
    model = make_model("ours", len(hellaswag_tokenizer))
    results = score_hellaswag(
        model, hellaswag_tokenizer, hellaswag_rows, ("lm-eval",), 100, on_progress=reported.append
    )
    assert len(reported) > 1
    assert sorted((result for part in reported for result in part), key=lambda result: result.index) == results


def test_dropout_is_off_while_scoring_and_the_mode_comes_back(hellaswag_tokenizer, hellaswag_rows, make_model):
    model = make_model("stock", len(hellaswag_tokenizer))
    expected = score_hellaswag(model, hellaswag_tokenizer, hellaswag_rows)
    assert score_hellaswag(model.train(), hellaswag_tokenizer, hellaswag_rows) == expected
    assert model.training


class Bigrams(torch.nn.Module):
    """A model of another kind: no config, logits from a table, in bfloat16."""

    def __init__(self, vocab_size):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(vocab_size, vocab_size, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.table.to(torch.bfloat16)[input_ids])


def test_log_probabilities_of_bf16_logits_are_taken_in_fp32(hellaswag_tokenizer, hellaswag_rows):
    model = Bigrams(len(hellaswag_tokenizer))
    table = model.table.detach().to(torch.bfloat16).double().log_softmax(-1)
    (result,) = score_hellaswag(model, hellaswag_tokenizer, hellaswag_rows[:1], ("completion",))
    for continuation, total in zip(
        tokenize_example(hellaswag_rows[0], "completion", hellaswag_tokenizer), result.log_likelihoods, strict=True
    ):
        pairs = list(zip(continuation.tokens, continuation.tokens[1:], strict=False))[-continuation.num_scored :]
        assert total == pytest.approx(sum(table[a, b].item() for a, b in pairs), abs=1e-4)


def test_examples_are_tokenized_once_and_scored_as_often_as_wanted(hellaswag_tokenizer, hellaswag_rows, make_model):
    model = make_model("ours", len(hellaswag_tokenizer))
    texts = []

    class CountingTokenizer:
        def __call__(self, batch, **options):
            texts.extend(batch)
            return hellaswag_tokenizer(batch, **options)

        def __len__(self):
            return len(hellaswag_tokenizer)

    task = prepare_hellaswag(model, CountingTokenizer(), hellaswag_rows)
    assert len(texts) == len(hellaswag_rows) * len(PROTOCOLS) * 5
    assert score_task(model, task) == score_hellaswag(model, hellaswag_tokenizer, hellaswag_rows)
    with torch.no_grad():
        model.transformer.wpe.weight.mul_(3)  # as training changes weights
    assert score_task(model, task) == score_hellaswag(model, hellaswag_tokenizer, hellaswag_rows)
    assert len(texts) == len(hellaswag_rows) * len(PROTOCOLS) * 5
    assert task.batch_tokens == 512  # on a CPU


def test_a_batch_fills_an_accelerator_but_not_its_memory_with_logits():
    cpu, *accelerators = map(torch.device, ("cpu", "cuda", "mps"))
    assert default_batch_tokens(cpu, 256_000) == 512
    for device in accelerators:
        assert default_batch_tokens(device, 2_048) == 16_384
        for vocab_size in (50_257, 256_000):
            logits_bytes = default_batch_tokens(device, vocab_size) * vocab_size * 4  # fp32
            assert 1.9e9 < logits_bytes <= 2e9


@pytest.mark.parametrize("trained_with", ["eager", "flash_attention_2"])
def test_fp32_weights_are_scored_by_sdpa_whatever_they_are_trained_with(make_model, trained_with):
    model = make_model("ours", 97)
    model.config._attn_implementation = trained_with
    with without_autocast(model):
        assert model.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == trained_with
    with without_autocast(model.bfloat16()):
        assert model.config._attn_implementation == trained_with


def test_a_model_under_autocast_is_scored_in_its_weights_own_precision(make_model, hellaswag_tokenizer, hellaswag_rows):
    AcceleratorState._reset_state(reset_partial_state=True)  # other tests have made one without mixed precision
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    plain = make_model("ours", len(hellaswag_tokenizer))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = plain(ids).logits
        prepared = accelerator.prepare_model(plain, evaluation_mode=True)
        assert not torch.equal(prepared(ids).logits, expected)
        with without_autocast(prepared):
            assert torch.equal(prepared(ids).logits, expected)
        assert not torch.equal(prepared(ids).logits, expected)
    task = prepare_hellaswag(prepared, hellaswag_tokenizer, hellaswag_rows)
    numbers, scores = evaluate_hellaswag(prepared, task)
    AcceleratorState._reset_state(reset_partial_state=True)
    results = score_hellaswag(make_model("ours", len(hellaswag_tokenizer)), hellaswag_tokenizer, hellaswag_rows)
    assert scores == results
    assert numbers.pop("hellaswag_seconds") > 0
    expected = {}
    for protocol, summary in summarize_by_protocol(results).items():
        for name in ("acc", "acc_norm"):
            full_name = f"hellaswag_{protocol.replace('-', '_')}_{name}"
            low, high = summary[f"{name}_interval"]
            expected |= {full_name: summary[name], f"{full_name}_low": low, f"{full_name}_high": high}
    assert numbers == expected
