"""GPT-2's vocabulary, converted between tiktoken, which is fast, and `tokenizers`, which transformers reads.

tiktoken stores a token as its bytes and a rank: the lower, the earlier it is merged; the rank is also the id.
`tokenizers` stores it as a string that spells each byte as a printable character, a space as "Ġ", and it needs the
merges as pairs, in order. tiktoken does not store the pairs, but they follow from the ranks, see `_last_merge`.
"""

import tiktoken
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"

# How GPT-2 cuts text into words before merging (Radford et al. 2019, section 2.2; encoder.py of their release).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's tokenizer, built from the files that tiktoken has or downloads.

    Raises:
        ValueError: If it cannot download them.
    """
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:
        raise ValueError(
            f"tiktoken could not download GPT-2's vocabulary ({type(error).__name__}; is there a network?): give "
            "--tokenizer a folder that holds it, or put tiktoken's files in TIKTOKEN_CACHE_DIR."
        ) from error
    ranks = encoding._mergeable_ranks
    character_of = {byte: character for character, byte in _byte_of_character().items()}

    def spelled(token: bytes) -> str:
        return "".join(character_of[byte] for byte in token)

    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    merged = [token for token in sorted(ranks, key=ranks.get) if len(token) > 1]  # in the order of merging
    merges = [tuple(map(spelled, _last_merge(ranks, token))) for token in merged]
    bpe = Tokenizer(models.BPE({**vocabulary, END_OF_TEXT: encoding.eot_token}, merges))
    bpe.add_special_tokens([END_OF_TEXT])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return as_gpt2_tokenizer(bpe, max_length=1024)


def as_gpt2_tokenizer(bpe: Tokenizer, max_length: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with what GPT-2's tokenizer has besides its vocabulary: decoder, special tokens, length."""
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
    """A tiktoken encoding that gives the same ids; for tokenizers with GPT-2's vocabulary and merges only."""
    byte_of = _byte_of_character()
    ranks = {
        bytes(byte_of[character] for character in token): rank
        for token, rank in tokenizer.get_vocab().items()
        if rank != tokenizer.eos_token_id
    }
    special = {END_OF_TEXT: tokenizer.eos_token_id}  # without a special token, tiktoken takes twice as long
    return tiktoken.Encoding("gpt2repro", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special)


def _byte_of_character() -> dict[str, int]:
    """How GPT-2's files spell bytes: printable ones as themselves, the others as the characters from U+0100 on.

    It is `bytes_to_unicode` of encoder.py in OpenAI's release, inverted; space is the 33rd of the others, "Ġ" (U+0120).
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _last_merge(ranks: dict[bytes, int], token: bytes) -> tuple[bytes, bytes]:
    """The two parts that `token` is merged from: where BPE gets to with only the merges that come before it.

    Example: b"the" -> (b"t", b"he"), because b"he" has a lower rank than b"th".
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
        assert rank < ranks[token], "every GPT-2 token is a merge of two that have lower ranks"
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
