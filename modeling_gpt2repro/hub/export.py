"""Write a Hub folder: everything that `from_pretrained` and `pipeline` need, in one place."""

import shutil
from pathlib import Path

from transformers import GenerationConfig, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from modeling_gpt2repro.data.tokenizer import write_tokenizer
from modeling_gpt2repro.runs.folder import EVAL_RESULTS, LOSS_PICTURE

from .model_card import FROM_SCRATCH, Origin, card_files

PIPELINE_NEW_TOKENS = 256  # what transformers' text-generation pipeline asks for, unless the model's folder says less


def save_hub_folder(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    origin: Origin = FROM_SCRATCH,
    run_folder: Path | None = None,
    generation_config: GenerationConfig | None = None,
):
    """Write weights, configs, tokenizer, model card, public results and, for our model, its two code files.

    Args:
        model: Ours, or a GPT-2 of transformers.
        origin: Where the weights come from, for the card.
        run_folder: A run whose results and loss plot the card shows.
        generation_config: The default is greedy decoding; `set_length_in_short_context` may add a length.

    Raises:
        ValueError: If the tokenizer's size differs from the model's vocabulary, or it gives other ids after saving.
    """
    if len(tokenizer) != model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} ids and the model {model.config.vocab_size}: give the tokenizer that "
            "the model was trained with."
        )
    model.generation_config = generation_config or GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.eos_token_id,
    )
    set_length_in_short_context(model)
    model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # safetensors makes them readable by their owner only
        shutil.copymode(folder / "config.json", weights)
    write_tokenizer(tokenizer, folder, max_length=model.config.n_positions)
    if run_folder and (run_folder / LOSS_PICTURE).is_file():
        shutil.copyfile(run_folder / LOSS_PICTURE, folder / LOSS_PICTURE)
    for stale in folder.glob(EVAL_RESULTS.format("*")):  # of a model that was here before
        stale.unlink()
    for name, text in card_files(model, tokenizer, origin, run_folder).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def set_length_in_short_context(model: PreTrainedModel):
    """Let a call without a length generate half a context, if the pipeline's default is more than that.

    In longer contexts, such as GPT-2's, nothing is set: `max_new_tokens` in the folder overrides the `max_length` of a
    call, and `max_length` in the folder causes a warning whenever `max_new_tokens` is passed.
    """
    given = model.generation_config
    half = max(1, model.config.n_positions // 2)
    if given.max_new_tokens is None and given.max_length is None and half < PIPELINE_NEW_TOKENS:
        given.max_new_tokens = half
    if given.max_new_tokens and isinstance(model, GPT2LMHeadModel):
        # Where the pipeline of transformers 4 looks, as in OpenAI's own config.
        model.config.task_specific_params = {"text-generation": {"max_new_tokens": given.max_new_tokens}}
