"""Training straight from a source, without shards on disk; the order does not depend on the number of processes.

    L  logical shards          P  processes          R  sequences of an optimizer step          T  tokens of a sequence

A source has partitions, such as the row groups of parquet files. Dealt to processes, they would come in another order
when a run resumes on more or fewer of them. So they are dealt to L logical shards, as many as the source allows for
whatever the number of processes, and a process reads several of those:

    partitions, shuffled by (seed, epoch), epoch after epoch:   6  2  5  0 | 0  5  ...         L = 2
    logical shard 0 reads every L-th of them from the first:    6     5      0
    logical shard 1 from the second:                               2     0      5

A logical shard is one endless run of tokens, cut into sequences of T + 1 that overlap by one. Sample g of the training
is the next sequence of logical shard g mod L, and process p reads the logical shards p, p + P, p + 2P, ...

The order cannot be computed from the step: how many tokens a partition holds is known only after it was read. So the
state has two numbers for each logical shard, the partition that it has come to and the token in it.
"""

import hashlib
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from modeling_gpt2repro.data.sources.documents import Partition
from modeling_gpt2repro.data.sources.resolve import Source
from modeling_gpt2repro.data.tokenize import tokenize_documents
from modeling_gpt2repro.data.tokenizer import text_encoder
from modeling_gpt2repro.storage.hub_files import OnWait

from .sequences import TokenSequences
from .shuffled import SHUFFLES, BatchConfig, TrainingBatches, seeded_permutation, split_into_micro_batches

MAX_LOGICAL_SHARDS = 64  # most processes a stream is read by; each keeps up to two tokenized partitions in memory
REMEMBERED_STEPS = 4096  # whose sequences can still be named: 50 MB where a process takes 512 of a step


class Position(NamedTuple):
    """Where the next sequence of a logical shard begins."""

    turn: int  # which of the logical shard's partitions, counted on through the epochs
    token: int  # which of the partition's tokens


class StreamedBatches(TrainingBatches):
    """The training batches of one process, from step `next_step` on, and the validation sequences beside them.

    Args:
        source: Where the partitions come from; at least two.
        config: Its seed decides the order of partitions, and of documents within them.
        validation_share: Part of the partitions, chosen by hash, that is never trained on; at least one.
        max_logical_shards: L is at most this. Another value is another order.

    Raises:
        ValueError: If the source has too few partitions for a validation split or for this number of processes; later,
            if there is no text in it.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerFast,
        config: BatchConfig,
        validation_share: float = 0.001,
        threads: int = 4,
        max_logical_shards: int = MAX_LOGICAL_SHARDS,
    ):
        self.source = source
        self.config = config
        self.encode = text_encoder(tokenizer)
        self.end_of_text = tokenizer.eos_token_id
        self.partitions, self.validation_partitions = hold_out_partitions(source, validation_share)
        largest = largest_share(self.partitions)
        most = min(max_logical_shards, len(self.partitions))
        # Each of L logical shards is one L-th of what is read. If a partition holds more of the text than that, the
        # others are repeated before it has been read once: up to 42 times if it holds 40 % of the text and L is 64, but
        # 4 times if it holds at most two L-ths. Runs in the order of older versions keep their L.
        if config.order == "keyed":
            most = min(most, int(2 / largest))
        # The largest power of two, so that 2, 4, 8, ... processes share evenly.
        self.num_logical_shards = 1 << (most.bit_length() - 1)
        if self.num_logical_shards < config.num_processes:
            raise ValueError(
                f"{config.num_processes} processes cannot share the {self.num_logical_shards} logical shards of this "
                f"stream, whose largest partition holds {largest:.1%} of its text: use at most "
                f"{self.num_logical_shards}, or prepare the data and give --shards."
            )
        self.shuffle = SHUFFLES[config.order](len(self.partitions), [config.seed])
        self.next_step = 0
        mine = range(config.process_index, self.num_logical_shards, config.num_processes)
        self.positions = {logical_shard: Position(0, 0) for logical_shard in mine}
        self._sample_ids: dict[int, np.ndarray] = {}  # step -> (n, 3): logical shard and position of each sequence
        self._current: dict[int, tuple[int, np.ndarray]] = {}  # logical shard -> turn and ids of the open partition
        self._read_ahead: dict[tuple[int, int], Future] = {}  # logical shard and turn -> ids
        self._is_closed = False
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="stream")

    @property
    def micro_batch_shape(self) -> tuple[int, int]:
        """Micro-batches of a step on each process, and sequences of each, enough for the process that has the most."""
        num_processes = self.config.num_processes
        # A step takes `rounds` sequences of each logical shard, and one more of `rest` neighbours among them.
        rounds, rest = divmod(self.config.sequences_per_step, self.num_logical_shards)
        most_shards = -(-self.num_logical_shards // num_processes)
        # Of `rest` neighbours a process has every P-th; where P does not divide L it may have one more, as the
        # neighbours go round from L - 1 to 0.
        is_uneven = self.num_logical_shards % num_processes > 0
        most_of_rest = min(most_shards, -(-rest // num_processes) + is_uneven)
        return split_into_micro_batches(rounds * most_shards + most_of_rest, self.config.micro_batch_size)

    @property
    def sequences_per_epoch(self) -> int | None:
        """Not known: it takes all tokens of the source to count them."""
        return None

    def read_step(self, step: int) -> list[np.ndarray]:
        """The ids of each of the step's micro-batches; the positions move on."""
        assert step == self.next_step, "a stream is read in order; load_state_dict sets its step"
        first_sample = step * self.config.sequences_per_step
        if self.config.overfit_one_batch:  # from the beginning again
            self.positions = dict.fromkeys(self.positions, Position(0, 0))
            first_sample = 0
        samples = range(first_sample, first_sample + self.config.sequences_per_step)
        logical_shards = [sample % self.num_logical_shards for sample in samples]
        mine = [logical_shard for logical_shard in logical_shards if logical_shard in self.positions]
        for logical_shard, position in self.positions.items():
            if not self._is_open(logical_shard, position.turn):
                self._start_reading(logical_shard, position.turn)
        sample_ids = []
        step_ids = []
        num_micro_batches, size = self.micro_batch_shape
        for first in range(0, num_micro_batches * size, size):
            sequences = []
            for logical_shard in mine[first : first + size]:
                sample_ids.append([logical_shard, *self.positions[logical_shard]])
                sequences.append(self._next_sequence(logical_shard))
            step_ids.append(np.array(sequences, dtype=np.int64).reshape(-1, self.config.block_size + 1))
        self._sample_ids[step] = np.array(sample_ids, dtype=np.int64).reshape(-1, 3)
        self._sample_ids.pop(step - REMEMBERED_STEPS, None)
        self.next_step += 1
        return step_ids

    def sample_ids(self, step: int) -> list:
        """What this process took in a recent step: [partition, its token] where each sequence begins."""
        return [
            [self._partition(logical_shard, turn)[0].name, token]
            for logical_shard, turn, token in self._sample_ids.get(step, np.empty((0, 3))).tolist()
        ]

    def validation_sequences(self, tokens: int) -> TokenSequences:
        """Sequences over the held-out partitions, as many of them as `tokens` tokens take."""
        shards = []
        num_ids = 0
        for partition in self.validation_partitions:
            shards.append(self._tokenize(partition))
            num_ids += len(shards[-1])
            if num_ids > tokens:
                break
        return TokenSequences(shards, self.config.block_size, name="validation")

    def state_dict(self) -> dict:
        """The positions of this process's logical shards; the union over processes is the state of the run."""
        positions = {str(logical_shard): list(position) for logical_shard, position in self.positions.items()}
        return {"next_step": self.next_step, "lanes": positions}  # "lanes": the name in the checkpoints' files

    def load_state_dict(self, state: dict):
        """Resume from a state that holds all logical shards, saved by any number of processes."""
        if len(state["lanes"]) != self.num_logical_shards:
            raise ValueError(f"it has {len(state['lanes'])} logical shards, and this stream {self.num_logical_shards}")
        self.next_step = state["next_step"]
        self.positions = {shard: Position(*state["lanes"][str(shard)]) for shard in self.positions}
        self._read_ahead.clear()  # it belongs to other positions

    def close(self):
        """Stop reading ahead. What is being read is not waited for here, but at the end of the program."""
        self._is_closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _next_sequence(self, logical_shard: int) -> np.ndarray:
        """The logical shard's next T + 1 ids, (T + 1,) int64; its position moves on by T."""
        turn, token = self.positions[logical_shard]
        sequence = np.empty(self.config.block_size + 1, dtype=np.int64)
        filled = 0
        num_finished = 0
        while True:
            part = self._partition_ids(logical_shard, turn)[token:][: len(sequence) - filled]
            sequence[filled : filled + len(part)] = part
            filled += len(part)
            token += len(part)
            if filled == len(sequence):
                break
            turn += 1
            token = 0
            num_finished += 1
            if not filled and num_finished > len(self.partitions):  # else it would read epoch after epoch forever
                raise ValueError("there is no text in the source: every document is empty.")
        # One token back, because the last target is the next sequence's first input.
        self.positions[logical_shard] = Position(turn, token - 1)
        return sequence

    def _partition_ids(self, logical_shard: int, turn: int) -> np.ndarray:
        """Ids (n,) of the logical shard's partition; the one after it is read in the background meanwhile."""
        if not self._is_open(logical_shard, turn):
            self._start_reading(logical_shard, turn)
            self._current[logical_shard] = (turn, self._read_ahead.pop((logical_shard, turn)).result())
            self._start_reading(logical_shard, turn + 1)
        return self._current[logical_shard][1]

    def _is_open(self, logical_shard: int, turn: int) -> bool:
        return logical_shard in self._current and self._current[logical_shard][0] == turn

    def _start_reading(self, logical_shard: int, turn: int):
        if (logical_shard, turn) not in self._read_ahead:
            self._read_ahead[logical_shard, turn] = self._pool.submit(self._read, logical_shard, turn)

    def _read(self, logical_shard: int, turn: int) -> np.ndarray:
        partition, document_seed = self._partition(logical_shard, turn)

        def on_wait(reason: str):
            self.problem = f"{partition.location} cannot be read: {reason}"
            if self._is_closed:  # the program's end would wait for the attempts that are left
                raise CancelledError

        try:
            ids = self._tokenize(partition, document_seed, on_wait)
        except OSError as error:
            raise OSError(f"{partition.location} cannot be read: {error}") from error
        self.problem = None
        return ids

    def _partition(self, logical_shard: int, turn: int) -> tuple[Partition, tuple[int, int, int]]:
        """The partition that the logical shard reads at this turn, and what seeds the order of its documents."""
        position = turn * self.num_logical_shards + logical_shard
        (index,) = self.shuffle.indices(np.array([position]))
        epoch, within_epoch = divmod(position, len(self.partitions))
        return self.partitions[int(index)], (self.config.seed, epoch, within_epoch)

    def _tokenize(
        self,
        partition: Partition,
        document_seed: tuple[int, ...] | None = None,
        on_wait: OnWait = lambda reason: None,
    ) -> np.ndarray:
        documents = list(self.source.read(partition, on_wait=on_wait))
        # Documents are shuffled, or neighbours in the source would be neighbours in every epoch; the pieces of one text
        # stay in their order.
        if document_seed and not any(document.continues for document in documents):
            documents = [documents[index] for index in seeded_permutation(len(documents), document_seed)]
        return tokenize_documents(documents, self.encode, self.end_of_text, validation_share=0.0).ids["train"]


def largest_share(partitions: list[Partition]) -> float:
    """Share of the text that the largest partition holds, from 0 to 1; unknown sizes count as equal ones."""
    sizes = [partition.text_bytes for partition in partitions]
    return max(sizes) / sum(sizes) if all(sizes) else 1 / len(sizes)


def hold_out_partitions(source: Source, validation_share: float) -> tuple[list[Partition], list[Partition]]:
    """The partitions to train on, in their order, and those held out for validation.

    Raises:
        ValueError: If there are less than two.
    """
    if len(source.partitions) < 2:
        raise ValueError(
            "streaming needs two partitions or more, one for validation: use prepare_data.py and give --shards."
        )
    # By a hash of the name, so that it depends neither on the seed nor on the machine.
    by_hash = sorted(source.partitions, key=lambda partition: hashlib.sha256(partition.name.encode()).digest())
    validation = by_hash[: max(1, round(validation_share * len(by_hash)))]
    held_out = set(validation)
    return [partition for partition in source.partitions if partition not in held_out], validation
