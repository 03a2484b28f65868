"""Tokenize the partitions of a preparation on this machine, in one process or several."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub.errors import HTTPError

from modeling_gpt2repro.data.contamination import NgramIndex
from modeling_gpt2repro.data.shards.dataset import TokenDataset, open_shards
from modeling_gpt2repro.data.sources.documents import BadLineError, BadLines, Document, Partition
from modeling_gpt2repro.data.sources.resolve import Source
from modeling_gpt2repro.data.tokenize import HoldOutCheck, tokenize_documents
from modeling_gpt2repro.data.tokenizer import load_tokenizer_folder, text_encoder, train_tokenizer, write_tokenizer
from modeling_gpt2repro.runtime.progress import TextBar
from modeling_gpt2repro.storage.atomic import explain_disk_full
from modeling_gpt2repro.storage.lock import FolderLock

from .assemble import OnProgress, assemble
from .spec import PrepareSpec, make_prepare_spec, read_spec_of_job
from .token_cache import (
    finished_partitions,
    mark_verified,
    read_partition_file,
    unverified_partitions,
    write_error,
    write_partition,
)
from .workspace import find_partial_output, finish_job, start_job

if TYPE_CHECKING:  # importing transformers takes a second, and --help does without
    from transformers import PreTrainedTokenizerFast

POLL_SECONDS = 0.5
BAD_LINE_ADVICE = "Fix it and run the same command again, or skip all such lines by --skip_bad_lines."


def tokenize_partitions(
    folder: Path,
    rank: int = 0,
    world_size: int = 1,
    on_tokenized: Callable[[Partition, int], None] = lambda partition, train_tokens: None,
):
    """Tokenize partitions rank, rank + world_size, ... of the spec in `folder`, except those that are finished.

    With max_tokens, it stops as soon as the finished partitions before the next one hold that many.

    Raises:
        ValueError: If a partition cannot be read; its message names the partition. Or if there is no spec.
    """
    spec = read_spec_of_job(folder)
    source = Source(spec.partitions, spec.source)
    encode = text_encoder(load_tokenizer_folder(folder / "tokenizer"), spec.tokenizer["sha256"])
    numbers = spec.numbers
    finished = finished_partitions(folder, numbers)
    unverified = unverified_partitions(folder)
    hold_out = HoldOutCheck(spec.validation_share)
    benchmark = NgramIndex(spec.benchmark_items) if spec.decontamination else None
    for index in range(rank, len(spec.partitions), world_size):
        if spec.max_tokens is not None:
            finished = finished_partitions(folder, numbers)  # the other workers' as well
            if sum(tokens for other, (tokens, _) in finished.items() if other < index) >= spec.max_tokens:
                return
        if index in finished:
            continue
        partition = spec.partitions[index]
        number = numbers[index]
        read = partial(HashedDocuments, source, partition, spec.skip_bad_lines)
        try:
            if number in unverified and verify_partition(unverified[number][1], read()):
                continue
            documents = read()
            watched = hold_out.watch(documents)
            tokenized = tokenize_documents(
                watched,
                encode,
                spec.end_of_text_id,
                spec.validation_share,
                document_length=source.description.get("document_length"),
                benchmark=benchmark,
                drop_contaminated=spec.decontamination.get("drop", False),
            )
        except (ValueError, OSError, HTTPError) as error:
            reason = " ".join(str(error).split()).removeprefix(f"{partition.path}: ")
            message = f"{partition.location}: {reason}"
            if isinstance(error, BadLineError):
                message += f" {BAD_LINE_ADVICE}"
            write_error(folder, number, message)
            raise ValueError(message) from error
        tokenized = replace(tokenized, **documents.describe())
        write_partition(folder, number, tokenized)
        on_tokenized(partition, len(tokenized.ids["train"]))


class HashedDocuments:
    """The documents of a partition; once they are read, also what was left out, and a hash of all that decides the ids.

    Args:
        skip_bad_lines: Skip and count bad lines; otherwise the first one raises `BadLineError`.
    """

    def __init__(self, source: Source, partition: Partition, skip_bad_lines: bool):
        self.source = source
        self.partition = partition
        self.skip_bad_lines = skip_bad_lines
        self._skipped = Counter()
        self._bad_lines = BadLines()
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[Document]:
        bad_lines = self._bad_lines if self.skip_bad_lines else None
        for document in self.source.read(self.partition, self._skipped, bad_lines):
            text = document.text.encode()
            self._digest.update(repr((document.id, document.continues, len(text))).encode())
            self._digest.update(text)
            yield document

    def describe(self) -> dict:
        """The fields of `TokenizedPartition` other than ids and bytes; complete once all documents were read."""
        first = self._bad_lines.first
        left_out = {
            "skipped": dict(sorted(self._skipped.items())),
            "bad_lines": dict(sorted(self._bad_lines.counts.items())),
            "first_bad_line": first and [first.position, first.problem],
        }
        digest = self._digest.copy()
        digest.update(repr(left_out).encode())
        return {**left_out, "source_sha256": digest.hexdigest()}


def verify_partition(path: Path, documents: HashedDocuments) -> bool:
    """Whether an unverified file was made of these documents. If so, it is marked as verified, otherwise deleted.

    Reading is about twenty times as fast as tokenizing.
    """
    for _ in documents:
        pass
    if read_partition_file(path).source_sha256 != documents.describe()["source_sha256"]:
        path.unlink()
        return False
    mark_verified(path)
    return True


def tokenize_locally(folder: Path, workers: int):
    """Run `tokenize_partitions` in `workers` processes on this machine; a single worker is this process.

    Raises:
        ValueError: If a partition cannot be read, or a worker was killed.
    """
    if workers == 1:
        tokenize_partitions(folder)
        return
    context = multiprocessing.get_context("spawn")  # fork would copy locks that the libraries' threads hold
    worker_end, parent_end = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=exit_with_parent, initargs=(worker_end,))
    with worker_end, parent_end, pool:  # leaving `pool` waits for the workers
        try:
            futures = [pool.submit(tokenize_partitions, folder, rank, workers) for rank in range(workers)]
            for future in as_completed(futures):
                future.result()
        except BrokenProcessPool as error:
            raise ValueError(
                "a worker was killed, most often because there was not enough memory: run the same command again, with "
                "fewer --workers; what is finished is kept."
            ) from error
        except BaseException:
            parent_end.close()  # the workers exit at once instead of finishing all of their partitions
            raise


def exit_with_parent(worker_end: Connection):
    """In a new worker: exit as soon as the parent closes its end of the pipe, or dies, however hard.

    Ctrl-C reaches every process of a terminal; the parent handles it and then closes the pipe.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait():
        with suppress(EOFError, OSError):
            worker_end.recv()  # nothing is ever sent: it returns when the other end is closed
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def watch_partitions(folder: Path, spec: PrepareSpec, on_progress: OnProgress) -> Iterator[None]:
    """Report progress twice a second inside the `with` block, by the files that workers write, wherever they run."""
    is_over = threading.Event()

    def poll():
        last = False
        while not last:
            last = is_over.wait(POLL_SECONDS)
            finished = finished_partitions(folder, spec.numbers)
            on_progress(len(finished), len(spec.partitions), sum(tokens for tokens, _ in finished.values()))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def train_tokenizer_on(
    source: Source, vocab_size: int, max_length: int = 1024, skip_bad_lines: bool = False
) -> PreTrainedTokenizerFast:
    """`train_tokenizer` on all texts of a source, with a progress bar.

    Raises:
        ValueError: If a partition cannot be read, or for the reasons of `train_tokenizer`.
    """
    bad_lines = BadLines() if skip_bad_lines else None
    documents = (document for part in source.partitions for document in source.read(part, bad_lines=bad_lines))
    with TextBar(source.text_bytes, "reading text for a tokenizer") as bar:
        texts = bar.watch((document.text for document in documents), then=f"training a tokenizer of {vocab_size:,} ids")
        try:
            tokenizer = train_tokenizer(texts, vocab_size, max_length)
        except BadLineError as error:
            raise ValueError(f"{error} {BAD_LINE_ADVICE}") from error
        bar.set_description(f"trained a tokenizer of {vocab_size:,} ids")
    return tokenizer


def prepare_shards(
    source: Source,
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_name: str,
    output_dir: str | Path,
    validation_share: float,
    **options,
) -> TokenDataset:
    """Tokenize a source into `output_dir` within this process: what prepare_data.py does with one worker.

    Args:
        validation_share: Share of the documents, by hash of their ids, that go to the validation split.
        options: max_tokens, shard_tokens and layout, see `PrepareSpec`.

    Raises:
        ValueError: If `output_dir` is in use, a partition cannot be read, or the text is unusable.
    """
    folder = Path(output_dir)
    spec = make_prepare_spec(source, tokenizer, tokenizer_name, validation_share, **options)
    with explain_disk_full(folder), FolderLock(folder) as lock:
        find_partial_output(folder)
        lock.acquire()
        spec = start_job(folder, spec)
        write_tokenizer(tokenizer, folder / "tokenizer")
        tokenize_partitions(folder)
        assemble(folder, spec)
        finish_job(folder)
    return open_shards(folder)
