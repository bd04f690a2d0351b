"""Stream packed, masked batches from shards: endless, resumable at any step, the same for any number of ranks.

Bins have one global index i, counted from the start of the run. With N streams and W ranks, bin i is number i // N of
stream i % N, and rank i % W trains on it. Streams, masks and dropout are pure functions of (seed, i); ranks and loader
workers only divide the work. A stream's position refers to chunks and never contains tokens, so a run can resume at any
step, on any number of ranks that divides N.

The stages of a stream are generators, each of which consumes the one before:

    splits -> chunks -> documents (order.py) -> pieces of every source (source_cursor.py)
        -> bins (packing_buffer.py) -> batches
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megabert.data.batch import Bin, PackedBatch, Shapes, lay_out
from megabert.data.batch_schedule import BatchSchedule, Length, MaskingRate, MaskingSteps, make_schedule
from megabert.data.bin_shape import check_max_documents
from megabert.data.chunk_pieces import PieceOptions
from megabert.data.masking import masked_count
from megabert.data.order import StreamOrder
from megabert.data.packing_buffer import PackingBuffer
from megabert.data.ranks import worker_count
from megabert.data.shards.manifest import TokenizerInfo
from megabert.data.shards.source import Corpus
from megabert.data.source_cursor import SourcePosition
from megabert.files.checkpoint_format import STREAMS_FORMAT, check_streams_format
from megabert.process.subprocesses import exit_with_parent, use_short_socket_paths

log = logging.getLogger(__name__)

T = TypeVar("T")

# A packing buffer holds one bin plus LOOK_AHEAD_PIECES longest pieces, at most LOOK_AHEAD_BINS bins in all: enough to
# fill a bin of 16 longest pieces to 99.5 %.
LOOK_AHEAD_PIECES = 64
LOOK_AHEAD_BINS = 4
# Each loader worker has this many batches ready.
PREFETCHED = 4
# A loader that gives nothing for this long, beyond the patience with its stores, has failed: even a shard of gigabytes,
# fetched as a whole, takes less.
LOADER_TIMEOUT_S = 600

# The purpose of a random number is one part of the key of the counter-based generator; the bin's index is the other.
MASKING, DROPOUT, HELD_OUT = 1, 2, 3

# Evaluation does not use the run's seed, so that held-out losses of different runs are about the same masked tokens.
EVALUATION_SEED = 0


@dataclass(frozen=True)
class Position:
    """How far one stream has been read: everything that is needed to resume it, small and plain.

    bins: bins issued so far or skipped by a rollback. sources: one position for each source.
    """

    bins: int = 0
    sources: tuple[SourcePosition, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain containers, whose keys are part of the format of a checkpoint."""
        return {"bins": self.bins, "sources": [source.to_json() for source in self.sources]}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Position":
        return cls(raw["bins"], tuple(SourcePosition.from_json(source) for source in raw["sources"]))

    @property
    def skipped(self) -> int:
        """Damaged chunks that this stream has skipped so far."""
        return sum(source.skipped for source in self.sources)


def positions_to_json(positions: Mapping[int, Position]) -> dict[str, Any]:
    """Return the content of a checkpoint's streams.json. positions: each stream's position, by its number."""
    streams = {str(stream): positions[stream].to_json() for stream in sorted(positions)}
    return {"format": STREAMS_FORMAT, "streams": streams}


def positions_from_json(raw: dict[str, Any], where: str, new_pass: bool = False) -> dict[int, Position]:
    """Parse a checkpoint's streams.json. Raises ValueError if it is damaged, or of another version.

    where: names the file in these errors. new_pass: give streams of an earlier version, which had another order of
    documents, at the start of a pass over the data; only their counts of bins are kept.
    """
    found = check_streams_format(raw, where, new_pass)
    try:
        if found == STREAMS_FORMAT:
            return {int(stream): Position.from_json(position) for stream, position in raw["streams"].items()}
        streams = raw if found == 1 else raw["streams"]
        return {int(stream): Position(position["bins"]) for stream, position in streams.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: damaged: it does not list the positions of streams: {error!r}.") from error


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How bins are made; PackedBatch and Shapes explain the letters.

    max_documents: D_max for every max_seq_len of the schedule. max_masked: M_max.
    """

    bin_tokens: int
    schedule: BatchSchedule
    max_documents: dict[int, int] = field(hash=False)
    max_masked: int
    masking: MaskingRate | MaskingSteps
    truncate: bool
    seed: int
    num_streams: int

    def __post_init__(self):
        for stage in self.schedule.stages:
            check_max_documents(self.max_documents[stage.max_seq_len], self.bin_tokens, stage.max_seq_len)

    def shapes(self, max_seq_len: int) -> Shapes:
        return Shapes(self.bin_tokens, self.max_documents[max_seq_len], self.max_masked)

    def piece_options(self, index: int) -> PieceOptions:
        """Return how the pieces of bin `index` are cut."""
        return PieceOptions(self.schedule.at(index).max_seq_len, self.truncate)


def philox(seed: int, purpose: int, index: int) -> np.random.Generator:
    """Return the random generator of one bin: a pure function of its arguments, cheap for any index."""
    key = np.array([seed, purpose], dtype=np.uint64)
    # The counters of two bins are 2^128 numbers apart, so no two bins share random numbers.
    counter = np.array([0, 0, index, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def open_stream(
    corpus: Corpus, config: StreamConfig, stream: int, position: Position, first_index: int = 0
) -> Iterator[tuple[PackedBatch, Position]]:
    """Yield one stream's batches from a position on, each with the position after it.

    Bins after the position but below first_index are packed and dropped: a rollback skips them.
    """
    stream_order = StreamOrder(stream, config.num_streams, config.seed, config.bin_tokens)
    bins = position.bins
    # The waiting pieces were cut for the last bin that was issued.
    last_index = max(0, bins - 1) * config.num_streams + stream
    mixture = config.schedule.at(last_index).mixture
    buffer = PackingBuffer(corpus, stream_order, config.piece_options(last_index), position.sources, mixture)
    while True:
        index = bins * config.num_streams + stream
        stage = config.schedule.at(index)
        max_seq_len = stage.max_seq_len
        if (max_seq_len, stage.mixture) != (buffer.options.max_seq_len, buffer.mixture):
            buffer = buffer.next_phase(max_seq_len, stage.mixture)
        chosen = next_bin(buffer, config)
        assert chosen is not None, f"stream {stream} has no bin {index}: its shards gave no more pieces"
        bins += 1
        if index >= first_index:
            rng = philox(config.seed, MASKING, index)
            yield (
                make_batch(chosen, index, max_seq_len, corpus.tokenizer, config, rng),
                Position(bins, buffer.position()),
            )


def next_bin(buffer: PackingBuffer, config: StreamConfig) -> Bin | None:
    """Fill the packing buffer and take the next bin from it, or None if no piece is left."""
    longest = buffer.options.max_seq_len
    look_ahead = config.bin_tokens + min((LOOK_AHEAD_BINS - 1) * config.bin_tokens, LOOK_AHEAD_PIECES * longest)
    buffer.fill(look_ahead)
    return buffer.next_bin(config.bin_tokens, config.max_documents[longest], look_ahead)


def make_batch(
    chosen: Bin, index: int, max_seq_len: int, tokenizer: TokenizerInfo, config: StreamConfig, rng: np.random.Generator
) -> PackedBatch:
    """Lay out and mask a bin, as the batch with global index `index`."""
    return lay_out(
        chosen,
        config.shapes(max_seq_len),
        index=index,
        max_seq_len=max_seq_len,
        mlm_probability=config.masking.at(index),
        tokenizer=tokenizer,
        rng=rng,
    )


class BatchStream(IterableDataset):
    """The batches of one rank in order of their index, as (batch, stream, position after it)."""

    def __init__(
        self,
        corpus: Corpus,
        config: StreamConfig,
        *,
        rank: int,
        world_size: int,
        positions: Mapping[int, Position],
        first_index: int,
    ):
        super().__init__()
        assert config.num_streams % world_size == 0, (
            f"{config.num_streams} streams cannot be shared evenly by {world_size} ranks"
        )
        for size in config.schedule.batches_per_step:
            if size % world_size:
                raise ValueError(f"a step of {size} micro-batches cannot be shared evenly by {world_size} ranks.")
        assert first_index % world_size == 0, f"a step begins with bin {first_index}, no multiple of {world_size} ranks"
        self.corpus = corpus
        self.config = config
        self.rank = rank
        self.world_size = world_size
        self.positions = positions
        self.first_index = first_index

    def __iter__(self) -> Iterator[tuple[PackedBatch, int, Position]]:
        worker = get_worker_info()
        part, parts = (worker.id, worker.num_workers) if worker else (0, 1)
        streams: dict[int, Iterator[tuple[PackedBatch, Position]]] = {}
        index = self.first_index + self.rank + part * self.world_size
        while True:
            stream = index % self.config.num_streams
            if stream not in streams:
                position = self.positions.get(stream, Position())
                streams[stream] = open_stream(self.corpus, self.config, stream, position, self.first_index)
            batch, after = next(streams[stream])
            assert batch.index == index, f"stream {stream} gave bin {batch.index}, expected {index}"
            yield batch, stream, after
            index += parts * self.world_size


def open_loader(dataset: BatchStream, num_workers: int, pin_memory: bool = False) -> DataLoader:
    """Open a loader whose workers pack and mask batches, so that the training process only receives them, in order.

    With workers, it raises RuntimeError if no batch arrives for LOADER_TIMEOUT_S and its stores' patience, or if a
    worker dies.
    """
    streams = dataset.config.num_streams // dataset.world_size
    workers = worker_count(num_workers, streams)
    if workers != num_workers:
        log.info("data.num_workers: %d, because %d do not divide this rank's %d streams", workers, num_workers, streams)
    patience_s = max(source.storage.patience_s for source in dataset.corpus.sources)
    if workers:
        use_short_socket_paths()
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        collate_fn=_identity,
        worker_init_fn=_init_worker,
        prefetch_factor=PREFETCHED if workers else None,
        timeout=LOADER_TIMEOUT_S + int(patience_s) if workers else 0,
        pin_memory=pin_memory,
    )


def _identity(batch: T) -> T:
    return batch


def _init_worker(_: int) -> None:
    """Give the worker one thread, because other cores are busy with the model, and let only its parent stop it.

    A stop signal to the whole process group is meant for the rank, which still needs batches to finish its step. A
    parent that dies takes the worker with it.
    """
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A forked worker shares the rank's wakeup descriptor, and the rank would take the worker's signals for its own.
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    # This starts a thread, which must not take the SIGTERM either, so the signal is blocked before.
    exit_with_parent()
    threading.Thread(target=_exit_when_parent_asks, name="sigterm", daemon=True).start()


def _exit_when_parent_asks() -> None:
    """Exit at a SIGTERM from the parent: an exiting process sends it to its workers and waits for them."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def held_out_batches(corpus: Corpus, config: StreamConfig, mlm_probability: float, max_bins: int) -> list[PackedBatch]:
    """Pack the fixed list of bins for evaluation: held-out documents in shard order, masked with a fixed seed.

    Returns at most max_bins. Where the documents end, the last bin is filled up with [PAD]. Pieces have the length of
    the run's last phase.
    """
    config = evaluation_config(config, mlm_probability)
    buffer = PackingBuffer(corpus, StreamOrder(0, 1, None, config.bin_tokens), config.piece_options(0), ())
    bins = iter(lambda: next_bin(buffer, config), None)
    return [
        make_batch(
            chosen,
            index,
            buffer.options.max_seq_len,
            corpus.tokenizer,
            config,
            philox(EVALUATION_SEED, HELD_OUT, index),
        )
        for index, chosen in enumerate(islice(bins, max_bins))
    ]


def evaluation_config(config: StreamConfig, mlm_probability: float) -> StreamConfig:
    """Return the config of the run's last stage with the masking of the evaluation."""
    schedule = make_schedule(1, 1, [Length(config.schedule.stages[-1].max_seq_len, 1.0)])
    max_masked = masked_count(config.bin_tokens, mlm_probability)
    return replace(config, schedule=schedule, masking=MaskingRate.constant(mlm_probability), max_masked=max_masked)


def filler_batch(tokenizer: TokenizerInfo, config: StreamConfig, mlm_probability: float, index: int) -> PackedBatch:
    """Make a batch of [PAD] only, without labels. Ranks with fewer held-out bins compute it to stay in step."""
    config = evaluation_config(config, mlm_probability)
    empty = Bin((), np.empty(0, dtype=np.int64))
    rng = philox(EVALUATION_SEED, HELD_OUT, index)
    return make_batch(empty, index, config.schedule.longest, tokenizer, config, rng)
