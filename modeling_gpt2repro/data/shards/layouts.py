"""How shards are named: our own way, and the lecture's, which build-nanogpt and what follows it read by pattern."""

import re

LAYOUTS = ("plain", "karpathy")
# Which of its two words the lecture's names have for a split.
KARPATHY_SPLITS = {"train": "train", "validation": "val"}

SHARD_NAME = re.compile(r"(?:(?:train|validation)|edufineweb_(?:train|val))_\d{6,}\.npy")


def shard_name(layout: str, split: str, number: int) -> str:
    """File name of a split's shard; numbers begin at 0.

    karpathy: edufineweb_val_000000.npy, then edufineweb_train_000001.npy and on, one run of numbers for both splits.
    """
    if layout == "karpathy":
        return f"edufineweb_{KARPATHY_SPLITS[split]}_{number + (split == 'train'):06d}.npy"
    return f"{split}_{number:06d}.npy"


def shard_length(layout: str, split: str, shard_tokens: int) -> int | None:
    """Tokens after which a shard ends; None where a split is one shard, as the lecture's validation is."""
    return None if layout == "karpathy" and split == "validation" else shard_tokens
