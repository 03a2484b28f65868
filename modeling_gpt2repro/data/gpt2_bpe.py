"""GPT-2's own vocabulary, between tiktoken, which is fast, and `tokenizers`, which everything else reads."""

import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts text into words before merging (Radford et al. 2019, section 2.2; encoder.py of their release).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer, made from the files that tiktoken fetches or has.

    Raises:
        ValueError: If it cannot fetch them.
    """
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:
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
    return as_gpt2_tokenizer(bpe, max_length=1024)


def as_gpt2_tokenizer(bpe: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """Give a byte-level BPE what GPT-2's tokenizer has beside its vocabulary."""
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


def tiktoken_encoding(tokenizer: PreTrainedTokenizerFast) -> tiktoken.Encoding:
    """The same ids by tiktoken; for a tokenizer with GPT-2's vocabulary only."""
    to_bytes = _byte_of_character()
    ranks = {
        bytes(to_bytes[character] for character in token): rank
        for token, rank in tokenizer.get_vocab().items()
        if rank != tokenizer.eos_token_id
    }
    special = {END_OF_TEXT: tokenizer.eos_token_id}  # without a special token, tiktoken takes twice as long
    return tiktoken.Encoding("gpt2repro", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


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
