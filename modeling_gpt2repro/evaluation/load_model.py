"""Opening what an evaluation is given: any causal language model, by folder or by name, its device, its output file."""

import os

import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load_causal_lm(
    name: str, dtype: str = "float32", device: str | torch.device = "cpu", trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model on its device, in evaluation mode, and its tokenizer.

    Args:
        name: A folder or a model on the Hub.
        dtype: Of the weights: "float32", "bfloat16" or "float16".

    Raises:
        ValueError: If either cannot be loaded, weights are missing, or the two do not belong together.
    """
    # Given even where False: without it a repository with code of its own asks at the terminal and waits.
    options = {"trust_remote_code": trust_remote_code}
    part = "tokenizer"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        part = "model"
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=getattr(torch, dtype), output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError, KeyError, TypeError) as error:
        if isinstance(error.__cause__, (LocalEntryNotFoundError, RepositoryNotFoundError)):
            raise ValueError(
                f"--model {name}: there is no folder {name} here, and the Hub has no such model or cannot be reached "
                f"({first_line(error).rstrip('.')})."
            ) from error
        raise ValueError(f"--model {name}: its {part} could not be loaded: {first_line(error)}") from error
    if loading["missing_keys"]:
        missing = sorted(loading["missing_keys"])
        raise ValueError(
            f"--model {name}: {len(missing)} of its weights are missing ({missing[0]}, ...) and would be random; "
            "give a complete checkpoint of a causal language model."
        )
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, its embedding {vocabulary}: they do not "
            "belong together."
        )
    return model.to(device), tokenizer


def max_context(model: nn.Module) -> int | None:
    """Tokens that the model reads at most; None where no config sets a limit."""
    return getattr(getattr(model, "config", None), "max_position_embeddings", None)


def best_device() -> str:
    """The first there is of cuda, mps and cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def device_problem(device: str) -> str | None:
    """Why this device cannot be used, in a sentence."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        known = device.partition(":")[0] in ("cuda", "mps", "cpu")
        reason = first_line(error) if known else "it is none of cuda, cuda:1, mps and cpu"
        return f"--device {device} cannot be used here ({reason}); leave it out or say cpu."


def model_problem(name: str) -> str | None:
    """What is wrong with the name of a model, as far as it is seen without the network, in a sentence."""
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            if os.path.isfile(os.path.join(name, "model", "config.json")):
                return f"--model {name} is the folder of a run: give {os.path.join(name, 'model')}."
            return f"--model {name} has no config.json: give a folder that save_pretrained has written."
    elif os.path.exists(name):
        return f"--model {name} is a file: give the folder it is in."
    elif name.startswith(("/", ".", "~")) or name.count("/") > 1 or not name:
        return f"--model {name}: there is no such folder, and a model on the Hub is named owner/name."


def output_problem(path: str) -> str | None:
    """Why no file can be written at this path, in a sentence."""
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path):
        return f"--output {path} is a folder: give the name of a file in it."
    if not os.path.isdir(folder):
        return f"--output {path}: there is no folder {folder}; make it first."
    if not os.access(folder, os.W_OK):
        return f"--output {path}: the folder {folder} cannot be written to."


def first_line(error: BaseException) -> str:
    """Of its message; with its kind where the message is a bare key, its kind where there is none."""
    if isinstance(error, KeyError):
        return f"{type(error).__name__}: {error}"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
