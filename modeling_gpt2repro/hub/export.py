"""Hub folders: everything that `from_pretrained` and `pipeline` need, in one place."""

import shutil
from pathlib import Path

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from .model_card import FROM_SCRATCH, LOSS_PICTURE, model_card


def save_hub_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    origin: str = FROM_SCRATCH,
    run_folder: Path | None = None,
    generation_config: GenerationConfig | None = None,
):
    """Write weights, config, generation config, tokenizer, a card and, for ours, both code files into `folder`.

    Args:
        model: Ours, or a stock GPT-2.
        origin: The card's first sentence.
        run_folder: The run whose numbers the card tells and whose picture of the loss lies beside it.
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
    for weights in folder.glob("*.safetensors"):  # which are written for their owner alone, whatever the umask
        shutil.copymode(folder / "config.json", weights)
    save_tokenizer(tokenizer, folder)
    if run_folder and (run_folder / LOSS_PICTURE).is_file():
        shutil.copyfile(run_folder / LOSS_PICTURE, folder / LOSS_PICTURE)
    (folder / "README.md").write_text(model_card(model, origin, run_folder), encoding="utf-8")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path):
    """Write a tokenizer; what the system refuses is an OSError, which tokenizers tells by its text only."""
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is Exception and "os error" in str(error):
            raise OSError(str(error)) from error
        raise
