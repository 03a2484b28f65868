"""The model with transformers' Trainer, PEFT, gradient checkpointing, torch.compile and torch.export."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from patience import PATIENCE_SECONDS
from torch import nn
from transformers import Trainer, TrainingArguments

from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

ROOT = Path(__file__).resolve().parents[2]
RECIPE = {
    "max_steps": 6,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "optim": "adamw_torch",
    "seed": 3,
    "data_seed": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


class PaddedSequences(torch.utils.data.Dataset):
    """24 sequences of 5 to 16 tokens, padded, with -100 in the labels: their losses have unequal weights."""

    def __init__(self, ids: torch.Tensor):
        self.examples = []
        for number, sequence in enumerate(ids):
            length = 5 + number % 12
            mask = (torch.arange(len(sequence)) < length).long()
            labels = sequence.masked_fill(mask == 0, -100)
            self.examples.append({"input_ids": sequence, "attention_mask": mask, "labels": labels})

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, number):
        return self.examples[number]


def make_trainer(folder, ids, **overrides) -> Trainer:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 97}
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=0, eos_token_id=0))
    args = TrainingArguments(output_dir=str(folder), **{**RECIPE, **overrides})
    return Trainer(model=model, args=args, train_dataset=PaddedSequences(ids), eval_dataset=PaddedSequences(ids[:4]))


def logged_losses(trainer: Trainer) -> list[float]:
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def test_trainer_accumulation_equals_one_large_batch_and_learns(tmp_path, random_ids):
    ids = random_ids(1, 16).expand(24, -1)  # one sequence at different lengths: learnable in six steps
    whole = make_trainer(tmp_path / "whole", ids, per_device_train_batch_size=4)
    whole.train()
    parts = make_trainer(tmp_path / "parts", ids, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    parts.train()
    assert logged_losses(whole) == pytest.approx(logged_losses(parts), abs=1e-4)
    assert logged_losses(whole)[-1] < logged_losses(whole)[0] - 0.5
    # Logits, not weights: the bias of the keys has no effect, so its gradient is rounding noise that Adam scales up.
    torch.testing.assert_close(whole.model(ids).logits, parts.model(ids).logits, atol=1e-3, rtol=0)
    batch = next(iter(whole.get_eval_dataloader()))
    assert whole.evaluate()["eval_loss"] == pytest.approx(whole.model(**batch).loss.item(), abs=1e-4)


def test_trainer_resume_equals_an_uninterrupted_run(tmp_path, random_ids):
    ids = random_ids(24, 16)
    whole = make_trainer(tmp_path / "whole", ids, per_device_train_batch_size=4)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    make_trainer(tmp_path / "parts", ids, max_steps=3, **saving).train()
    resumed = make_trainer(tmp_path / "parts", ids, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name
    reloaded = GPT2ReproForCausalLM.from_pretrained(tmp_path / "parts" / "checkpoint-6")
    assert torch.equal(reloaded.lm_head.weight, resumed.model.lm_head.weight)
    assert reloaded.lm_head.weight is reloaded.transformer.wte.weight


def test_trainer_shifts_labels_before_smoothing(tmp_path, random_ids):
    trainer = make_trainer(tmp_path, random_ids(24, 16), label_smoothing_factor=0.1)
    batch = {"input_ids": random_ids(2, 16), "labels": random_ids(2, 16)}
    batch["labels"][1, 9:] = -100
    logits = trainer.model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    targets = batch["labels"][:, 1:].flatten()
    expected = nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected)


def test_trainer_pushes_a_model_that_loads_without_our_package(hub, warm_python, tiny_tokenizer, tmp_path):
    train = """
import sys, torch
from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
output_dir, tokenizer = sys.argv[1:]
shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 300}
model = GPT2ReproForCausalLM(GPT2ReproConfig(**shape, bos_token_id=0, eos_token_id=0))
examples = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 300, (8, 32))]
args = TrainingArguments(output_dir, max_steps=2, save_steps=2, report_to="none", use_cpu=True, push_to_hub=True)
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
trainer = Trainer(model, args, default_data_collator, train_dataset=examples, processing_class=tokenizer)
trainer.train()
trainer.push_to_hub()
"""
    load = """
import sys
sys.path = [path for path in sys.path if path.rstrip("/\\\\") != sys.argv[1]]  # not by prefix: a .venv may be inside it
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in str(finder).lower()]
from transformers import pipeline
talk = pipeline("text-generation", model="user/trained", trust_remote_code=True)
assert type(talk.model).__module__.startswith("transformers_modules")
print(talk("the sea", max_new_tokens=5, min_new_tokens=5, do_sample=False)[0]["generated_text"])
"""
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    warm_python.run("-c", train, tmp_path / "trained", tmp_path / "tokenizer", HF_TOKEN=hub.token)
    result = subprocess.run(
        [sys.executable, "-I", "-c", load, str(ROOT)],
        env={**hub.environment(tmp_path / "home"), "HF_TOKEN": hub.token},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("the sea")
    pushed = {path.name for path in (hub.root / "models" / "user" / "trained").iterdir()}
    assert {"README.md", "configuration_gpt2repro.py", "modeling_gpt2repro.py", "tokenizer.json"} <= pushed
    assert torch.equal(
        GPT2ReproForCausalLM.from_pretrained(hub.root / "models" / "user" / "trained").lm_head.weight,
        GPT2ReproForCausalLM.from_pretrained(tmp_path / "trained").lm_head.weight,
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(carried, random_ids, use_reentrant):
    ids = random_ids(2, 20)
    calls = []
    gradients = []
    for block in carried.transformer.h:
        block.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for enabled in (False, True):
        carried.train()
        if enabled:
            carried.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        carried.zero_grad()
        carried(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in carried.parameters()])
    assert len(calls) == 3 * carried.config.n_layer  # once without; with it, again in the backward pass
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="peft is not installed")
def test_lora_trains_only_its_adapter_and_reloads(carried, random_ids, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    ids = random_ids(2, 20)
    before = carried(ids).logits.detach()
    frozen = {name: parameter.clone() for name, parameter in carried.named_parameters()}
    model = get_peft_model(carried, LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    torch.testing.assert_close(model(ids).logits, before)  # a new adapter adds zero
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path)
    adapted = model(ids).logits.detach()
    bare = GPT2ReproForCausalLM(carried.config).eval()
    bare.load_state_dict(frozen | {"lm_head.weight": frozen["transformer.wte.weight"]})
    torch.testing.assert_close(bare(ids).logits, before)  # the base weights did not change
    loaded = PeftModel.from_pretrained(bare, tmp_path)
    torch.testing.assert_close(loaded(ids).logits, adapted)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, adapted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("packed", [False, True])
def test_model_compiles_to_one_graph_forward_and_backward(carried, random_ids, packed):
    ids = random_ids(2, 20)
    inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
    if packed:
        # A packed sequence may be longer than the context if none of its parts is.
        inputs["input_ids"] = inputs["labels"] = random_ids(2, 100)
        inputs["position_ids"] = torch.tensor([[*range(40), *range(60)], [*range(64), *range(36)]])
    carried(**inputs).loss.backward()
    expected = [parameter.grad.clone() for parameter in carried.parameters()]
    carried.zero_grad()
    compiled = torch.compile(carried.train(), fullgraph=True, backend="aot_eager")
    compiled(**inputs).loss.backward()
    for parameter, gradient in zip(carried.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_loss_equals_eager_loss(carried, random_ids):
    ids = random_ids(2, 20)
    expected = carried(ids, labels=ids).loss
    compiled = torch.compile(carried.train(), fullgraph=True)
    loss = compiled(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strict", [True, False])
def test_export_supports_any_batch_size_and_length(carried, random_ids, strict):
    sizes = {0: torch.export.Dim("B", min=1, max=16), 1: torch.export.Dim("T", min=2, max=carried.config.n_positions)}
    options = {"input_ids": random_ids(2, 12), "use_cache": False}
    dynamic = {"input_ids": sizes, "use_cache": None}
    exported = torch.export.export(carried, (), options, dynamic_shapes=dynamic, strict=strict).module()
    for shape in ((5, 33), (1, 2), (3, carried.config.n_positions)):
        ids = random_ids(*shape)
        logits = exported(input_ids=ids, use_cache=False).logits
        torch.testing.assert_close(logits, carried(ids).logits, atol=1e-5, rtol=0)
