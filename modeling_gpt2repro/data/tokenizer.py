"""Tokenizers: GPT-2's byte-level BPE, any fast one, or one trained on the data; and a hash of what decides the ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from modeling_gpt2repro.storage.atomic import write_json
from modeling_gpt2repro.storage.json_files import read_json_object
from modeling_gpt2repro.storage.model_files import (
    NO_TOKENIZER,
    LoadingError,
    check_json_files,
    find_file,
    loading_problem,
)

from .gpt2_bpe import END_OF_TEXT, as_gpt2_tokenizer, gpt2_tokenizer, tiktoken_encoding

if TYPE_CHECKING:  # importing transformers takes a second, and --help does without
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# `tokenizer_sha256` of GPT-2's vocabulary and merges, the same from tiktoken and from openai-community/gpt2.
GPT2_SHA256 = "806c1981ba8dd4262ce8b78d4438dde0c11d8e1b8b968233ef44fb06a38b336a"
MAX_VOCAB_SIZE = 2**16  # shards hold 16 bits an id
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # two names of one class, the second new in 5
MIN_VOCAB_SIZE = 257  # a byte-level BPE begins with the 256 bytes; one more for end-of-text


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer called `name`: "gpt2" (from tiktoken's files), or a folder or Hub id of any fast tokenizer.

    Raises:
        ValueError: If it cannot be found or reached, has no end-of-text token, or has ids that do not fit in 16 bits.
    """
    from transformers import PreTrainedTokenizerFast

    if name == "gpt2":
        return gpt2_tokenizer()
    try:
        tokenizer = load_auto_tokenizer(name)
    except ValueError as error:
        raise ValueError(
            f"tokenizer {name!r} is neither 'gpt2' nor a folder or Hub id that loads ({str(error).rstrip('.')})."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} must be a fast tokenizer with an end-of-text (eos) token.")
    check_vocab_size(name, tokenizer)
    return tokenizer


def load_auto_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id; if it has a tokenizer.json, with the ids that this file gives.

    AutoTokenizer gives some classes (`GPT2Tokenizer`, for one) a pre-tokenizer of their own and drops the one in
    tokenizer.json: if that splits digits, "2023" then becomes one token where every other reader of the file gets four.

    Raises:
        LoadingError: If there is no tokenizer or a damaged one, the settings beside tokenizer.json change
            its ids, or it has code of its own and `trust_remote_code` is False.
    """
    from transformers import PreTrainedTokenizerFast

    with only_errors(), loading_errors_in_one_line():
        check_json_files(name, revision)
        # False and not the default, None, with which it stops and asks the user whether to run such code.
        options = {"revision": revision, "trust_remote_code": trust_remote_code}
        tokenizer = tokenizer_class(name).from_pretrained(name, **options)
        if len(tokenizer) <= len(tokenizer.all_special_tokens):  # transformers 5 makes one without its files, too
            raise LoadingError(NO_TOKENIZER)
        file = find_file(name, "tokenizer.json", revision)
        is_remote_code = type(tokenizer).__module__.startswith("transformers_modules")
        if file is None or is_remote_code or not isinstance(tokenizer, PreTrainedTokenizerFast):
            return tokenizer
        expected = Tokenizer.from_file(str(file))
        if not gives_ids_of(expected, tokenizer):
            # The class may know of special tokens that tokenizer_config.json does not name.
            known = {
                role: token
                for role, token in tokenizer.special_tokens_map.items()
                if expected.token_to_id(str(token)) is not None
            }
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name, **options, **known)
        if not gives_ids_of(expected, tokenizer):
            raise ValueError(
                "its tokenizer_config.json changes the ids that its tokenizer.json gives: correct one of them"
            )
        expected.no_padding()  # which may ask for a billion ids
        with suppress(Exception):  # it may lack these letters; a panic is none, and not suppressed
            expected.encode("A text.")
    return tokenizer


def gives_ids_of(expected: Tokenizer, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether every text has the ids that `expected` gives, unless it spells out special tokens."""
    states = [backend.to_str() for backend in (expected, tokenizer.backend_tokenizer)]
    if states[0] == states[1]:
        return True
    wanted, found = map(json.loads, states)
    unchanged = all(wanted[part] == found[part] for part in ("normalizer", "pre_tokenizer", "model"))
    added = [token for token in found["added_tokens"] if token not in wanted["added_tokens"]]
    lost = [token for token in wanted["added_tokens"] if token not in found["added_tokens"]]
    return unchanged and not lost and all(token["special"] for token in added)


@contextmanager
def only_errors() -> Iterator[None]:
    """Silence transformers' warnings, such as AutoTokenizer's about a config of a model type that it does not know."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def explain_rust_errors() -> Iterator[None]:
    """Turn the bare Exception that `tokenizers` raises into an OSError, such as for a full disk ("os error 28"), or a
    ValueError, such as for a tokenizer.json that is damaged or newer than the library.
    """
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise (OSError if "os error" in str(error) else ValueError)(str(error)) from error


@contextmanager
def loading_errors_in_one_line() -> Iterator[None]:
    """Around loading files that somebody else wrote: whatever a library raises there becomes a LoadingError.

    There is no list of what they raise: a damaged file ends in a KeyError, an AttributeError, a bare Exception, ...
    """
    try:
        yield
    except BaseException as error:
        # `tokenizers` is written in Rust, whose panics are no Exceptions, and have no class that can be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise LoadingError(loading_problem(error)) from error


def tokenizer_class(name: str) -> type:
    """The class that loads a tokenizer: AutoTokenizer, or PreTrainedTokenizerFast if the folder names that one.

    The result is the same, but AutoTokenizer imports torch, which takes 2 seconds in every process of a preparation.
    """
    try:
        config = read_json_object(Path(name) / "tokenizer_config.json", any_numbers=True)
    except (OSError, ValueError):
        config = {}  # of a Hub id, or a folder that AutoTokenizer has to make sense of
    if config.get("tokenizer_class") in PLAIN_CLASSES and "auto_map" not in config:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def check_vocab_size(name: str, tokenizer: PreTrainedTokenizerFast, limit: int = MAX_VOCAB_SIZE):
    """Raise ValueError unless all ids are less than `limit`."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= limit:
        raise ValueError(f"tokenizer {name!r} has ids up to {largest}; shards hold 16-bit ids, less than {limit}.")


def load_tokenizer_folder(folder: Path) -> PreTrainedTokenizerFast:
    """Load what `save_tokenizer` wrote, never anything from the Hub.

    Raises:
        ValueError: If it is missing or damaged.
    """
    from transformers import PreTrainedTokenizerFast

    try:
        with loading_errors_in_one_line():
            if not folder.is_dir():
                raise LoadingError("it is not a folder")
            check_json_files(str(folder))
            return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(f"tokenizer {folder} does not load ({error}): prepare the data again.") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of GPT-2's kind (same pre-tokenization, same end-of-text token) on `texts`.

    Raises:
        ValueError: If there is too little text, or `vocab_size` is not from MIN_VOCAB_SIZE to MAX_VOCAB_SIZE.
    """
    if not MIN_VOCAB_SIZE <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"a byte-level vocabulary holds {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE} ids, not {vocab_size}.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        # All 256 bytes, whether the text has them or not, so that any other text can be encoded; sorted, because the
        # order decides their ids.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if bpe.get_vocab_size() < vocab_size:
        raise ValueError(
            f"the text is enough for a vocabulary of {bpe.get_vocab_size()}, not {vocab_size}: ask for fewer ids."
        )
    return as_gpt2_tokenizer(bpe, max_length)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """A hash of what decides the ids: two tokenizers with the same hash give the same ids.

    It is that of vocabulary, merges, end-of-text id, and the rules before and during merging. A hash of tokenizer.json
    would differ between versions of `tokenizers` and between files that differ in decoding alone.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # Written as "a b" by older versions of `tokenizers`, as ["a", "b"] by newer ones.
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in state["model"].get("merges", [])]
    rules = {key: state.get(key) for key in ("normalizer", "pre_tokenizer")}
    options = ("dropout", "byte_fallback", "fuse_unk", "ignore_merges", "continuing_subword_prefix")
    rules |= {key: state["model"][key] for key in options if state["model"].get(key)}
    if (rules["pre_tokenizer"] or {}).get("type") == "ByteLevel":
        rules["pre_tokenizer"].pop("trim_offsets", None)  # decides offsets, not ids
    parts = [sorted(tokenizer.get_vocab().items()), merges, tokenizer.eos_token_id, rules]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def text_encoder(tokenizer: PreTrainedTokenizerFast, sha256: str | None = None) -> Callable[[str], np.ndarray]:
    """Return the fastest function from text to ids, (n,) uint16, that gives exactly this tokenizer's ids.

    A literal "<|endoftext|>" in the text is encoded as the characters that it is made of, not as the token that marks
    documents: otherwise a web page about GPT-2 would end in the middle. GPT-2's own vocabulary is encoded by tiktoken,
    five times as fast on a core as `tokenizers`, which encodes all others.

    Args:
        sha256: Its `tokenizer_sha256`, if already computed: it takes 0.3 s.
    """

    @cache
    def backend() -> Tokenizer:
        copy = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        copy.encode_special_tokens = True
        copy.no_truncation()  # saved tokenizers may ask for either
        copy.no_padding()
        return copy

    def encode(text: str) -> np.ndarray:
        return np.array(backend().encode(text, add_special_tokens=False).ids, dtype=np.uint16)

    if (sha256 or tokenizer_sha256(tokenizer)) != GPT2_SHA256:
        return encode
    encoding = tiktoken_encoding(tokenizer)

    def encode_with_tiktoken(text: str) -> np.ndarray:
        try:
            return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except ValueError:  # a million spaces in a row overflow the stack of its regular expression
            return encode(text)

    return encode_with_tiktoken


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, max_length: int | None = None) -> str:
    """Save into `folder`, load it again, and return the `tokenizer_sha256` of what was loaded.

    Raises:
        ValueError: If what was saved gives other ids.
        OSError: If it cannot be written.
    """
    write_tokenizer(tokenizer, folder, max_length)
    loaded = load_tokenizer_folder(folder)
    sha256 = tokenizer_sha256(loaded)
    states = [(each.backend_tokenizer.to_str(), each.eos_token_id) for each in (loaded, tokenizer)]
    if states[0] != states[1] and sha256 != tokenizer_sha256(tokenizer):  # most often equal, and a hash takes 0.3 s
        raise ValueError(f"the tokenizer gives other ids after saving it to {folder}: use another tokenizer.")
    return sha256


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, max_length: int | None = None):
    """Save into `folder` so that AutoTokenizer of transformers 4.57 and 5 gives the same ids; does not verify that.

    Args:
        max_length: Context of the model that it is for, in tokens; by default that of the tokenizer.

    Raises:
        OSError: If it cannot be written.
    """
    with explain_rust_errors():
        tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    # The first two are of the machine that saves. The last names Python code of the folder it was loaded from, which is
    # not copied, or code of somebody else's repository, and would run it for all who trust this folder.
    for foreign in ("is_local", "local_files_only", "auto_map"):
        config.pop(foreign, None)
    # transformers 4 does not know TokenizersBackend, the name of this class in 5, and 5 drops the pre-tokenizer of a
    # GPT2Tokenizer. It takes additional_special_tokens for 4's extra_special_tokens, which is something else there.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "extra_special_tokens" in config:
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    # Without these, transformers 4 adds token_type_ids, which GPT-2 embeds as tokens, and resets add_prefix_space.
    config["model_input_names"] = list(tokenizer.model_input_names)
    config["add_prefix_space"] = getattr(tokenizer.backend_tokenizer.pre_tokenizer, "add_prefix_space", False)
    if max_length is not None:
        config["model_max_length"] = max_length
    write_json(file, config)
