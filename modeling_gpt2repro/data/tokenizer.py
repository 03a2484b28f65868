"""Tokenizers: GPT-2's byte-level BPE or one trained on the spot, and a hash: equal ones give equal ids."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .gpt2_bpe import END_OF_TEXT, as_gpt2_tokenizer, gpt2_tokenizer, tiktoken_encoding

# `tokenizer_sha256` of GPT-2's vocabulary and merges, the same from tiktoken and from openai-community/gpt2.
GPT2_SHA256 = "806c1981ba8dd4262ce8b78d4438dde0c11d8e1b8b968233ef44fb06a38b336a"
# Token ids are stored in 16 bits.
LARGEST_VOCABULARY = 2**16


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer called `name`: "gpt2" (from tiktoken's files), or a folder or Hub id of any fast tokenizer.

    Raises:
        ValueError: If it cannot be found or reached, has no end-of-text token, or has ids that do not fit in 16 bits.
    """
    if name == "gpt2":
        return gpt2_tokenizer()
    from transformers import AutoTokenizer  # late: it imports torch
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of the kind of model that lies beside a tokenizer, even of ours
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)  # else it asks whether to run code
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"tokenizer {name!r} is neither 'gpt2' nor a folder or Hub id that loads ({' '.join(str(error).split())})."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} must be a fast tokenizer with an end-of-text (eos) token.")
    largest = max(tokenizer.get_vocab().values())
    if largest >= LARGEST_VOCABULARY:
        raise ValueError(
            f"tokenizer {name!r} has ids up to {largest}; shards hold 16-bit ids, less than {LARGEST_VOCABULARY}."
        )
    return tokenizer


def load_tokenizer_folder(folder: Path) -> PreTrainedTokenizerFast:
    """Load what `save_tokenizer` wrote, never anything from the Hub.

    Raises:
        ValueError: If it is not there or damaged.
    """
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"tokenizer {folder} does not load ({' '.join(str(error).split())}): prepare the data again."
        ) from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int = 1024) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of GPT-2's kind (same pre-tokenization, same end-of-text token) on `texts`.

    Raises:
        ValueError: If there is too little text for it, or `vocab_size` cannot hold the 256 bytes and end-of-text.
    """
    if not 257 <= vocab_size <= LARGEST_VOCABULARY:
        raise ValueError(f"a byte-level vocabulary holds 257 to {LARGEST_VOCABULARY} ids, not {vocab_size}.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
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
    """Hash what decides the ids: vocabulary, merges and the end-of-text id. Equal hashes, equal ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in state["model"].get("merges", [])]
    rules = {key: state.get(key) for key in ("normalizer", "pre_tokenizer")}
    options = ("dropout", "byte_fallback", "fuse_unk", "ignore_merges", "continuing_subword_prefix")
    rules |= {key: state["model"][key] for key in options if state["model"].get(key)}
    if (rules["pre_tokenizer"] or {}).get("type") == "ByteLevel":
        rules["pre_tokenizer"].pop("trim_offsets", None)  # decides offsets, not ids
    identity = [sorted(tokenizer.get_vocab().items()), merges, tokenizer.eos_token_id, rules]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], np.ndarray]:
    """Return the fastest function from text to ids (uint16) that gives exactly this tokenizer's ids.

    A literal "<|endoftext|>" in the text is encoded as the characters it is made of: only we mark documents. GPT-2's
    own vocabulary goes through tiktoken, five times as fast on a core as `tokenizers`, which does the others.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    backend.no_truncation()  # which some saved tokenizers ask for
    backend.no_padding()

    def encode(text: str) -> np.ndarray:
        return np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.uint16)

    if tokenizer_sha256(tokenizer) != GPT2_SHA256:
        return encode
    encoding = tiktoken_encoding(tokenizer)

    def encode_with_tiktoken(text: str) -> np.ndarray:
        try:
            return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
        except ValueError:  # a million blanks in a row overflow its regular expression's stack
            return encode(text)

    return encode_with_tiktoken


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    """Save into `folder` and return the hash of what a reader will load from there."""
    tokenizer.save_pretrained(folder)
    return tokenizer_sha256(load_tokenizer_folder(folder))
