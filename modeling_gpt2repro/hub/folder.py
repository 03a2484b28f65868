"""Hub folders: everything that `from_pretrained` and `pipeline` need, in one place."""

from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..modeling_gpt2repro import GPT2ReproForCausalLM

CARD = """---
library_name: transformers
pipeline_tag: text-generation
{license}tags:
- gpt2
- gpt2repro
---
# GPT-2, {parameters:,} parameters

{origin} {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, context {config.n_positions}, vocabulary
{config.vocab_size}.

```python
from transformers import pipeline

folder = "."  # where this folder lies, or its name on the Hub
generator = pipeline("text-generation", model=folder{trust})
print(generator("Hello, I'm a language model,", max_new_tokens=30)[0]["generated_text"])
```
"""
FROM_SCRATCH = "A GPT-2 trained from scratch."


def origin_of(init_from: str | None) -> str:
    """A card's first sentence: where the weights come from; of a folder the name alone."""
    if not init_from:
        return FROM_SCRATCH
    return f"A GPT-2 trained on from {Path(init_from).name if Path(init_from).exists() else init_from}."


def save_hub_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    origin: str = FROM_SCRATCH,
    generation_config: GenerationConfig | None = None,
):
    """Write weights, config, generation config, tokenizer, a card and, for ours, both code files into `folder`.

    Args:
        model: Ours, or a stock GPT-2.
        origin: The card's first sentence.
        generation_config: How the model generates where nothing else is said; greedy if it is not given.

    Raises:
        ValueError: If the tokenizer's ids do not fit the model's vocabulary.
    """
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids, the model {model.config.vocab_size}: they do not belong together."
        )
    model.generation_config = generation_config or GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.eos_token_id,
    )
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    card = CARD.format(
        license="license: mit\n" if origin == FROM_SCRATCH else "",
        parameters=model.num_parameters(),
        origin=origin,
        config=model.config,
        trust=", trust_remote_code=True" if isinstance(model, GPT2ReproForCausalLM) else "",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path):
    """Write a tokenizer; what the system refuses is an OSError, which tokenizers tells by its text only."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception and "os error" in str(error):
            raise OSError(str(error)) from error
        raise
