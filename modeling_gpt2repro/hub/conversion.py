"""Convert GPT-2 checkpoints between transformers' GPT2LMHeadModel and our model.

    python -m modeling_gpt2repro.hub.conversion --from openai-community/gpt2 --to gpt2-ours
    python -m modeling_gpt2repro.hub.conversion --from runs/gpt2-124m/model --to gpt2-stock

The direction follows from the source. The first command writes a folder for our model; the second one a folder that
`AutoModelForCausalLM` loads as `GPT2LMHeadModel` without remote code, and so does any other tool that knows GPT-2. Both
models have the same parameters under the same names and compute the same function; only the matrices inside the blocks
are transposed, because OpenAI's code stores them (in, out), as Conv1D does, and nn.Linear stores them (out, in).
"""

import argparse
import math
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging

from modeling_gpt2repro.configuration_gpt2repro import GPT2ReproConfig
from modeling_gpt2repro.data.tokenizer import load_auto_tokenizer, save_tokenizer
from modeling_gpt2repro.evaluation.load_model import (
    NO_SUCH_FOLDER,
    check_parameter_count,
    check_tied_weights,
    is_missing_folder,
    run_folder_problem,
)
from modeling_gpt2repro.modeling_gpt2repro import TRANSPOSED_IN_STOCK, GPT2ReproForCausalLM
from modeling_gpt2repro.runtime.command_line import end
from modeling_gpt2repro.storage.model_files import (
    check_is_no_adapter,
    check_json_files,
    find_file,
    find_weights,
    loading_problem,
)

from .export import save_hub_folder
from .model_card import derived_origin

SHARED_FIELDS = (
    "vocab_size",
    "n_positions",
    "n_embd",
    "n_layer",
    "n_head",
    "layer_norm_epsilon",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Options of GPT2Config that change what the model computes -> the values that our model implements.
SUPPORTED_OPTIONS = {
    "activation_function": ("gelu_pytorch_tanh", "gelu_new"),  # one function: fused, and in several operations
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
MODEL_CLASSES = {"gpt2": GPT2LMHeadModel, "gpt2repro": GPT2ReproForCausalLM}  # by `model_type`
# What is read of a config.json; the rest is dropout, which is off, and what no GPT-2 of ours follows.
OUR_FIELDS = (*SHARED_FIELDS, "position_initializer_range", "tie_word_embeddings")
HF_FIELDS = (*SHARED_FIELDS, *SUPPORTED_OPTIONS, "n_inner")
FLOATS = ("layer_norm_epsilon", "initializer_range", "position_initializer_range")
MISSING_CONFIG = "it has no config.json, or the Hub has no such model or cannot be reached"
# What our model does and GPT2Config's defaults do not.
OUR_OPTIONS = {"activation_function": "gelu_pytorch_tanh", "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m modeling_gpt2repro.hub.conversion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", required=True, help="A folder or a Hub id of either kind of GPT-2.")
    parser.add_argument(
        "--to",
        dest="target",
        type=lambda path: Path(path).expanduser(),
        required=True,
        help="A folder that does not exist yet.",
    )
    parser.add_argument("--revision", help="Branch, tag or commit of a Hub id.")
    args = parser.parse_args(argv)
    try:
        converted = convert_folder(args.source, args.target, args.revision)
    except (OSError, ValueError) as error:
        end(error)
    print(f"{args.target} holds a {type(converted).__name__} with {converted.num_parameters():,} parameters.")


def convert_folder(source: str, target: Path, revision: str | None = None) -> PreTrainedModel:
    """Convert `source` (folder or Hub id) to the other kind, with tokenizer and generation config, and write `target`.

    Raises:
        ValueError: If `target` exists, or `source` cannot be loaded (see `load_gpt2_or_hf`).
    """
    if target.exists():
        raise ValueError(f"{target} exists already: give another --to.")
    model, tokenizer = load_gpt2_or_hf(source, revision)
    converted = from_hf_gpt2(model) if isinstance(model, GPT2LMHeadModel) else to_hf_gpt2(model)
    origin = derived_origin("Converted from", source, revision)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent) as temporary:  # renamed when complete, so `target` is never half written
        complete = Path(temporary) / "complete"
        save_hub_folder(
            converted,
            tokenizer,
            complete,
            origin=origin,
            generation_config=model.generation_config,
        )
        save_tokenizer(tokenizer, complete, max_length=converted.config.n_positions)  # again, to see that it is read
        complete.rename(target)
    return converted


def load_gpt2(source: str) -> tuple[GPT2ReproForCausalLM, PreTrainedTokenizerFast]:
    """Load either kind of GPT-2 as our model, with its tokenizer; raises as `load_gpt2_or_hf`."""
    model, tokenizer = load_gpt2_or_hf(source)
    return from_hf_gpt2(model) if isinstance(model, GPT2LMHeadModel) else model, tokenizer


def load_gpt2_or_hf(
    source: str, revision: str | None = None
) -> tuple[GPT2LMHeadModel | GPT2ReproForCausalLM, PreTrainedTokenizerFast]:
    """Load either kind of GPT-2 from a folder or a Hub id, with its tokenizer.

    Raises:
        ValueError: If it cannot be read, is another kind of model, computes something that our model does not, lacks
            tensors (with their names), or has no tokenizer or one of another size.
    """
    config = load_gpt2_config(source, revision)
    if isinstance(config, GPT2Config):
        convert_config(config)  # raises before the weights are downloaded
    tokenizer = load_matching_tokenizer(source, revision, config)
    return load_strict(config, source, revision), tokenizer


def load_checkpoint_config(folder: Path) -> GPT2ReproConfig:
    """Read the config in a checkpoint of ours; raises ValueError as `load_gpt2_config`."""
    config = load_gpt2_config(str(folder))
    if isinstance(config, GPT2Config):
        raise ValueError(f"{folder} holds a GPT-2 of transformers and no checkpoint: start from it with --init_from.")
    return config


def load_checkpoint(folder: Path) -> GPT2ReproForCausalLM:
    """Load the model in a checkpoint of ours, from safetensors only; raises ValueError as `load_gpt2_or_hf`."""
    return load_strict(load_checkpoint_config(folder), str(folder), pickled=False)


def load_gpt2_config(source: str, revision: str | None = None) -> GPT2Config | GPT2ReproConfig:
    """Read what matters to a GPT-2 from the config.json of a folder or Hub id, and nothing else.

    A config.json may also name code to run, attention kernels to download, a quantization, or weights of another name;
    transformers would follow it.

    Raises:
        ValueError: If a JSON file of the model is damaged, or config.json is that of another kind of model, lacks a
            valid shape, or the model is an adapter.
    """
    try:
        if is_missing_folder(source):
            raise ValueError(NO_SUCH_FOLDER)
        check_is_no_adapter(source, revision)
        if find_file(source, "config.json", revision) is None:
            raise ValueError(MISSING_CONFIG)
        values = check_json_files(source, revision)
        kind = str(values.get("model_type"))
        if kind not in MODEL_CLASSES:
            raise ValueError(f"it is a {kind[:40]!r} model: give one of type 'gpt2' or 'gpt2repro'.")
        if values.get("quantization_config"):
            raise ValueError("its weights are quantized: give one in 16 or 32 bits.")
        config_class = MODEL_CLASSES[kind].config_class
        values = {config_class.attribute_map.get(name, name): value for name, value in values.items()}
        ours = GPT2ReproConfig(**{name: values[name] for name in OUR_FIELDS if name in values})  # checks each field
        for name in FLOATS:
            if not 0 <= getattr(ours, name) < math.inf:
                raise ValueError(f"its config.json has {name} {getattr(ours, name)}: give a finite number.")
        if config_class is GPT2ReproConfig:
            return ours
        return GPT2Config(**{name: values[name] for name in HF_FIELDS if name in values})
    except Exception as error:  # of a config class, over a value of another type
        reason = f"{source} cannot be read as a model: {loading_problem(error)}."
        raise ValueError(run_folder_problem(source) or reason) from error


def load_strict(
    config: GPT2Config | GPT2ReproConfig, source: str, revision: str | None = None, pickled: bool = True
) -> PreTrainedModel:
    """Load a model whose file has exactly its tensors: `from_pretrained` would fill in missing ones with random values.

    Args:
        pickled: Whether pytorch_model.bin is read where there are no safetensors, without the code in it.

    Raises:
        ValueError: With the names of the tensors that are missing, unknown, of another shape, or not tied as the
            config says; or if a file is missing or damaged.
    """
    model_class = MODEL_CLASSES[config.model_type]
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # transformers would print a table of what the ValueError says
    try:
        weights = find_weights(source, revision, pickled)
        blocks = 12 * config.n_layer * config.n_embd**2  # without biases and LayerNorms
        check_parameter_count(blocks + (config.vocab_size + config.n_positions) * config.n_embd, weights)
        model, loaded = model_class.from_pretrained(
            source,
            revision=revision,
            config=config,
            attn_implementation="sdpa",
            use_safetensors=weights[0].suffix == ".safetensors",
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # whatever a library raises over a damaged file
        raise ValueError(f"{source} has weights that cannot be read: {loading_problem(error)}.") from error
    finally:
        logging.set_verbosity(verbosity)
    problems = {
        "missing": loaded["missing_keys"],
        "unknown": loaded["unexpected_keys"],
        "of another shape": {str(name) for name, *_ in loaded["mismatched_keys"]},
    }
    messages = [f"{problem}: {', '.join(sorted(names))}" for problem, names in problems.items() if names]
    if messages:
        raise ValueError(
            f"{source} does not hold the {model_class.__name__} that its config describes; {'; '.join(messages)}."
        )
    check_tied_weights(model, source)
    return model


def load_matching_tokenizer(source: str, revision: str | None, config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """Load the tokenizer saved with a model.

    Raises:
        ValueError: If there is none, it is not a fast one, or its size differs from the model's vocabulary.
    """
    try:
        tokenizer = load_auto_tokenizer(source, revision)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise ValueError(
            f"{source} has no tokenizer that can be loaded ({reason}): save the model's tokenizer there."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{source} has a slow tokenizer, {type(tokenizer).__name__}: save it as tokenizer.json there.")
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"{source} has a tokenizer of {len(tokenizer)} ids and a model of {config.vocab_size}: save the tokenizer "
            "there that the model was trained with."
        )
    return tokenizer


def convert_config(config: PreTrainedConfig) -> GPT2ReproConfig:
    """Convert a GPT2Config to ours: the shape and the token ids; our model has no dropout.

    Raises:
        ValueError: If the GPT-2 computes something that our model does not.
    """
    unsupported = [
        f"{name} is {getattr(config, name)} and not {' or '.join(map(str, values))}"
        for name, values in SUPPORTED_OPTIONS.items()
        if getattr(config, name) not in values
    ]
    if config.n_inner not in (None, 4 * config.n_embd):
        unsupported.append(f"n_inner is {config.n_inner} and not {4 * config.n_embd}, 4 * n_embd")
    if unsupported:
        raise ValueError(f"this GPT-2 has options that our model does not support: {'; '.join(unsupported)}.")
    return GPT2ReproConfig(**{name: getattr(config, name) for name in SHARED_FIELDS})


def from_hf_gpt2(hf_model: GPT2LMHeadModel) -> GPT2ReproForCausalLM:
    """Convert a GPT-2 of transformers to our model, in the same dtype.

    In fp32 the logits are equal up to rounding. With `gelu_new`, which computes GELU in several operations, that is a
    few millionths of the largest logit (tests/hub/test_conversion.py).
    """
    model = GPT2ReproForCausalLM(convert_config(hf_model.config)).to(hf_model.dtype)
    return copy_weights(hf_model, model)


def to_hf_gpt2(model: GPT2ReproForCausalLM) -> GPT2LMHeadModel:
    """Convert our model to a GPT-2 of transformers, in the same dtype; in fp32 the logits are equal up to rounding."""
    fields = {name: getattr(model.config, name) for name in SHARED_FIELDS}
    fields["n_ctx"] = model.config.n_positions  # its old name, which llama.cpp and mlx-lm still read
    hf_model = GPT2LMHeadModel(GPT2Config(**fields, **OUR_OPTIONS)).to(model.dtype)
    return copy_weights(model, hf_model)


def copy_weights(source: PreTrainedModel, target: PreTrainedModel) -> PreTrainedModel:
    """Copy all weights into a model of the other kind, with the matrices of the blocks transposed; returns `target`.

    Raises:
        ValueError: If the output head is not tied to the embeddings: the other kind has no place for it.
    """
    if source.lm_head.weight is not source.transformer.wte.weight:
        raise ValueError(
            "lm_head.weight is not transformer.wte.weight: this GPT-2 has an untied output head, our model a tied one."
        )
    weights = {
        name: weight.t() if name.endswith(TRANSPOSED_IN_STOCK) else weight
        for name, weight in source.state_dict().items()
    }
    target.load_state_dict(weights)  # strict: raises unless every name and every shape matches
    return target.eval()


if __name__ == "__main__":
    main()
