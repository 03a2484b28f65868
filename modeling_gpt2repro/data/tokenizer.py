"""Tokenizers: GPT-2's byte-level BPE or one trained on the spot, and a hash: equal ones give equal ids."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
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
        return _gpt2_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer {name!r} is neither 'gpt2' nor a folder or Hub id that loads ({error})."
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer {name!r} must be a fast tokenizer with an end-of-text (eos) token.")
    if len(tokenizer) > LARGEST_VOCABULARY:
        raise ValueError(
            f"tokenizer {name!r} has {len(tokenizer)} ids; shards hold 16-bit ids, at most {LARGEST_VOCABULARY}."
        )
    return tokenizer


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
    return _as_gpt2_tokenizer(bpe, max_length)


def tokenizer_sha256(tokenizer: PreTrainedTokenizerFast) -> str:
    """Hash what decides the ids: vocabulary, merges and the end-of-text id. Equal hashes, equal ids."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    merges = [" ".join(merge) if isinstance(merge, list) else merge for merge in state["model"].get("merges", [])]
    rules = {key: state.get(key) for key in ("normalizer", "pre_tokenizer")}
    if (rules["pre_tokenizer"] or {}).get("type") == "ByteLevel":
        rules["pre_tokenizer"].pop("trim_offsets", None)  # decides offsets, not ids
    identity = [sorted(tokenizer.get_vocab().items()), merges, tokenizer.eos_token_id, rules]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, ensure_ascii=True).encode()).hexdigest()


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], np.ndarray]:
    """Return the fastest function from text to ids (uint16) that gives exactly this tokenizer's ids.

    A literal "<|endoftext|>" in the text is encoded as the characters it is made of: only we mark documents. GPT-2's
    own vocabulary goes through tiktoken, five times as fast on a core as `tokenizers`, which does the others.
    """
    if tokenizer_sha256(tokenizer) == GPT2_SHA256:
        import tiktoken

        to_bytes = _byte_of_character()
        ranks = {
            bytes(to_bytes[character] for character in token): rank
            for token, rank in tokenizer.get_vocab().items()
            if rank != tokenizer.eos_token_id
        }
        encoding = tiktoken.Encoding("gpt2repro", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
        return lambda text: encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint16)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return lambda text: np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.uint16)


# How GPT-2 cuts text into words before merging (Radford et al. 2019, section 2.2; encoder.py of their release).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def _gpt2_tokenizer() -> PreTrainedTokenizerFast:
    import requests
    import tiktoken

    try:
        encoding = tiktoken.get_encoding("gpt2")
    except (requests.RequestException, OSError) as error:
        raise ValueError(
            "GPT-2's vocabulary could not be fetched by tiktoken (is there a network?): give --tokenizer a folder that "
            f"holds it, or put tiktoken's files in TIKTOKEN_CACHE_DIR ({type(error).__name__})."
        ) from error
    character_of = {byte: character for character, byte in _byte_of_character().items()}
    spelled = {"".join(character_of[byte] for byte in token): rank for token, rank in encoding._mergeable_ranks.items()}
    merges = [
        tuple("".join(character_of[byte] for byte in part) for part in _last_merge(encoding._mergeable_ranks, token))
        for token, _ in sorted(encoding._mergeable_ranks.items(), key=lambda item: item[1])
        if len(token) > 1
    ]
    bpe = Tokenizer(models.BPE({**spelled, END_OF_TEXT: encoding.eot_token}, merges))
    bpe.add_special_tokens([END_OF_TEXT])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _as_gpt2_tokenizer(bpe, max_length=1024)


def _as_gpt2_tokenizer(bpe: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = ByteLevelProcessor(trim_offsets=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def _byte_of_character() -> dict[str, int]:
    """How GPT-2's files spell bytes: printable ones as themselves, the others as the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _last_merge(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """The two parts that `token` was merged from: what BPE reaches with only the merges that came before it."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [(ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1)]
        rank, i = min(candidates)
        assert rank < ranks[token], "every GPT-2 token is a merge of two that have lower ranks"
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> str:
    """Save into `folder` and return the hash of what a reader will load from there."""
    tokenizer.save_pretrained(folder)
    return tokenizer_sha256(AutoTokenizer.from_pretrained(folder))
