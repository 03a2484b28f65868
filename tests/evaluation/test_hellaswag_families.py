"""Models of other families, tokenizers of other kinds: the same scores as one ending at a time."""

import pytest
import torch
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_gpt2repro.evaluation.hellaswag.examples import PROTOCOLS
from modeling_gpt2repro.evaluation.hellaswag.prefix_sharing import PREFIX_SHARING_FAMILIES, supports_prefix_sharing
from modeling_gpt2repro.evaluation.hellaswag.score import score_hellaswag
from modeling_gpt2repro.evaluation.hellaswag.tokenize import tokenize_example

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.3}
NAMES_OF_OPENAI = {"n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
FAMILIES = {family: SHAPE | {"intermediate_size": 64} for family in PREFIX_SHARING_FAMILIES} | {
    "gpt2repro": NAMES_OF_OPENAI,
    "gpt2": NAMES_OF_OPENAI,
    "gpt_bigcode": NAMES_OF_OPENAI,
    "gptj": NAMES_OF_OPENAI | {"rotary_dim": 4},
    "codegen": NAMES_OF_OPENAI | {"rotary_dim": 4},
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "init_std": 0.3}
    | {"word_embed_proj_dim": 32},
    "gemma": SHAPE | {"intermediate_size": 64, "head_dim": 8},
    "qwen3": SHAPE | {"intermediate_size": 64, "head_dim": 8},
}
for family in ("llama", "qwen2", "qwen3", "gemma", "olmo2", "granite", "mixtral", "smollm3", "stablelm"):
    FAMILIES[family] = FAMILIES[family] | {"num_key_value_heads": 2}
OTHERS = {  # a sliding window, local attention by place, a convolution, ALiBi, no 4-dimensional mask
    "mistral": SHAPE | {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 16},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 16}
    | {"attention_types": [[["global", "local"], 1]], "initializer_range": 0.3},
    "lfm2": SHAPE | {"intermediate_size": 64, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
    "falcon": SHAPE | {"alibi": True},
    "openai-gpt": NAMES_OF_OPENAI,
}


def built(family, tokenizer, **more):
    torch.manual_seed(0)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": len(tokenizer)}
    if family == "gpt2repro":
        del special["pad_token_id"]
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **special, **more)).eval()


def one_at_a_time(model, tokenizer, example, protocol):
    totals = []
    for continuation in tokenize_example(example, protocol, tokenizer, model.config.max_position_embeddings):
        tokens = torch.tensor(list(continuation.tokens))
        with torch.no_grad():
            log_probs = model(tokens[None, :-1]).logits[0].float().log_softmax(-1)
        totals.append(log_probs[range(len(tokens) - 1), tokens[1:]][-continuation.num_scored :].sum().item())
    return totals


@pytest.mark.parametrize(("family", "shape"), [*FAMILIES.items(), *OTHERS.items()], ids=[*FAMILIES, *OTHERS])
def test_scores_of_a_family_equal_one_ending_at_a_time(family, shape, hellaswag_tokenizer, hellaswag_rows):
    model = built(family, hellaswag_tokenizer, **shape)
    assert supports_prefix_sharing(model) == (family in PREFIX_SHARING_FAMILIES)
    examples = hellaswag_rows[:5]
    for result in score_hellaswag(model, hellaswag_tokenizer, examples):
        expected = one_at_a_time(model, hellaswag_tokenizer, examples[result.index], result.protocol)
        assert result.log_likelihoods == pytest.approx(expected, abs=1e-3)


def test_an_attention_without_4_dimensional_masks_shares_no_prefixes(make_model):
    model = make_model("stock", 97)
    assert supports_prefix_sharing(model)
    model.config._attn_implementation = "flash_attention_2"
    assert not supports_prefix_sharing(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probabilities_of_a_prefix_group_are_taken_in_fp32(dtype, make_model, hellaswag_tokenizer, hellaswag_rows):
    model = make_model("stock", len(hellaswag_tokenizer)).to(dtype)
    model.set_attn_implementation("eager")
    for result in score_hellaswag(model, hellaswag_tokenizer, hellaswag_rows[:1]):
        expected = one_at_a_time(model, hellaswag_tokenizer, hellaswag_rows[0], result.protocol)
        assert result.log_likelihoods == pytest.approx(expected, rel=1e-4)


def test_a_start_of_text_belongs_to_lm_eval_alone(hellaswag_tokenizer, hellaswag_rows):
    plain = {p: tokenize_example(hellaswag_rows[0], p, hellaswag_tokenizer) for p in PROTOCOLS}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=hellaswag_tokenizer.backend_tokenizer, bos_token="<|endoftext|>"
    )
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    tokenizer.backend_tokenizer.post_processor = template
    with_start = {p: tokenize_example(hellaswag_rows[0], p, tokenizer) for p in PROTOCOLS}
    assert with_start["completion"] == plain["completion"]
    for one, other in zip(with_start["lm-eval"], plain["lm-eval"], strict=True):
        assert list(one.tokens) == [0, *other.tokens]
        assert one[1:] == other[1:]


def test_a_sliding_window_shares_no_prefixes(hellaswag_tokenizer):
    shape = FAMILIES["mixtral"]
    assert supports_prefix_sharing(built("mixtral", hellaswag_tokenizer, **shape))
    assert not supports_prefix_sharing(built("mixtral", hellaswag_tokenizer, **shape, sliding_window=16))
