"""From shards to packed, masked batches: endless, exact, and the same whatever the cluster.

Bins have one global index i, counted from the start of the run. With N streams and W ranks, bin i is number i // N of
stream i % N, and belongs to rank i % W. Streams, masks and dropout are pure functions of (seed, i); ranks and loader
workers only divide the work. A stream's position is references to where it reads, never tokens, so a run resumes at any
step on any number of ranks that divides N.

The stages of one stream, each a generator over the one before:

    splits -> chunks -> pieces -> bins
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from megabert.data.masking import mask, masked_count
from megabert.data.packing import SPECIALS_PER_PIECE, choose, cut, filler_lengths
from megabert.data.shards import Source, SplitOrder, TokenizerInfo

LOOK_AHEAD_BINS = 4  # pieces wait in a window of at most this many bins' tokens

# What a random number is for: one part of the counter-based generator's key, the bin's index is the other.
MASKING, DROPOUT, HELD_OUT = 1, 2, 3
EVALUATION_SEED = 0  # not the run's: held-out losses of different runs are about the same masked tokens


class PackedBatch(NamedTuple):
    """One bin. Every shape is the same for all bins of a phase.

    input_ids, position_ids: (T,) int32; positions count from 0 in each piece.
    cu_seqlens: (D_max + 1,) int32 from 0 to T, then T again for the places unused: empty sequences.
    masked_positions: (M_max,) int32 into T; masked_labels: (M_max,) int32, -100 at unused places (position 0).
    max_seqlen: int, the phase's constant bound. index: i. num_masked: labels in use. num_tokens: real tokens, specials
    counted, filler not. sum_squared_lengths: over real pieces, for counting attention's FLOPs.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    masked_positions: torch.Tensor
    masked_labels: torch.Tensor
    max_seqlen: int
    index: int
    num_masked: int
    num_tokens: int
    sum_squared_lengths: int

    def model_inputs(self, device: torch.device) -> dict[str, Any]:
        """What the model's forward takes, on its device."""
        tensors = ("input_ids", "position_ids", "cu_seqlens", "masked_positions", "masked_labels")
        moved: dict[str, Any] = {name: getattr(self, name).to(device, non_blocking=True) for name in tensors}
        return moved | {"max_seqlen": self.max_seqlen}


@dataclass(frozen=True)
class Position:
    """Where one stream stands after some bins: small, plain, and all that resuming needs.

    bins: bins issued. entry, chunk: the oldest chunk with a piece still waiting, as the stream's entry number and the
    chunk within it. taken: one bit per piece from there to the last one loaded, set where it is already in a bin.
    """

    bins: int = 0
    entry: int = 0
    chunk: int = 0
    taken: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=bool))

    def to_json(self) -> dict[str, Any]:
        packed = base64.b64encode(np.packbits(self.taken).tobytes()).decode()
        return {"bins": self.bins, "entry": self.entry, "chunk": self.chunk, "pieces": len(self.taken), "taken": packed}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Position":
        bits = np.unpackbits(np.frombuffer(base64.b64decode(raw["taken"]), dtype=np.uint8))
        return cls(raw["bins"], raw["entry"], raw["chunk"], bits[: raw["pieces"]].astype(bool))


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """How bins are made. See PackedBatch for the letters."""

    bin_tokens: int
    max_seq_len: int
    max_documents: int
    max_masked: int
    mlm_probability: float
    truncate: bool
    seed: int
    num_streams: int

    def __post_init__(self):
        least = -(-self.bin_tokens // self.max_seq_len) + 1
        if self.max_documents < least:
            raise ValueError(
                f"data.max_documents is {self.max_documents}, expected at least {least}: "
                f"{self.bin_tokens} tokens in pieces of at most {self.max_seq_len}, and one more."
            )


class LoadedChunk(NamedTuple):
    """The pieces of one chunk. start, size: (n,) raw tokens of each piece within tokens."""

    entry: int
    chunk: int
    tokens: np.ndarray
    start: np.ndarray
    size: np.ndarray


def philox(seed: int, purpose: int, index: int) -> np.random.Generator:
    """Give the random numbers of one bin: a pure function of its arguments, cheap for any index."""
    key = np.array([seed, purpose], dtype=np.uint64)
    counter = np.array([0, 0, index, 0], dtype=np.uint64)  # 2^128 numbers between two bins
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def median_piece_length(source: Source, max_seq_len: int) -> int:
    """The median document's length as a piece, specials counted."""
    median = int(source.manifest.statistics.get("median_document_tokens", max_seq_len))
    return max(SPECIALS_PER_PIECE + 1, min(median + SPECIALS_PER_PIECE, max_seq_len))


def default_max_documents(source: Source, bin_tokens: int, max_seq_len: int) -> int:
    """D_max: four times the pieces of median length that fill a bin, so that only a burst of short ones meets it."""
    return -(-4 * bin_tokens // median_piece_length(source, max_seq_len))


def split_entries(order: SplitOrder, stream: int, num_streams: int, entry: int) -> Iterator[tuple[int, int]]:
    """First stage: (entry number within the stream, index of its split), endless."""
    while True:
        yield entry, order[stream + entry * num_streams]
        entry += 1


def load_chunks(
    entries: Iterator[tuple[int, int]], source: Source, config: StreamConfig, first_chunk: int
) -> Iterator[LoadedChunk]:
    """Second and third stage: read each split's chunks in order and cut their documents into pieces."""
    splits = source.splits()
    for entry, number in entries:
        split = splits[number]
        for chunk in range(split.first + first_chunk, split.last):
            tokens, lengths = source.read_chunk(split.shard, chunk)
            pieces = cut(lengths, config.max_seq_len, config.truncate)
            begins = lengths.cumsum(dtype=np.int64) - lengths
            yield LoadedChunk(entry, chunk - split.first, tokens, begins[pieces.document] + pieces.start, pieces.size)
        first_chunk = 0


class Window:
    """The pieces that wait to be packed, in order of arrival, with the chunks that hold their tokens."""

    def __init__(self, taken: np.ndarray):
        self.chunks: list[LoadedChunk] = []
        self.tokens = np.empty(0, dtype=np.uint32)
        self.start = np.empty(0, dtype=np.int64)  # of every piece of the chunks held, in self.tokens
        self.size = np.empty(0, dtype=np.int64)
        self.taken = np.empty(0, dtype=bool)
        self._restore = taken

    def add(self, chunk: LoadedChunk) -> None:
        known, self._restore = self._restore[: len(chunk.size)], self._restore[len(chunk.size) :]
        taken = np.zeros(len(chunk.size), dtype=bool)
        taken[: len(known)] = known
        self.start = np.concatenate([self.start, chunk.start + len(self.tokens)])
        self.tokens = np.concatenate([self.tokens, chunk.tokens.astype(self.tokens.dtype, copy=False)])
        self.size = np.concatenate([self.size, chunk.size])
        self.taken = np.concatenate([self.taken, taken])
        self.chunks.append(chunk)

    @property
    def restoring(self) -> bool:
        """Whether chunks that a resumed position had loaded are still to come."""
        return len(self._restore) > 0

    def waiting_tokens(self) -> int:
        waiting = self.size[~self.taken]
        return int(waiting.sum()) + SPECIALS_PER_PIECE * len(waiting)

    def take(self, pieces: np.ndarray) -> None:
        """Mark pieces as packed; let go of leading chunks that have none left."""
        self.taken[pieces] = True
        while len(self.chunks) > 1 and self.taken[: len(self.chunks[0].size)].all():
            gone = self.chunks.pop(0)
            self.start = self.start[len(gone.size) :] - len(gone.tokens)
            self.tokens = self.tokens[len(gone.tokens) :]
            self.size = self.size[len(gone.size) :]
            self.taken = self.taken[len(gone.size) :]

    def position(self, bins: int) -> Position:
        oldest = self.chunks[0]
        return Position(bins, oldest.entry, oldest.chunk, self.taken.copy())


class Bin(NamedTuple):
    """One bin before masking. ids, position_ids: (T,); cu_seqlens: (D_max + 1,); maskable: (n,) positions."""

    ids: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    maskable: np.ndarray
    num_tokens: int
    sum_squared_lengths: int


def lay_out(
    tokens: np.ndarray, start: np.ndarray, size: np.ndarray, tokenizer: TokenizerInfo, config: StreamConfig
) -> Bin:
    """Lay pieces into a bin one after the other, each as [CLS] ... [SEP], then the filler.

    start, size: (n,) raw tokens of each piece within tokens.
    """
    lengths = size + SPECIALS_PER_PIECE
    real = int(lengths.sum())
    lengths = np.concatenate([lengths, filler_lengths(config.bin_tokens - real, config.max_seq_len)])
    ends = lengths.cumsum()
    begins = ends - lengths
    ids = np.full(config.bin_tokens, tokenizer.special_ids["pad"], dtype=np.int32)
    ids[begins[: len(size)]] = tokenizer.special_ids["cls"]
    ids[ends[: len(size)] - 1] = tokenizer.special_ids["sep"]
    within = np.arange(size.sum()) - np.repeat(size.cumsum() - size, size)
    places = np.repeat(begins[: len(size)] + 1, size) + within
    text = tokens[np.repeat(start, size) + within]
    ids[places] = text
    maskable = places[~tokenizer.is_special[text]]  # [UNK] comes from text, and there is nothing to learn in it
    cu_seqlens = np.full(config.max_documents + 1, config.bin_tokens, dtype=np.int32)
    cu_seqlens[0] = 0
    cu_seqlens[1 : len(ends) + 1] = ends
    position_ids = np.arange(config.bin_tokens, dtype=np.int32) - np.repeat(begins, lengths).astype(np.int32)
    squared = int((lengths[: len(size)] ** 2).sum())
    return Bin(ids, position_ids, cu_seqlens, maskable, real, squared)


def finish(
    packed: Bin, index: int, tokenizer: TokenizerInfo, config: StreamConfig, rng: np.random.Generator
) -> PackedBatch:
    """Mask a bin and make it the batch with global index `index`."""
    masked = mask(
        packed.ids, packed.maskable, config.mlm_probability, tokenizer.special_ids["mask"], tokenizer.ordinary_ids, rng
    )
    positions = np.zeros(config.max_masked, dtype=np.int32)
    positions[: len(masked.positions)] = masked.positions
    labels = np.full(config.max_masked, -100, dtype=np.int32)
    labels[: len(masked.labels)] = masked.labels
    return PackedBatch(
        input_ids=torch.from_numpy(masked.ids),
        position_ids=torch.from_numpy(packed.position_ids),
        cu_seqlens=torch.from_numpy(packed.cu_seqlens),
        masked_positions=torch.from_numpy(positions),
        masked_labels=torch.from_numpy(labels),
        max_seqlen=config.max_seq_len,
        index=index,
        num_masked=len(masked.labels),
        num_tokens=packed.num_tokens,
        sum_squared_lengths=packed.sum_squared_lengths,
    )


def pack_bins(
    chunks: Iterator[LoadedChunk], config: StreamConfig, tokenizer: TokenizerInfo, position: Position
) -> Iterator[tuple[Bin, Position]]:
    """Last stage: keep a window of waiting pieces and choose each bin from it, until the chunks end."""
    window = Window(position.taken)
    bins = position.bins
    look_ahead = LOOK_AHEAD_BINS * config.bin_tokens
    while True:
        while window.restoring or window.waiting_tokens() < look_ahead:
            if (chunk := next(chunks, None)) is None:
                break
            window.add(chunk)
        waiting = np.flatnonzero(~window.taken)
        if not len(waiting):
            return
        lengths = window.size[waiting] + SPECIALS_PER_PIECE
        near = int(np.searchsorted(lengths.cumsum(), look_ahead, side="right"))
        chosen = waiting[choose(lengths[:near], config.bin_tokens, config.max_documents, config.max_seq_len)]
        packed = lay_out(window.tokens, window.start[chosen], window.size[chosen], tokenizer, config)
        window.take(chosen)
        bins += 1
        yield packed, window.position(bins)


def open_stream(
    source: Source, config: StreamConfig, stream: int, position: Position
) -> Iterator[tuple[PackedBatch, Position]]:
    """Yield one stream's batches from a position on, each with the position after it."""
    order = SplitOrder(len(source.splits()), config.seed)
    stages = webdataset.DataPipeline(
        lambda: split_entries(order, stream, config.num_streams, position.entry),
        lambda entries: load_chunks(entries, source, config, position.chunk),
        lambda chunks: pack_bins(chunks, config, source.tokenizer, position),
    )
    for packed, after in stages:
        index = (after.bins - 1) * config.num_streams + stream
        rng = philox(config.seed, MASKING, index)
        yield finish(packed, index, source.tokenizer, config, rng), after


class BatchStream(IterableDataset):
    """The batches of one rank, in order of their index, as (batch, stream, position after it)."""

    def __init__(
        self,
        source: Source,
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
        assert first_index % world_size == 0, "a step begins with rank 0"
        self.source = source
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
                streams[stream] = open_stream(self.source, self.config, stream, position)
            batch, after = next(streams[stream])
            assert batch.index == index, f"stream {stream} gave bin {batch.index}, expected {index}"
            yield batch, stream, after
            index += parts * self.world_size


def worker_count(wanted: int, streams_per_rank: int) -> int:
    """Round down to a divisor of a rank's streams, so that each stream lives in one worker."""
    return max((n for n in range(1, wanted + 1) if streams_per_rank % n == 0), default=0)


def open_loader(dataset: BatchStream, num_workers: int) -> DataLoader:
    """Pack and mask in worker processes; the training process only receives. Batches keep their order."""
    workers = worker_count(num_workers, dataset.config.num_streams // dataset.world_size)
    return DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None)


def held_out_batches(source: Source, config: StreamConfig, mlm_probability: float, max_bins: int) -> list[PackedBatch]:
    """The fixed list of bins to evaluate on: the held-out documents in shard order, masked with a fixed seed.

    At most max_bins; the last one is filled up with [PAD] where the documents end.
    """
    config = evaluation_config(config, mlm_probability)
    every_split = enumerate(range(len(source.splits())))
    bins = pack_bins(load_chunks(every_split, source, config, 0), config, source.tokenizer, Position())
    return [
        finish(packed, index, source.tokenizer, config, philox(EVALUATION_SEED, HELD_OUT, index))
        for index, (packed, _) in enumerate(islice(bins, max_bins))
    ]


def evaluation_config(config: StreamConfig, mlm_probability: float) -> StreamConfig:
    """The same bins with evaluation's masking."""
    return replace(config, mlm_probability=mlm_probability, max_masked=masked_count(config.bin_tokens, mlm_probability))


def filler_batch(tokenizer: TokenizerInfo, config: StreamConfig, mlm_probability: float, index: int) -> PackedBatch:
    """A batch of nothing: all [PAD], no labels. Ranks that run out of held-out bins compute it, so that all stay in step."""
    config = evaluation_config(config, mlm_probability)
    none = np.empty(0, dtype=np.int64)
    packed = lay_out(np.empty(0, dtype=np.uint16), none, none, tokenizer, config)
    return finish(packed, index, tokenizer, config, philox(EVALUATION_SEED, HELD_OUT, index))
