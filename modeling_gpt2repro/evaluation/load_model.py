"""Load any causal language model by folder or Hub name, and check a command's --model, --device and --output."""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from modeling_gpt2repro.data.tokenizer import load_auto_tokenizer
from modeling_gpt2repro.runs.folder import RUN_CONFIG_FILE, model_of_run
from modeling_gpt2repro.storage.model_files import (
    NEEDS_CODE,
    LoadingError,
    check_is_no_adapter,
    find_weights,
    loading_problem,
)
from modeling_gpt2repro.storage.retry import describe_error, exception_chain

NO_SUCH_FOLDER = "there is no such folder, and a model on the Hub is named owner/name"


def load_causal_lm(
    name: str,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    flag: str = "--model",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model, from a folder or the Hub, in eval mode on its device, and its tokenizer.

    Unless `trust_remote_code`, none of its code runs, and no attention kernel that its config.json names is downloaded.

    Args:
        flag: Where the name was given, for the messages.

    Raises:
        ValueError: If either cannot be loaded, weights are missing or not tied as the config says, or the tokenizer has
            more tokens than the model.
    """
    loading = "tokenizer"
    try:
        check_is_no_adapter(name)
        tokenizer = load_auto_tokenizer(name, trust_remote_code=trust_remote_code)
        loading = "model"
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        options = {"config": config, "trust_remote_code": trust_remote_code}
        if not trust_remote_code:
            config._attn_implementation = None  # the default, and not what config.json says
            with torch.device("meta"):
                described = AutoModelForCausalLM.from_config(**options)
            check_parameter_count(described.num_parameters(), find_weights(name), bits=1)
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), output_loading_info=True, **options
        )
    except Exception as error:  # whatever a library raises over a damaged file
        reason = loading_problem(error)
        if any(isinstance(each, LocalEntryNotFoundError | RepositoryNotFoundError) for each in exception_chain(error)):
            raise ValueError(
                f"{flag} {name}: there is no folder {name} here, and the Hub has no such model or cannot be reached "
                f"({reason})."
            ) from error
        if reason == NEEDS_CODE:
            reason += ": give --trust_remote_code if you have read that code"
        raise ValueError(f"{flag} {name}: its {loading} could not be loaded: {reason}.") from error
    if loading_info["missing_keys"]:
        missing = sorted(loading_info["missing_keys"])
        raise ValueError(
            f"{flag} {name}: {len(missing)} of its weights are missing ({missing[0]}, ...) and would be random; "
            "give a complete checkpoint of a causal language model."
        )
    check_tied_weights(model, f"{flag} {name}")
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"{flag} {name}: its tokenizer has {len(tokenizer)} tokens, its embedding only {vocab_size}: give the "
            "tokenizer that it was trained with."
        )
    return model.to(device), tokenizer


def check_parameter_count(parameters: int, weights: Iterable[Path], bits: int = 8):
    """Raise LoadingError if a config describes more parameters than its weights can hold.

    The missing ones would be allocated and filled with random numbers, before anything is reported: a config of a few
    bytes could take all memory.

    Args:
        bits: Of a parameter, at least. A byte is the smallest type of torch; quantized models pack several into one.
    """
    available = sum(path.stat().st_size for path in weights)
    if parameters * bits > available * 8:
        raise LoadingError(f"its config describes {parameters:,} parameters, and its weights have {available:,} bytes")


def check_tied_weights(model: PreTrainedModel, source: str):
    """Raise ValueError, with the names, if tensors that the config says are one (tied) were loaded as two.

    Merging an adapter can leave such a folder. transformers 5 keeps both tensors, and 4 drops one, without an error.

    Args:
        source: What the message calls the model.
    """
    for name, tied_to in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        if model.get_parameter_or_buffer(name) is not model.get_parameter_or_buffer(tied_to):
            raise ValueError(
                f"{source}: {name} and {tied_to} differ, but its config says that they are one tensor "
                f"(tie_word_embeddings): remove {name} from its weights to tie them again."
            )


def max_context(model: nn.Module) -> int | None:
    """Most tokens that the model can read; None if its config sets no limit."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def best_device() -> str:
    """The first available one of cuda, mps and cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_problem(device: str) -> str | None:
    """Why this device cannot be used, as a sentence; None if it can."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        known = device.partition(":")[0] in ("cuda", "mps", "cpu")
        reason = describe_error(error) if known else "it is none of cuda, cuda:1, mps and cpu"
        return f"--device {device} cannot be used here ({reason}); leave it out or give cpu."


def model_problem(name: str, flag: str = "--model") -> str | None:
    """What is wrong with the name of a model, as far as can be seen without the network; None if nothing is."""
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            if problem := run_folder_problem(name):
                return f"{flag} {problem}"
            return f"{flag} {name} has no config.json: give a folder that save_pretrained has written."
    elif os.path.exists(name):
        return f"{flag} {name} is a file: give the folder it is in."
    elif is_missing_folder(name):
        return f"{flag} {name}: {NO_SUCH_FOLDER}."


def is_missing_folder(name: str) -> bool:
    """Whether a name can only be that of a folder, and there is none."""
    looks_like_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name
    return looks_like_path and not os.path.exists(name)


def run_folder_problem(name: str) -> str | None:
    """A sentence that names the model's folder, if `name` is the folder of a run; else None."""
    if folder := model_of_run(name):
        return f"{name} is the folder of a run: give {folder}."
    if os.path.isfile(os.path.join(name, RUN_CONFIG_FILE)):
        return f"{name} is the folder of a run that has saved no model yet: wait for its first checkpoint."


def find_model(name: str) -> str:
    """The folder of a model or its Hub id as it is; for the folder of a run, that of its model."""
    is_model = os.path.isfile(os.path.join(name, "config.json"))
    return name if is_model else str(model_of_run(name) or name)


def output_problem(path: str) -> str | None:
    """Why no file can be written at this path, as a sentence; None if one can."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        return f"--output {path} is a folder: give the name of a file in it."
    if not os.path.isdir(folder):
        return f"--output {path}: there is no folder {folder}; make it first."
    if not os.access(folder, os.W_OK):
        return f"--output {path}: the folder {folder} cannot be written to."
