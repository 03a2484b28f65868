"""Make everything that a run needs without a network: a tokenizer, token shards, HellaSwag-like examples, a model.

    python -m benchmarks.generated_data --output_dir build/generated

Nothing of it means anything, but the sizes are GPT-2's: 50,257 ids, 124M weights, and 10,042 examples whose contexts
and endings are as long as HellaSwag's. There is something to learn: tokens come in pairs, of which the first is drawn
from a Zipf distribution and the second follows from the first. So the loss falls from ln(vocabulary) towards half the
entropy of that distribution, which `manifest.json` has under `source`. What is there already is not made again.
"""

import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.training_step import SEED, SHAPES
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM
from modeling_gpt2repro.data.gpt2_bpe import END_OF_TEXT, as_gpt2_tokenizer
from modeling_gpt2repro.data.shards.dataset import FORMAT, MANIFEST
from modeling_gpt2repro.data.shards.writer import ShardWriter
from modeling_gpt2repro.data.tokenizer import save_tokenizer
from modeling_gpt2repro.hub.export import save_hub_folder
from modeling_gpt2repro.runs.config import make_writable
from modeling_gpt2repro.runtime.command_line import arg, check_limits, exit_on_input_error, parse_command_line
from modeling_gpt2repro.storage.atomic import atomic_write, write_json

SHARD_TOKENS = 10_000_000
BYTES_PER_TOKEN = 2
# Tokens of a context and of an ending at these shares of the rows, over 1,000 rows of HellaSwag's validation split and
# by GPT-2's tokenizer; and how many of its 10,042 rows are of each kind.
SHARES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)
LENGTHS = {
    "ActivityNet": (3_243, (9, 12, 18, 24, 30, 36, 70), (2, 7, 9, 12, 16, 22, 56)),
    "WikiHow": (6_799, (40, 53, 57, 65, 71, 81, 88), (18, 27, 33, 39, 47, 54, 73)),
}
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class DataArguments:
    output_dir: str = arg(default="build/generated", help="Folder for shards/, hellaswag.jsonl and model/.")
    shape: str = arg(default="124m", choices=SHAPES, help="Shape of the model, whose vocabulary the tokenizer has.")
    tokens: int = arg(default=40_000_000, minimum=2, help="Training tokens.")
    examples: int = arg(default=10_042, minimum=2, help="HellaSwag-like examples.")

    def __post_init__(self):
        if problems := list(check_limits(self)):
            raise ValueError("\n".join(problems))


def main(argv: list[str] | None = None):
    args = parse_command_line(DataArguments, argv, description=__doc__)
    folder = Path(args.output_dir)
    with exit_on_input_error():
        make_writable(folder)
    tokenizer = generated_tokenizer(SHAPES[args.shape]["vocab_size"])
    if not (folder / "shards" / MANIFEST).exists():
        write_shards(folder / "shards", tokenizer, args.tokens)
    with atomic_write(folder / "hellaswag.jsonl") as file:
        file.writelines(json.dumps(example).encode() + b"\n" for example in generated_examples(args.examples))
    if not (folder / "model" / "config.json").exists():
        torch.manual_seed(SEED)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**SHAPES[args.shape], **ids))
        save_hub_folder(model, tokenizer, folder / "model")
    print(f"{folder} holds {args.tokens:,} training tokens, {args.examples:,} examples and a model.")


def generated_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges are pairs of bytes, so that `vocab_size` is whatever is asked for."""
    letters = ["Ġ", *LETTERS]
    alphabet = letters + sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(letters))
    # First those that begin with a space, so that " a" is one token in every vocabulary of 284 ids or more.
    pairs = sorted(itertools.product(range(256), repeat=2), key=lambda pair: (pair[0] != 0, max(pair), pair))
    merges = [(alphabet[first], alphabet[second]) for first, second in pairs[: vocab_size - 257]]
    tokens = [*alphabet, *map("".join, merges), END_OF_TEXT]
    bpe = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    bpe.add_special_tokens([END_OF_TEXT])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return as_gpt2_tokenizer(bpe, max_length=1024)


def write_shards(folder: Path, tokenizer: PreTrainedTokenizerFast, tokens: int):
    """Shards with their manifest, as `prepare_data.py` writes them; a tenth of `tokens` for validation."""
    folder.mkdir(parents=True, exist_ok=True)
    probabilities = zipf(len(tokenizer) - 1)  # without end-of-text, the last id
    rng = np.random.default_rng(SEED)
    successor = rng.permutation(len(probabilities)).astype(np.uint16)
    splits = {}
    for split, count in (("train", tokens), ("validation", tokens // 10)):
        writer = ShardWriter(folder, split, SHARD_TOKENS, tokenizer.eos_token_id, max_tokens=count)
        while not writer.is_full:
            first = np.searchsorted(probabilities.cumsum(), rng.random(SHARD_TOKENS // 2)).astype(np.uint16)
            ids = np.stack([first, successor[first]], axis=1).ravel()
            writer.append(ids, text_bytes=BYTES_PER_TOKEN * len(ids), partition=0)
        splits[split] = writer.finish()
    sha256 = save_tokenizer(tokenizer, folder / "tokenizer")
    entropy = float(-(probabilities * np.log(probabilities)).sum())
    manifest = {
        "format": FORMAT,
        "source": {"name": "generated pairs", "floor": entropy / 2},  # nats per token
        "tokenizer": {"name": "generated", "sha256": sha256, "vocab_size": len(tokenizer)},
        "end_of_text_id": tokenizer.eos_token_id,
        "splits": splits,
    }
    write_json(folder / MANIFEST, manifest)


def zipf(count: int) -> np.ndarray:
    """Probabilities (count,) in proportion to 1, 1/2, 1/3, ..., as those of words are (Zipf 1949)."""
    weights = 1 / np.arange(1, count + 1)
    return weights / weights.sum()


def generated_examples(count: int) -> list[dict]:
    """HellaSwag's schema, kinds and lengths; a word is one letter, and with the space before it one token."""
    draw = random.Random(SEED)

    def text(quantiles: tuple[int, ...]) -> str:
        length = round(float(np.interp(draw.random(), SHARES, quantiles)))
        return " ".join(draw.choices(LETTERS, k=length))

    share = LENGTHS["ActivityNet"][0] / sum(rows for rows, _, _ in LENGTHS.values())
    examples = []
    for number in range(count):
        _, contexts, endings = LENGTHS["ActivityNet" if number < share * count else "WikiHow"]
        context = text(contexts)
        examples.append(
            {
                "ind": number,
                "activity_label": "a",
                "ctx_a": context,
                "ctx_b": "",
                "ctx": context,
                "endings": [text(endings) for _ in range(4)],
                "label": number % 4,
            }
        )
    return examples


if __name__ == "__main__":
    main()
