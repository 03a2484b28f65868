"""Files of a model that somebody else wrote, in a folder or on the Hub: checked before a library reads them.

The errors begin with "it" or "its", so that the caller can say whose: a flag's, a folder's, a Hub id's.
"""

import os
import re
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from .json_files import read_json_object
from .retry import describe_error, exception_chain

ADAPTER_FILE = "adapter_config.json"
JSON_FILES = (  # those that transformers parses while it loads a model or a tokenizer
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)
TEXT_FILES = ("merges.txt", "chat_template.jinja")  # those that it reads whole, too
MAX_JSON_BYTES = 2**27  # tokenizer.json of 260,000 tokens has 35 MB
# In the order in which transformers looks for them; the second of each pair lists several files.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Sizes in any architecture's config.json. A larger one belongs to no model, and could fill the memory.
SIZE = re.compile(r"(n|num)_\w+|\w+_(size|layers|labels|positions|position_embeddings)")
MAX_SIZE = 2**24
MAX_LAYERS = 10_000
LAYERS = ("n_layer", "n_layers", "num_layers", "num_hidden_layers")
AT_LEAST_ONE = (*LAYERS, "n_head", "num_attention_heads", "n_embd", "hidden_size", "vocab_size")
NEEDS_CODE = "it needs Python code of its own, which is not run"
NO_TOKENIZER = "it has no tokenizer.json, and no other vocabulary that can be read here"
MAX_REASON = 400  # characters of a library's message


class LoadingError(ValueError):
    """Why a model or tokenizer does not load: a line that begins with "it" or "its"."""


def find_file(source: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a folder or Hub id, downloaded if necessary; None if it is missing, or the Hub cannot be reached.

    Raises:
        LoadingError: If it is a folder or a pipe, or the Hub refuses the repository.
    """
    if os.path.isdir(source):
        path = Path(source, name)
        if os.path.lexists(path) and not path.is_file():
            raise LoadingError(f"its {name} is not a file: remove it, or put the file there.")
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, name, revision=revision))
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        raise LoadingError(f"its files cannot be downloaded: {describe_error(error)}") from error


def read_json(path: Path) -> dict:
    """A file that holds one JSON object.

    Raises:
        LoadingError: If it is damaged, too large, or holds something else.
    """
    try:
        return read_json_object(path, any_numbers=True, max_bytes=MAX_JSON_BYTES)
    except (OSError, ValueError) as error:
        raise LoadingError(f"its {path.name} cannot be read ({describe_error(error)}).") from error


def check_json_files(source: str, revision: str | None = None) -> dict:
    """Check every JSON file that a loader will read, and return config.json; {} if there is none.

    Raises:
        LoadingError: If one cannot be parsed, or config.json has a size that no model has.
    """
    config = {}
    for name in JSON_FILES:
        if path := find_file(source, name, revision):
            content = read_json(path)
            config = content if name == "config.json" else config
    for name in TEXT_FILES if os.path.isdir(source) else ():
        if (path := find_file(source, name)) and path.stat().st_size > MAX_JSON_BYTES:
            raise LoadingError(f"its {name} has more than {MAX_JSON_BYTES:,} bytes.")
    check_sizes(config)
    return config


def check_sizes(config: dict):
    """Raise LoadingError if a size in config.json, or in a part of it, is negative or larger than any model's."""
    for name, value in config.items():
        if isinstance(value, dict):
            check_sizes(value)
        least = 1 if name in AT_LEAST_ONE else -1  # of an attention window, for one, -1 means that there is none
        most = MAX_LAYERS if name in LAYERS else MAX_SIZE
        if SIZE.fullmatch(name) and isinstance(value, int | float) and not least <= value <= most:
            raise LoadingError(f"its config.json has {name} {value}, which must be from {least} to {most:,}.")


def check_is_no_adapter(source: str, revision: str | None = None):
    """Raise LoadingError for a PEFT adapter: transformers would fetch the base model that its file names, unasked."""
    if find_file(source, ADAPTER_FILE, revision):
        raise LoadingError("it is an adapter: merge it into its base model and save that first.")


def find_weights(source: str, revision: str | None = None, pickled: bool = True) -> list[Path]:
    """The files with a model's weights, downloaded if necessary.

    Raises:
        LoadingError: If there are none, or an index names a file that is missing or outside of the folder.
    """
    for name in (*SAFETENSORS, *(PICKLED if pickled else ())):
        path = find_file(source, name, revision)
        if path is None:
            continue
        if path.suffix != ".json":
            return [path]
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise LoadingError(f"its {name} names no files.")
        return [find_shard(source, name, shard, revision) for shard in sorted(set(map(str, weight_map.values())))]
    raise LoadingError(f"it has no weights: give a folder with {SAFETENSORS[0]}.")


def find_shard(source: str, index: str, shard: str, revision: str | None) -> Path:
    """A file that an index names.

    Raises:
        LoadingError: If it is missing, or not a file of that kind beside the index.
    """
    if shard != os.path.basename(shard) or Path(shard).suffix != Path(index.removesuffix(".index.json")).suffix:
        raise LoadingError(f"its {index} names {shard[:MAX_REASON]!r}, which is not a weights file beside it.")
    if path := find_file(source, shard, revision):
        return path
    raise LoadingError(f"its {index} names {shard}, which is missing: copy or download it again.")


def loading_problem(error: Exception) -> str:
    """Why a library could not load a model or tokenizer: one line without a full stop, never advice to run its code."""
    if isinstance(error, LoadingError):
        return str(error).rstrip(".")
    if "trust_remote_code" in str(error):
        return NEEDS_CODE
    if "instantiate the backend tokenizer" in str(error):
        return NO_TOKENIZER
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in exception_chain(error)):
        return "the Hub does not answer, or is turned off by HF_HUB_OFFLINE, and the file is not in the cache"
    reason = describe_error(error).strip().rstrip(".:") or type(error).__name__
    if len(reason) <= MAX_REASON:
        return reason
    return f"{reason[: MAX_REASON // 2]} ... {reason[-MAX_REASON // 2 :]}"  # what it is about, and what to do
