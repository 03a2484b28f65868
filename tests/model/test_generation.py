"""Text from the model: token for token what stock GPT-2 gives, by every way that transformers generates."""

import copy

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig, set_seed

GREEDY = {"do_sample": False, "max_new_tokens": 20, "pad_token_id": 0}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="greedy"),
        pytest.param({"num_beams": 3}, id="beams"),
        pytest.param({"do_sample": True, "top_k": 50}, id="top-k"),
        pytest.param({"do_sample": True, "top_p": 0.9, "temperature": 1.3, "num_return_sequences": 3}, id="top-p"),
        pytest.param({"cache_implementation": "static"}, id="static-cache"),
        pytest.param({"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}, id="penalties"),
        pytest.param({"use_cache": False}, id="no-cache"),
    ],
)
def test_text_equals_that_of_stock_gpt2(stock, carried, random_ids, options):
    ids, mask = random_ids(2, 8), torch.ones(2, 8).long()
    texts = []
    for model in (carried, stock):
        set_seed(5)
        texts.append(model.generate(ids, attention_mask=mask, **{**GREEDY, **options}).tolist())
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[0]}) == len(texts[0])


def test_prompts_padded_into_a_batch_go_on_as_each_would_alone(carried, random_ids):
    long, short = random_ids(1, 9), random_ids(1, 9)[:, 4:]
    alone = [carried.generate(ids, **GREEDY)[0, ids.shape[1] :].tolist() for ids in (long, short)]
    ids = torch.cat([long, torch.cat([torch.zeros(1, 4).long(), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for cache in ("dynamic", "static"):
        together = carried.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY)[:, 9:]
        assert together.tolist() == alone, cache


def test_assisted_text_is_the_greedy_text(carried, random_ids):
    ids = random_ids(1, 8)
    expected = carried.generate(ids, **GREEDY).tolist()
    assistant = copy.deepcopy(carried)
    assistant.transformer.h = assistant.transformer.h[:2]  # so that it is wrong at times
    assistant.config.n_layer = 2
    assert assistant.generate(ids, **GREEDY).tolist() != expected
    assert carried.generate(ids, assistant_model=assistant, **GREEDY).tolist() == expected
    assert carried.generate(ids, prompt_lookup_num_tokens=3, **GREEDY).tolist() == expected


def test_continuous_batching_gives_the_greedy_text(carried, random_ids):
    prompts = [random_ids(1, 8)[0].tolist(), random_ids(1, 5)[0].tolist()]
    options = {**GREEDY, "max_new_tokens": 6, "eos_token_id": -1}
    expected = [carried.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    memory = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else it takes most of what there is
    found = carried.generate_batch(prompts, GenerationConfig(**options), memory, warmup=False)
    assert [found[name].generated_tokens for name in sorted(found)] == expected


def test_no_id_beyond_the_vocabulary_is_sampled(tiny_model, random_ids):
    ids = random_ids(64, 4)
    set_seed(0)
    sampled = tiny_model.generate(ids, do_sample=True, top_k=0, max_new_tokens=40, min_new_tokens=40, pad_token_id=0)
    assert tiny_model(ids).logits.shape[-1] == tiny_model.config.vocab_size
    assert sampled.max() == tiny_model.config.vocab_size - 1  # the last one is; nothing lies beyond it


@pytest.mark.slow
def test_compiled_text_is_the_greedy_text(carried, random_ids):
    ids = random_ids(2, 8)
    expected = carried.generate(ids, **GREEDY).tolist()
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True  # else transformers compiles on GPUs only
    options = {**GREEDY, "cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert carried.generate(ids, **options).tolist() == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
