"""The flash-attention 2 and 3 paths of transformers, with exact attention in place of the CUDA kernels.

The stand-ins have the kernels' names, signatures and layout (https://github.com/Dao-AILab/flash-attention, files
flash_attn/flash_attn_interface.py and hopper/flash_attn_interface.py), and reject the inputs that the kernels reject.
Everything between the model and them is transformers' own code. Only a GPU can tell whether the kernels agree.
"""

import sys
from types import ModuleType

import pytest
import torch
import toy_runs
from transformers import DataCollatorWithFlattening, modeling_flash_attention_utils

from modeling_gpt2repro.runtime import precision


def exact_attention(q, k, v, softmax_scale, causal):
    """q (T, H, D), k and v (S, H, D) -> (T, H, D); the last query sees the last key, as in the kernels."""
    for x in (q, k, v):
        if x.dtype not in (torch.float16, torch.bfloat16) or x.dtype != q.dtype:
            raise RuntimeError(f"FlashAttention only support fp16 and bf16 data type, not {x.dtype}")
        assert x.ndim == 3
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0
        assert x.shape[-1] <= 256
    assert k.shape == v.shape
    assert q.shape[1:] == k.shape[1:]
    scores = torch.einsum("thd,shd->hts", q.float(), k.float())
    scores = scores * (q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale)
    if causal:
        T, S = scores.shape[1:]
        scores = scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v.float()).to(q.dtype)


def attend_to_batch(q, k, v, softmax_scale, causal):
    """q (B, T, H, D), k and v (B, S, H, D) -> (B, T, H, D)."""
    assert q.ndim == k.ndim == v.ndim == 4
    assert len(q) == len(k) == len(v)
    return torch.stack([exact_attention(*row, softmax_scale, causal) for row in zip(q, k, v, strict=True)])


def attend_to_packed(q, k, v, starts_q, starts_k, longest_q, longest_k, softmax_scale, causal):
    """q, k, v (tokens, H, D), sequences laid end to end -> (tokens, H, D); NaN for tokens outside every sequence."""
    for starts, longest in ((starts_q, longest_q), (starts_k, longest_k)):
        assert starts.dtype == torch.int32
        assert starts.is_contiguous()
        assert starts.diff().max() <= int(longest)
    out = [torch.full_like(q[: starts_q[0]], torch.nan)]
    for i in range(len(starts_q) - 1):
        part_q = slice(starts_q[i], starts_q[i + 1])
        part_k = slice(starts_k[i], starts_k[i + 1])
        out.append(exact_attention(q[part_q], k[part_k], v[part_k], softmax_scale, causal))
    return torch.cat([*out, torch.full_like(q[starts_q[-1] :], torch.nan)])


# fmt: off
def flash_attention_2(calls):
    """The functions of the package flash_attn, 2.x; each call appends the kernel's kind to `calls`."""

    def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
                        alibi_slopes=None, deterministic=False, return_attn_probs=False):
        calls.append("batch")
        assert dropout_p == 0
        return attend_to_batch(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                               softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                               deterministic=False, return_attn_probs=False, block_table=None):
        calls.append("packed")
        assert dropout_p == 0
        return attend_to_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)

    return flash_attn_func, flash_attn_varlen_func


def flash_attention_3(calls):
    """The functions of the package flash_attn_interface; each call appends the kernel's kind to `calls`."""

    def flash_attn_func(q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None,
                        v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1,
                        pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):
        calls.append("batch")
        return attend_to_batch(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,
                               seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None,
                               k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0, softcap=0.0,
                               num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False):
        calls.append("packed")
        return attend_to_packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)

    return flash_attn_func, flash_attn_varlen_func
# fmt: on


def flash_attn_with_kvcache(q, k_cache, v_cache, **options):
    raise NotImplementedError  # used by continuous batching, on GPUs only


@pytest.fixture(params=[flash_attention_2, flash_attention_3], ids=lambda make: make.__name__)
def flash(request, monkeypatch):
    """The name of an attention implementation, and a list to which each kernel call is appended."""
    utils = modeling_flash_attention_utils
    calls = []
    name = request.param.__name__
    package = ModuleType("flash_attn" if name == "flash_attention_2" else "flash_attn_interface")
    package.flash_attn_func, package.flash_attn_varlen_func = request.param(calls)
    package.flash_attn_with_kvcache = flash_attn_with_kvcache
    padding = ModuleType("flash_attn.bert_padding")
    padding.pad_input, padding.unpad_input = utils._pad_input, utils._unpad_input
    for module in (package, padding):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for loaded in [loaded for loaded in vars(utils) if loaded == "_loaded_implementation" or loaded.endswith("_fn")]:
        monkeypatch.setattr(utils, loaded, None)  # so that transformers loads them again, until the test ends
    version = int(name[-1])
    for number in (2, 3, 4):
        available = number == version
        monkeypatch.setattr(utils, f"is_flash_attn_{number}_available", lambda *_, found=available, **__: found)
    here = {"general_availability_check": lambda **_: True, "supported_devices": ((lambda: True, "cpu"),)}
    for check, answer in here.items():
        monkeypatch.setitem(utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX[version], check, answer)
    return name, calls


def eager_and_flash_logits(model, attention, **inputs):
    """Return the logits of eager attention and of `attention`, in fp16."""
    model.half()
    logits = []
    for name in ("eager", attention):
        model.set_attn_implementation(name)
        with torch.no_grad():
            logits.append(model(**inputs).logits)
    return logits


def test_flash_attention_equals_eager(carried, random_ids, flash):
    name, calls = flash
    for ids in (random_ids(3, 20), random_ids(1, 20)):
        eager, fast = eager_and_flash_logits(carried, name, input_ids=ids)
        torch.testing.assert_close(fast, eager, atol=0.02, rtol=0)
        assert eager.std() > 0.5
    assert calls == ["batch"] * 2 * carried.config.n_layer


@pytest.mark.parametrize("side", ["left", "right"])
def test_flash_attention_ignores_padding(carried, random_ids, flash, side):
    name, calls = flash
    ids = random_ids(2, 16)
    mask = torch.ones_like(ids)
    padded = slice(None, 6) if side == "left" else slice(10, None)
    mask[0, padded] = 0
    eager, fast = eager_and_flash_logits(carried, name, input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(fast[mask == 1], eager[mask == 1], atol=0.02, rtol=0)
    assert calls == ["packed"] * carried.config.n_layer


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("batch_size", "positions"),
    [
        pytest.param(1, [[*range(9), *range(7)]], id="one sequence"),
        pytest.param(2, [[*range(9), *range(7)], [*range(3), *range(5), *range(8)]], id="two sequences"),
        pytest.param(2, [[*range(9), *range(7)]], id="same positions for two sequences"),
        pytest.param(1, [[*range(20, 24), *range(12)]], id="starting within a document"),
    ],
)
def test_flash_attention_separates_packed_sequences(carried, random_ids, flash, batch_size, positions, use_cache):
    name, calls = flash
    inputs = {"input_ids": random_ids(batch_size, 16), "position_ids": torch.tensor(positions), "use_cache": use_cache}
    eager, fast = eager_and_flash_logits(carried, name, **inputs)
    torch.testing.assert_close(fast, eager, atol=0.02, rtol=0)
    assert calls == ["packed"] * carried.config.n_layer


def test_flash_attention_uses_the_bounds_that_a_data_collator_found(carried, random_ids, flash):
    name, calls = flash
    examples = [{"input_ids": random_ids(1, 16)[0, part].tolist()} for part in (slice(9), slice(9, 16))]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")(examples)
    eager, fast = eager_and_flash_logits(carried, name, **batch)
    torch.testing.assert_close(fast, eager, atol=0.02, rtol=0)
    assert calls == ["packed"] * carried.config.n_layer
    # The given bounds win: by positions without a restart alone, this would be a single sequence.
    batch["position_ids"] = torch.arange(16)[None]
    _, fast = eager_and_flash_logits(carried, name, **batch)
    second = {key: batch[key][:, 9:] for key in ("input_ids", "position_ids")}
    torch.testing.assert_close(fast[:, 9:], eager_and_flash_logits(carried, name, **second)[0], atol=0.02, rtol=0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_flash_attention_generates_from_padded_prompts(carried, random_ids, flash, cache):
    name, calls = flash
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    options = {"attention_mask": mask, "cache_implementation": cache, "max_new_tokens": 6, "pad_token_id": 0}
    # Each next token is prescribed: rounding would otherwise decide between equally likely ones.
    options["prefix_allowed_tokens_fn"] = lambda index, so_far: [50 + len(so_far) + index]
    carried.half()
    steps = []
    for attention in ("eager", name):
        carried.set_attn_implementation(attention)
        text = carried.generate(ids, do_sample=False, return_dict_in_generate=True, output_logits=True, **options)
        steps.append(torch.stack(text.logits))
    assert steps[0].shape == (6, 2, 97)
    torch.testing.assert_close(steps[1], steps[0], atol=0.02, rtol=0)
    assert len(calls) == carried.config.n_layer * 6


def test_flash_attention_accepts_several_tokens_after_a_cache(carried, random_ids, flash):
    ids = random_ids(2, 20)
    carried.half()
    carried.set_attn_implementation("eager")
    whole = carried(ids, use_cache=False).logits
    carried.set_attn_implementation(flash[0])
    first = carried(ids[:, :12], use_cache=True)
    second = carried(ids[:, 12:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, atol=0.02, rtol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_flash_attention_trains_fp32_weights_in_mixed_precision(carried, random_ids, flash, checkpointing):
    name, calls = flash
    ids = random_ids(2, 21)
    inputs = {"input_ids": ids[:, :-1], "shift_labels": ids[:, 1:], "num_items_in_batch": 40, "use_cache": False}
    gradients = []
    carried.train()
    if checkpointing:
        carried.gradient_checkpointing_enable()
    for attention in ("eager", name):
        carried.set_attn_implementation(attention)
        carried.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = carried(**inputs).loss
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in carried.named_parameters()})
    assert calls == ["batch"] * carried.config.n_layer * (1 + checkpointing)
    for name, eager in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], eager, atol=0.05 * eager.abs().max().item(), rtol=0, msg=name)


def test_flash_attention_compiles_to_one_graph_for_a_batch_of_one(carried, random_ids, flash):
    ids = random_ids(1, 20)
    carried.half()
    carried.set_attn_implementation("eager")
    eager = carried(ids, use_cache=False).logits
    carried.set_attn_implementation(flash[0])
    compiled = torch.compile(carried, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, eager, atol=0.02, rtol=0)


def test_training_with_flash_attention_logs_what_sdpa_logs(shards, flash, tmp_path, monkeypatch):
    """Mixed precision, because the kernels take 16 bits only; HellaSwag is scored in fp32 with sdpa."""
    name, calls = flash
    monkeypatch.setitem(toy_runs.CPU_FP32, "ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setattr(precision, "cpu_lacks_bf16", lambda: False)
    runs = {}
    for attention in ("sdpa", name):
        runs[attention] = tmp_path / attention
        given = {"attn_implementation": attention, "train_tokens": 3 * 256, "eval_steps": 2, "eval_tokens": 320}
        assert toy_runs.train_here(runs[attention], shards, **given, num_samples=1) == 0
        assert ("batch" in calls) == (attention == name)
    for number, most in (("loss", 0.01), ("validation_loss", 0.01), ("hellaswag_lm_eval_acc_norm", 1 / 7)):
        first, second = (toy_runs.logged_values(folder, number) for folder in runs.values())
        assert len(first) == 3
        assert second == pytest.approx(first, abs=most)
