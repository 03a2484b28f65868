"""Hub folders: everything that `from_pretrained` and `pipeline` need, in one place."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..modeling_gpt2repro import GPT2ReproForCausalLM

CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: mit
tags:
- gpt2
- gpt2repro
---
# GPT-2, {parameters:,} parameters

A GPT-2 trained from scratch ({config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context
{config.n_positions}, vocabulary {config.vocab_size}).

```python
from transformers import pipeline

folder = "."  # where this folder lies, or its name on the Hub
generator = pipeline("text-generation", model=folder, trust_remote_code=True)
print(generator("Hello, I'm a language model,", max_new_tokens=30)[0]["generated_text"])
```
"""


def save_hub_folder(model: GPT2ReproForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path):
    """Write weights, config, generation config, both code files, tokenizer and a card into `folder`.

    Raises:
        ValueError: If the tokenizer's ids do not fit the model's vocabulary.
    """
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, the model {model.config.vocab_size}: they do not belong together."
        )
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.eos_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = CARD.format(parameters=model.num_parameters(), config=model.config)
    (folder / "README.md").write_text(card, encoding="utf-8")
