"""The steps of a preparation as datatrove runs them, in as many processes and on as many machines as there are."""

import os
import shutil
import signal
import threading
from pathlib import Path

from datatrove.pipeline.base import PipelineStep
from datatrove.utils.logging import logger
from huggingface_hub.errors import HTTPError

from modeling_gpt2repro.data.shards.dataset import MANIFEST
from modeling_gpt2repro.data.tokenize import tokenize_partition
from modeling_gpt2repro.data.tokenizer import load_tokenizer_folder, text_encoder

from .assemble import Progress, UnusableText, write_shards
from .spec import PrepareSpec, read_spec
from .token_cache import (
    UNITS,
    finished_partitions,
    read_errors,
    read_partition_file,
    required_partitions,
    write_error,
    write_partition,
)
from .workspace import finish_job


class TokenizeUnits(PipelineStep):
    """Tokenize every world_size-th unit of the plan in `folder`, from the rank-th on, but those that are finished.

    A unit is read, tokenized and written by one process. Where the plan ends after some tokens, a unit is left out as
    soon as the finished ones before it hold them all.
    """

    type, name = "Tokenizer", "Units of text to ids"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        exit_with_parent()
        folder = Path(self.folder)
        plan, finished = read_spec(folder), finished_partitions(folder)
        source, encode = plan.source_to_read(), text_encoder(load_tokenizer_folder(folder / "tokenizer"))
        for number in range(rank, len(plan.units), world_size):
            if plan.max_tokens is not None:
                finished = finished_partitions(folder)
                if sum(tokens for other, (tokens, _) in finished.items() if other < number) >= plan.max_tokens:
                    return
            if number in finished:
                continue
            unit = plan.units[number]
            try:
                tokenized = tokenize_partition(source, unit, encode, plan)
            except (ValueError, OSError, HTTPError) as error:
                told = " ".join(str(error).split()).removeprefix(f"{unit.path}: ")
                raise write_error(folder, number, f"{unit.location}: {told}") from error
            write_partition(folder, number, tokenized)
            logger.info(f"{unit.location}: {len(tokenized.ids['train'])} training tokens")
            self.stat_update("tokens", value=len(tokenized.ids["train"]), unit="unit")


class AssembleShards(PipelineStep):
    """Write the shards of the plan in `folder` from its units' files."""

    type, name = "Writer", "Ids to shards"

    def __init__(self, folder: str):
        super().__init__()
        self.folder = folder

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        folder = Path(self.folder)
        if not (folder / MANIFEST).exists():  # else this job was stopped after it had written it
            assemble(folder, read_spec(folder))
        finish_job(folder, keep_logs=True)


def assemble(folder: Path, plan: PrepareSpec, on_progress: Progress = lambda units, total_units, tokens: None):
    """Write the shards and the manifest from the units' files, which stay.

    Raises:
        ValueError: If a unit is not finished, or see `write_shards`.
    """
    finished = finished_partitions(folder)
    needed = required_partitions(finished, len(plan.units), plan.max_tokens)
    if needed is None:
        told = read_errors(folder) or [f"see the logs in {folder / 'logs'}."]
        raise ValueError(
            f"{len(finished):,} of {len(plan.units):,} units are finished, which is not enough: {' '.join(told)} Run "
            "the same command again to go on."
        )
    try:
        write_shards(folder, plan, (read_partition_file(finished[number][1]) for number in needed), on_progress)
    except UnusableText:
        shutil.rmtree(folder / UNITS)  # it takes another plan, and this one has nothing to go on with
        raise


def exit_with_parent():
    """In a process that another one started: end when that one is gone, and leave Ctrl-C to it."""
    import multiprocess

    parent = multiprocess.parent_process()
    if parent is None:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
