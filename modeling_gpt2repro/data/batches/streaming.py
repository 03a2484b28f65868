"""Training straight from a source, without shards on disk: the same rows for any number of processes.

Partitions are permuted by (seed, epoch) and dealt to L fixed lanes: lane l takes partitions l, l + L, l + 2L, ... of
the epochs laid end to end. A lane is one endless run of tokens, cut into rows of T + 1 that overlap by one. Row g of
the training is the next row of lane g mod L, and process p of P reads the lanes that are p modulo P. Where P does not
divide L some steps give one process more rows than another; such places are filled. The state is two numbers a lane:
which partition, and which token of it.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.data.sources.documents import Partition
from modeling_gpt2repro.data.sources.resolve import Source
from modeling_gpt2repro.data.tokenize import tokenize_documents
from modeling_gpt2repro.data.tokenizer import text_encoder

from .shuffled import BatchConfig, TokenSequences, as_batch, split_into_micro_batches

MOST_LANES = 64
STEPS_REMEMBERED = 4096  # whose rows can still be named: 16 MB for 512 rows a step


class StreamedBatches:
    """The training batches of one process, from step `next_step` on, and the validation rows beside them.

    Args:
        source: Where the partitions come from; at least two.
        tokenizer: Its ids are the rows' ids.
        shape: Its seed decides the order of partitions, and of documents within them.
        validation_share: Part of the partitions, chosen by hash, that is never trained on; at least one.
        threads: Partitions read ahead at the same time.

    Raises:
        ValueError: If the source has too few partitions for a validation split or for this number of processes; later,
            if there is no text in it.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerFast,
        shape: BatchConfig,
        validation_share: float = 0.001,
        threads: int = 4,
    ):
        self.source, self.shape = source, shape
        self.encode, self.end_of_text = text_encoder(tokenizer), tokenizer.eos_token_id
        if len(source.partitions) < 2:
            raise ValueError(
                "streaming needs two partitions or more, one for validation: use prepare_data.py and give --shards."
            )
        by_hash = sorted(source.partitions, key=lambda partition: hashlib.sha256(partition.name.encode()).digest())
        held_out = max(1, round(validation_share * len(by_hash)))
        self.validation_partitions = by_hash[:held_out]
        validation = set(self.validation_partitions)
        self.partitions = [partition for partition in source.partitions if partition not in validation]
        # A power of two, so that 2, 4, 8, ... processes share the lanes evenly.
        self.lanes = 1 << min(MOST_LANES.bit_length() - 1, len(self.partitions).bit_length() - 1)
        if self.lanes < shape.num_processes:
            raise ValueError(
                f"{shape.num_processes} processes cannot share {self.lanes} lanes: use at most {self.lanes}, or "
                "prepare the data and give --shards."
            )
        self.next_step = 0
        self.positions = {lane: [0, 0] for lane in range(shape.process_index, self.lanes, shape.num_processes)}
        self._names: dict[int, np.ndarray] = {}  # step -> lane, partition and token of each row
        self._open: dict[int, tuple[int, np.ndarray]] = {}
        self._ahead: dict[tuple[int, int], Future] = {}
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="stream")

    @property
    def micro_batch_shape(self) -> tuple[int, int]:
        """Micro-batches of a step on each process, and rows of each: what the process with the most rows needs."""
        processes, (rounds, rest) = self.shape.num_processes, divmod(self.shape.sequences_per_step, self.lanes)
        most_lanes, uneven = -(-self.lanes // processes), self.lanes % processes > 0
        rows = rounds * most_lanes + min(most_lanes, -(-rest // processes) + uneven)
        return split_into_micro_batches(rows, self.shape.micro_batch_size)

    def micro_batches(self, step: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the step's micro-batches, see `as_batch`."""
        assert step == self.next_step, "a stream is read in order; load_state_dict sets the place"
        first = step * self.shape.sequences_per_step
        mine = [row % self.lanes for row in range(first, first + self.shape.sequences_per_step)]
        mine = [lane for lane in mine if lane in self.positions]
        for lane, (partition, _) in self.positions.items():
            if self._open.get(lane, (-1, None))[0] != partition and (lane, partition) not in self._ahead:
                self._ahead[lane, partition] = self._pool.submit(self._read, lane, partition)
        (count, size), names = self.micro_batch_shape, []
        for number in range(count):
            ids = np.zeros((size, self.shape.block_size + 1), dtype=np.int64)
            lanes = mine[number * size : (number + 1) * size]
            for row, lane in zip(ids, lanes, strict=False):
                names.append([lane, *self.positions[lane]])
                row[:] = self._next_row(lane)
            ids = ids[: len(lanes)]
            yield as_batch(ids, self.end_of_text if self.shape.document_mask else None, fill_to=size)
        self._names[step] = np.array(names, dtype=np.int64).reshape(-1, 3)
        self._names.pop(step - STEPS_REMEMBERED, None)
        self.next_step += 1

    def sample_ids(self, step: int) -> list:
        """Which rows this process took in a recent step: [partition, its token] where each begins."""
        return [
            [self._partition(lane, partition)[0].name, token] for lane, partition, token in self._names.get(step, [])
        ]

    def validation_rows(self, tokens: int) -> TokenSequences:
        """Rows over the held-out partitions, as many of them as `tokens` tokens take."""
        parts, held = [], 0
        for partition in self.validation_partitions:
            parts.append(self._tokenize(partition))
            held += len(parts[-1])
            if held > tokens:
                break
        return TokenSequences(parts, self.shape.block_size, name="validation")

    def state_dict(self) -> dict:
        """The places of this process's lanes; the union over processes is the state of the run."""
        return {"next_step": self.next_step, "lanes": {str(lane): place for lane, place in self.positions.items()}}

    def load_state_dict(self, state: dict):
        """Go on from a state that holds all lanes, saved by any number of processes."""
        self.next_step = state["next_step"]
        self.positions = {lane: list(state["lanes"][str(lane)]) for lane in self.positions}
        self._ahead.clear()  # read for another place

    def close(self):
        """Stop reading ahead."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _next_row(self, lane: int) -> np.ndarray:
        """The lane's next T + 1 ids; its place moves on by T."""
        (partition, place), opened = self.positions[lane], 0
        row, filled = np.empty(self.shape.block_size + 1, dtype=np.int64), 0
        while True:
            ids = self._partition_ids(lane, partition)
            part = ids[place : place + len(row) - filled]
            row[filled : filled + len(part)] = part
            filled, place = filled + len(part), place + len(part)
            if filled == len(row):
                break
            partition, place, opened = partition + 1, 0, opened + 1
            if not filled and opened > len(self.partitions):
                raise ValueError("there is no text in the source: every document is empty.")
        # The last id is the first input of the next row; it may be the only one taken from its partition.
        self.positions[lane] = [partition, place - 1]
        return row

    def _partition_ids(self, lane: int, number: int) -> np.ndarray:
        """Ids of the lane's partition number `number`; the one after it is being read meanwhile."""
        if self._open.get(lane, (-1, None))[0] != number:
            future = self._ahead.pop((lane, number), None) or self._pool.submit(self._read, lane, number)
            self._open[lane] = (number, future.result())
            self._ahead[lane, number + 1] = self._pool.submit(self._read, lane, number + 1)
        return self._open[lane][1]

    def _read(self, lane: int, number: int) -> np.ndarray:
        partition, shuffle = self._partition(lane, number)
        return self._tokenize(partition, shuffle)

    def _partition(self, lane: int, number: int) -> tuple[Partition, tuple[int, int, int]]:
        """The lane's partition number `number`, and what seeds the order of its documents."""
        epoch, within = divmod(int(number) * self.lanes + int(lane), len(self.partitions))
        draws = np.random.PCG64(np.random.SeedSequence([self.shape.seed, epoch])).random_raw(len(self.partitions))
        return self.partitions[int(np.argsort(draws, kind="stable")[within])], (self.shape.seed, epoch, within)

    def _tokenize(self, partition: Partition, shuffle: tuple[int, ...] | None = None) -> np.ndarray:
        documents = list(self.source.read(partition))
        # Pieces of one text stay in their order; documents of their own are shuffled.
        if shuffle and not any(document.continues for document in documents):
            draws = np.random.PCG64(np.random.SeedSequence(shuffle)).random_raw(len(documents))
            documents = [documents[i] for i in np.argsort(draws, kind="stable")]
        return tokenize_documents(documents, self.encode, self.end_of_text, validation_share=0.0).ids["train"]
