"""The lecture's way of preparing data, after build-nanogpt's fineweb.py, for benchmarks/prepare.py to compare with.

    python -m benchmarks.peers.lecture_fineweb FILE.parquet CACHE_DIR OUTPUT_DIR WORKERS

It imports nothing of ours, because its start-up is part of what is timed.
"""

import multiprocessing
import os
import sys
from functools import lru_cache

import numpy as np
import tiktoken

SHARD_TOKENS = 100_000_000  # build-nanogpt's, and prepare_data.py's default
CHUNK_DOCUMENTS = 16  # build-nanogpt's


@lru_cache(maxsize=1)
def gpt2_encoding():
    """GPT-2's encoding, loaded once per process; forked workers inherit the parent's."""
    return tiktoken.get_encoding("gpt2")


def tokenize(row: dict) -> np.ndarray:
    """A document's ids (n,) uint16, end-of-text first."""
    encoding = gpt2_encoding()
    ids = np.array([encoding.eot_token, *encoding.encode_ordinary(row["text"])])
    assert (ids >= 0).all()
    assert (ids < 2**16).all()
    return ids.astype(np.uint16)


def load_rows(file: str, cache: str):
    """The file's rows from `datasets`, which caches them as an Arrow table in `cache`."""
    import datasets  # here, so that benchmarks.prepare can be imported without it

    datasets.disable_progress_bars()
    return datasets.load_dataset("parquet", data_files=file, split="train", cache_dir=cache)


def main(file: str, cache: str, folder: str, workers: str):
    """Write the shards of a parquet file, and print how many tokens they have."""
    rows = load_rows(file, cache)
    gpt2_encoding()
    os.makedirs(folder)
    buffer = np.empty(SHARD_TOKENS, dtype=np.uint16)
    filled = 0
    shards = 0
    with multiprocessing.Pool(int(workers)) as pool:
        for ids in pool.imap(tokenize, rows, chunksize=CHUNK_DOCUMENTS):
            if filled + len(ids) > SHARD_TOKENS:
                rest = SHARD_TOKENS - filled
                buffer[filled:] = ids[:rest]
                np.save(os.path.join(folder, f"{shards:06d}.npy"), buffer)
                ids = ids[rest:]
                filled = 0
                shards += 1
            buffer[filled : filled + len(ids)] = ids
            filled += len(ids)
    np.save(os.path.join(folder, f"{shards:06d}.npy"), buffer[:filled])
    print(f"{shards * SHARD_TOKENS + filled} tokens")


if __name__ == "__main__":
    main(*sys.argv[1:])
