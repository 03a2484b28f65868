"""Generated text equals stock GPT-2's token for token, with the decoding methods of transformers."""

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
def test_generated_text_equals_stock_gpt2(stock, carried, random_ids, options):
    ids = random_ids(2, 8)
    mask = torch.ones_like(ids)
    texts = []
    for model in (carried, stock):
        set_seed(5)
        texts.append(model.generate(ids, attention_mask=mask, **{**GREEDY, **options}).tolist())
    assert texts[0] == texts[1]
    assert len({tuple(text) for text in texts[0]}) == len(texts[0])


def test_padded_prompts_generate_what_each_generates_alone(carried, random_ids):
    long = random_ids(1, 9)
    short = long[:, 4:]
    alone = [carried.generate(ids, **GREEDY)[0, ids.shape[1] :].tolist() for ids in (long, short)]
    ids = torch.cat([long, torch.cat([torch.zeros(1, 4).long(), short], 1)])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    for cache in ("dynamic", "static"):
        together = carried.generate(ids, attention_mask=mask, cache_implementation=cache, **GREEDY)[:, 9:]
        assert together.tolist() == alone, cache


def test_assisted_generation_equals_greedy(carried, random_ids):
    ids = random_ids(1, 8)
    expected = carried.generate(ids, **GREEDY).tolist()
    assistant = copy.deepcopy(carried)
    assistant.transformer.h = assistant.transformer.h[:2]  # so that some of its guesses are rejected
    assistant.config.n_layer = 2
    assert assistant.generate(ids, **GREEDY).tolist() != expected
    assert carried.generate(ids, assistant_model=assistant, **GREEDY).tolist() == expected
    assert carried.generate(ids, prompt_lookup_num_tokens=3, **GREEDY).tolist() == expected


def test_continuous_batching_equals_greedy(carried, random_ids):
    prompts = [random_ids(1, 8)[0].tolist(), random_ids(1, 5)[0].tolist()]
    options = {**GREEDY, "max_new_tokens": 6, "eos_token_id": -1}
    expected = [carried.generate(torch.tensor([prompt]), **options)[0, len(prompt) :].tolist() for prompt in prompts]
    memory = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # by default it takes most of the memory
    found = carried.generate_batch(prompts, GenerationConfig(**options), memory, warmup=False)
    assert [found[name].generated_tokens for name in sorted(found)] == expected


def test_sampling_never_leaves_the_vocabulary(tiny_model, random_ids):
    ids = random_ids(64, 4)
    set_seed(0)
    sampled = tiny_model.generate(ids, do_sample=True, top_k=0, max_new_tokens=40, min_new_tokens=40, pad_token_id=0)
    assert tiny_model(ids).logits.shape[-1] == tiny_model.config.vocab_size
    assert sampled.max() == tiny_model.config.vocab_size - 1  # the last id occurs, and none beyond it


@pytest.mark.slow
def test_compiled_generation_equals_greedy(carried, random_ids):
    ids = random_ids(2, 8)
    expected = carried.generate(ids, **GREEDY).tolist()
    compile_config = CompileConfig(fullgraph=True, mode="default")
    compile_config._compile_all_devices = True  # by default transformers compiles on GPUs only
    options = {**GREEDY, "cache_implementation": "static", "compile_config": compile_config}
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert carried.generate(ids, **options).tolist() == expected
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
