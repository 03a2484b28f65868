"""Carry weights between stock GPT-2 and ours, whole or not at all.

    python -m modeling_gpt2repro.hub.conversion --from openai-community/gpt2 --to gpt2-ours
    python -m modeling_gpt2repro.hub.conversion --from runs/gpt2-124m/model --to gpt2-stock

The direction follows from what the source is. The first writes a folder of ours; the second one that
`AutoModelForCausalLM` loads as `GPT2LMHeadModel` without remote code, and so does whatever knows GPT-2. Both models
compute the same numbers from the same parameters under the same names; only the blocks' matrices are transposed.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from ..configuration_gpt2repro import GPT2ReproConfig
from ..modeling_gpt2repro import TRANSPOSED_IN_STOCK, GPT2ReproForCausalLM
from .export import save_hub_folder

SHAPE = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
SHARED = (*SHAPE, "layer_norm_epsilon", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
# Options of stock GPT-2 that change what it computes, and the values that ours computes.
SUPPORTED_OPTIONS = {
    "activation_function": ("gelu_pytorch_tanh", "gelu_new"),  # one function, as one kernel and written out
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
AS_TRAINED = {"activation_function": "gelu_pytorch_tanh", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", required=True, help="A folder or a Hub id: stock GPT-2 or ours.")
    parser.add_argument(
        "--to",
        dest="target",
        type=lambda path: Path(path).expanduser(),
        required=True,
        help="A folder that is not there yet.",
    )
    parser.add_argument("--revision", help="Branch, tag or commit of a Hub id.")
    args = parser.parse_args(argv)
    try:
        converted = convert_folder(args.source, args.target, args.revision)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{' '.join(str(error).split())}\n")
    print(f"{args.target} holds a {type(converted).__name__} of {converted.num_parameters():,} parameters.")


def convert_folder(source: str, target: Path, revision: str | None = None) -> PreTrainedModel:
    """Write what is at `source` (folder or Hub id) to `target` as the other kind, tokenizer and settings included.

    Raises:
        ValueError: If `target` is there already, `source` is neither kind of GPT-2 or lacks tensors (with their
            names), or its tokenizer is missing or has other ids than its model.
    """
    if target.exists():
        raise ValueError(f"{target} is there already: give another --to.")
    model, tokenizer = load_gpt2_or_hf(source, revision)
    converted = from_hf_gpt2(model) if isinstance(model, GPT2LMHeadModel) else to_hf_gpt2(model)
    origin = f"Converted from {Path(source).name if Path(source).exists() else source}."
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as aside:
        whole = Path(aside) / "whole"
        save_hub_folder(converted, tokenizer, whole, origin, generation_config=model.generation_config)
        whole.rename(target)
    return converted


def load_gpt2(source: str) -> tuple[GPT2ReproForCausalLM, PreTrainedTokenizerBase]:
    """Load the model at `source`, stock or ours, as ours, and its tokenizer; raises what `load_gpt2_or_hf` does."""
    model, tokenizer = load_gpt2_or_hf(source)
    return from_hf_gpt2(model) if isinstance(model, GPT2LMHeadModel) else model, tokenizer


def load_gpt2_or_hf(
    source: str, revision: str | None = None
) -> tuple[GPT2LMHeadModel | GPT2ReproForCausalLM, PreTrainedTokenizerBase]:
    """Load the model at `source` (a folder or a Hub id), stock or ours, and its tokenizer.

    Raises:
        ValueError: If it cannot be read, is neither, computes something that ours does not, lacks tensors (with their
            names), or has no tokenizer or one with other ids.
    """
    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        if (Path(source) / "adapter_config.json").is_file():
            raise ValueError(f"{source} is an adapter: merge it into its model first, and save that.") from error
        raise ValueError(f"{source} is no model that can be read: {' '.join(str(error).split())}") from error
    classes = {GPT2Config.model_type: GPT2LMHeadModel, GPT2ReproConfig.model_type: GPT2ReproForCausalLM}
    if config.model_type not in classes:
        raise ValueError(f"{source} is a {config.model_type!r} model, neither 'gpt2' nor 'gpt2repro'.")
    if config.model_type == GPT2Config.model_type:
        our_config(config)  # refused before the weights are fetched
    tokenizer = load_its_tokenizer(source, revision, config)
    return load_strict(classes[config.model_type], source, revision), tokenizer


def load_strict(model_class: type[PreTrainedModel], source: str, revision: str | None) -> PreTrainedModel:
    """Load every tensor that the model has, from a file that holds no others.

    Raises:
        ValueError: With the names of the tensors that are missing, too many, or of another shape; or if the file is
            not there or damaged.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # its table of tensors comes back as one sentence
    try:
        model, found = model_class.from_pretrained(
            source, revision=revision, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"{source} has weights that cannot be read: {' '.join(str(error).split())}") from error
    finally:
        logging.set_verbosity(verbosity)
    mismatched = {str(name) for name, *_ in found["mismatched_keys"]}
    problems = {"missing": found["missing_keys"], "unknown": found["unexpected_keys"], "of another shape": mismatched}
    told = [f"{what}: {', '.join(sorted(names))}" for what, names in problems.items() if names]
    if told:
        raise ValueError(f"{source} does not hold a {model_class.__name__} as its config says; {'; '.join(told)}.")
    return model


def load_its_tokenizer(source: str, revision: str | None, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a model.

    Raises:
        ValueError: If there is none, or it has other ids than the model.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{source} has no tokenizer that loads ({error}): save the model's tokenizer there."
        ) from error
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"{source} has a tokenizer of {len(tokenizer)} ids and a model of {config.vocab_size}: save the tokenizer "
            "there that the model was trained with."
        )
    return tokenizer


def our_config(config: PreTrainedConfig) -> GPT2ReproConfig:
    """Our config of a stock model: its shape and token ids; dropout, which only training has, is left out.

    Raises:
        ValueError: If the stock model computes something that ours does not.
    """
    strange = [
        f"{name} is {getattr(config, name)} and not {' or '.join(map(str, values))}"
        for name, values in SUPPORTED_OPTIONS.items()
        if getattr(config, name) not in values
    ]
    if config.n_inner not in (None, 4 * config.n_embd):
        strange.append(f"n_inner is {config.n_inner} and not {4 * config.n_embd}, 4 * n_embd")
    if strange:
        raise ValueError(f"this GPT-2 is of another kind than ours: {'; '.join(strange)}.")
    return GPT2ReproConfig(**{name: getattr(config, name) for name in SHARED})


def from_hf_gpt2(stock: GPT2LMHeadModel) -> GPT2ReproForCausalLM:
    """Our model with the stock model's weights, in their dtype.

    In fp32 the logits are the same up to rounding; with `gelu_new`, GELU in several operations, that is a few
    millionths of the largest one (`tests/hub/test_conversion.py`).

    Raises:
        ValueError: If the stock model computes something that ours does not.
    """
    model = GPT2ReproForCausalLM(our_config(stock.config)).to(stock.dtype)
    return copy_weights(stock, model)


def to_hf_gpt2(model: GPT2ReproForCausalLM) -> GPT2LMHeadModel:
    """A stock model with our weights, in their dtype: in fp32 the logits are the same up to rounding."""
    shared = {name: getattr(model.config, name) for name in SHARED}
    return copy_weights(model, GPT2LMHeadModel(GPT2Config(**shared, **AS_TRAINED)).to(model.dtype))


def copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> PreTrainedModel:
    """Copy all weights from the one kind into the other, the blocks' matrices transposed.

    Raises:
        ValueError: If the head has weights of its own, which the other kind would lose.
    """
    if source.lm_head.weight is not source.transformer.wte.weight:
        raise ValueError("lm_head.weight is not transformer.wte.weight: this GPT-2 is untied, and ours is not.")
    weights = source.state_dict()
    weights = {name: w.t() if name.endswith(TRANSPOSED_IN_STOCK) else w for name, w in weights.items()}
    target.load_state_dict(weights)  # strict: every name, every shape
    return target.eval()


if __name__ == "__main__":
    main()
