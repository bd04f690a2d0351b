"""From shards to packed, masked batches: endless, exact, and the same whatever the cluster.

Bins have one global index i, counted from the start of the run. With N streams and W ranks, bin i is number i // N of
stream i % N, and belongs to rank i % W. Streams, masks and dropout are pure functions of (seed, i); ranks and loader
workers only divide the work. A stream's position is references to where it reads, never tokens, so a run resumes at any
step on any number of ranks that divides N.

The stages of one stream, each a generator over the one before:

    splits -> chunks -> pieces, of every source (window.py) -> bins -> batches
"""

import logging
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megabert.data.batch import Bin, PackedBatch, Shapes, lay_out
from megabert.data.chunk_pieces import Cutting
from megabert.data.masking import masked_count
from megabert.data.packing import SPECIALS_PER_PIECE
from megabert.data.packing_buffer import LanePosition, StreamOf, Window
from megabert.data.schedule import Length, MaskingRate, Plan, make_plan
from megabert.data.shards.manifest import TokenizerInfo
from megabert.data.shards.source import Corpus

log = logging.getLogger(__name__)

# Pieces wait in a window of the next bin's tokens and this many longest pieces more, at most LOOK_AHEAD_BINS bins in all:
# enough to choose from that bins of 16 longest pieces are 99.5 % full, and little to hold where bins are long.
LOOK_AHEAD_PIECES = 64
LOOK_AHEAD_BINS = 4
PREFETCHED = 4  # batches that each loader worker has ready

# What a random number is for: one part of the counter-based generator's key, the bin's index is the other.
MASKING, DROPOUT, HELD_OUT = 1, 2, 3
EVALUATION_SEED = 0  # not the run's: held-out losses of different runs are about the same masked tokens


@dataclass(frozen=True)
class Position:
    """Where one stream stands after some bins: small, plain, and all that resuming needs.

    bins: bins issued, or left behind by a rollback. lanes: one place per source.
    """

    bins: int = 0
    lanes: tuple[LanePosition, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"bins": self.bins, "lanes": [lane.to_json() for lane in self.lanes]}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Position":
        return cls(raw["bins"], tuple(LanePosition.from_json(lane) for lane in raw["lanes"]))

    @property
    def skipped(self) -> int:
        """Damaged chunks that this stream went past so far."""
        return sum(lane.skipped for lane in self.lanes)


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How bins are made. max_documents: D_max, for every max_seq_len of the plan. See PackedBatch for the letters."""

    bin_tokens: int
    plan: Plan
    max_documents: dict[int, int] = field(hash=False)
    max_masked: int
    masking: MaskingRate
    truncate: bool
    seed: int
    num_streams: int

    def __post_init__(self):
        for stage in self.plan.stages:
            least = -(-2 * self.bin_tokens // stage.max_seq_len)  # filler may need half of them
            most = self.max_documents[stage.max_seq_len]
            if most < least:
                raise ValueError(
                    f"data.max_documents is {most}, expected at least {least}: "
                    f"twice the {self.bin_tokens} tokens in pieces of {stage.max_seq_len}."
                )

    def shapes(self, max_seq_len: int) -> Shapes:
        return Shapes(self.bin_tokens, self.max_documents[max_seq_len], self.max_masked)

    def cutting(self, index: int) -> Cutting:
        """How the pieces of bin `index` are cut."""
        return Cutting(self.plan.at(index).max_seq_len, self.truncate)


def philox(seed: int, purpose: int, index: int) -> np.random.Generator:
    """Give the random numbers of one bin: a pure function of its arguments, cheap for any index."""
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, index, 0], dtype=np.uint64)  # 2^128 numbers between two bins
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def default_max_documents(corpus: Corpus, bin_tokens: int, max_seq_len: int) -> int:
    """D_max: four times the pieces of median length that fill a bin, so that only a burst of short ones meets it."""
    median = min(corpus.median_document_tokens + SPECIALS_PER_PIECE, max_seq_len)
    return -(-4 * bin_tokens // max(SPECIALS_PER_PIECE + 1, median))


def open_stream(
    corpus: Corpus, config: StreamConfig, stream: int, position: Position, first_index: int = 0
) -> Iterator[tuple[PackedBatch, Position]]:
    """Yield one stream's batches from a position on, each with the position after it.

    Bins below first_index that the position has not passed are left behind: a rollback goes on after them.
    """
    number = StreamOf(stream, config.num_streams, config.seed)
    bins = position.bins
    before = max(0, bins - 1) * config.num_streams + stream  # the last bin issued: what waits is cut as for that one
    window = Window(corpus, number, config.cutting(before), position.lanes)
    while True:
        index = bins * config.num_streams + stream
        max_seq_len = config.plan.at(index).max_seq_len
        if max_seq_len != window.cutting.max_seq_len:
            window = window.next_phase(max_seq_len)
        chosen = next_bin(window, config)
        assert chosen is not None, "training shards have no end"
        bins += 1
        if index >= first_index:
            rng = philox(config.seed, MASKING, index)
            yield finish(chosen, index, max_seq_len, corpus.tokenizer, config, rng), Position(bins, window.position())


def next_bin(window: Window, config: StreamConfig) -> Bin | None:
    """Choose the next bin of a window, from as much as may wait."""
    longest = window.cutting.max_seq_len
    look_ahead = config.bin_tokens + min((LOOK_AHEAD_BINS - 1) * config.bin_tokens, LOOK_AHEAD_PIECES * longest)
    window.fill(look_ahead)
    return window.next_bin(config.bin_tokens, config.max_documents[longest], look_ahead)


def finish(
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
    """The batches of one rank, in order of their index, as (batch, stream, position after it)."""

    def __init__(
        self,
        corpus: Corpus,
        config: StreamConfig,
        *,
        rank: int,
        world_size: int,
        positions: dict[int, Position],
        first_index: int,
    ):
        super().__init__()
        if config.num_streams % world_size:
            raise ValueError(
                f"the data has {config.num_streams} streams, which {world_size} ranks cannot share evenly. Use a number of "
                f"ranks that divides {config.num_streams}, or set data.max_streams to a multiple of {world_size}."
            )
        for size in config.plan.step_batches:
            if size % world_size:
                raise ValueError(f"a step of {size} micro-batches cannot be shared evenly by {world_size} ranks.")
        assert first_index % world_size == 0, "a step begins with rank 0"
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


def worker_count(wanted: int, streams_per_rank: int) -> int:
    """Round down to a divisor of a rank's streams, so that each stream lives in one worker."""
    return max((n for n in range(1, wanted + 1) if streams_per_rank % n == 0), default=0)


def open_loader(dataset: BatchStream, num_workers: int, pin_memory: bool = False) -> DataLoader:
    """Pack and mask in worker processes; the training process only receives. Batches keep their order."""
    streams = dataset.config.num_streams // dataset.world_size
    workers = worker_count(num_workers, streams)
    if workers != num_workers:
        log.info("data.num_workers: %d, because %d do not divide this rank's %d streams", workers, num_workers, streams)
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        collate_fn=_as_it_is,
        worker_init_fn=_start_worker,
        prefetch_factor=PREFETCHED if workers else None,
        pin_memory=pin_memory,
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """One thread each: the workers are the parallelism, and the other cores have a model to train."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # What tells a whole process group to stop is for the rank, which still needs batches to finish its step; a worker ends with it.
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def held_out_batches(corpus: Corpus, config: StreamConfig, mlm_probability: float, max_bins: int) -> list[PackedBatch]:
    """The fixed list of bins to evaluate on: the held-out documents in shard order, masked with a fixed seed.

    At most max_bins; the last one is filled up with [PAD] where the documents end. Pieces are as long as the run's last.
    """
    config = evaluation_config(config, mlm_probability)
    window = Window(corpus, StreamOf(0, 1, None), config.cutting(0), ())
    bins = iter(lambda: next_bin(window, config), None)
    return [
        finish(
            chosen,
            index,
            window.cutting.max_seq_len,
            corpus.tokenizer,
            config,
            philox(EVALUATION_SEED, HELD_OUT, index),
        )
        for index, chosen in enumerate(islice(bins, max_bins))
    ]


def evaluation_config(config: StreamConfig, mlm_probability: float) -> StreamConfig:
    """The bins of the run's last stage with evaluation's masking."""
    plan = make_plan(1, 1, [Length(config.plan.stages[-1].max_seq_len, 1.0)])
    max_masked = masked_count(config.bin_tokens, mlm_probability)
    return replace(config, plan=plan, masking=MaskingRate.constant(mlm_probability), max_masked=max_masked)


def filler_batch(tokenizer: TokenizerInfo, config: StreamConfig, mlm_probability: float, index: int) -> PackedBatch:
    """A batch of nothing: all [PAD], no labels. Ranks that run out of held-out bins compute it, so that all stay in step."""
    config = evaluation_config(config, mlm_probability)
    nothing = Bin((), np.empty(0, dtype=np.int64))
    rng = philox(EVALUATION_SEED, HELD_OUT, index)
    return finish(nothing, index, config.plan.longest, tokenizer, config, rng)
