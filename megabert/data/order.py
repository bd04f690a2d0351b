"""Compute the order in which streams read a source: every pass deals out and mixes its documents anew.

A pass over a source is an epoch. Its splits are shuffled and dealt to the streams; a stream reads several splits at
once, their chunks in shuffled order, and the documents of each chunk in shuffled order, spread over a window of
several chunks. All of it is a function of (seed, epoch), so a position says only how many chunks have been read.

The window of a stream's first epoch ends with it: none of its documents comes after one of the second epoch.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megabert.data.shards.sample_format import TokenChunk
from megabert.data.shards.source import Source

# Streams' shares of an epoch differ by one split at most: with this many splits for each stream, by a quarter.
LEAST_SPLITS_PER_STREAM = 4
# More splits mix better: a source of fewer shards but enough chunks is cut into up to this many for each stream.
MOST_SPLITS_PER_STREAM = 16

# At most this share of the documents that share a bin may meet again in the next epoch because of a common chunk; the
# same limit holds for a common split.
REPEATED_BINMATES = 0.004
# Limits of what a stream reads at once, for tiny splits or chunks and very long bins.
MOST_SPLITS_AT_ONCE = 16
MOST_CHUNKS_AT_ONCE = 64

# Text shards count characters; this is English in a vocabulary of 32,768.
CHARACTERS_PER_TOKEN = 4.5


class StreamOrder(NamedTuple):
    """Stream `number` of `num_streams`. seed: the order's seed; None reads every chunk once, in order.

    bin_tokens: T, with which the window grows.
    """

    number: int
    num_streams: int
    seed: int | None
    bin_tokens: int


class ChunkId(NamedTuple):
    """A chunk's position in its stream: the first entry of a group of splits, and the chunk within that group.

    Entry k of a stream is the k-th split that it reads, counted from 0 over all epochs.
    """

    entry: int
    chunk: int


class ChunkRef(NamedTuple):
    """A chunk to read: chunk_id in the stream, (shard, chunk) in the source, and which part of its documents.

    part, parts: the documents are dealt into `parts` parts, and this stream reads number `part`.
    """

    chunk_id: ChunkId
    epoch: int
    shard: int
    chunk: int
    part: int
    parts: int


class Documents(NamedTuple):
    """The documents of a chunk that a stream reads, in its order. start, size: (n,) of each, raw tokens in `tokens`."""

    tokens: np.ndarray
    start: np.ndarray
    size: np.ndarray


class Splits(NamedTuple):
    """Each split is the chunks [first, last) of one shard, or part `part` of `parts` of one chunk; (n,) each."""

    shard: np.ndarray
    first: np.ndarray
    last: np.ndarray
    part: np.ndarray
    parts: np.ndarray

    # The length is the number of splits, not of columns.
    def __len__(self) -> int:
        return self.shard.size


@lru_cache(maxsize=32)
def cut_into_splits(source: Source, num_streams: int) -> Splits:
    """Cut a source into at least LEAST_SPLITS_PER_STREAM splits for each stream.

    They are shards, ranges of chunks or parts of chunks, and none is empty. Only a source with fewer documents than
    that has fewer splits.
    """
    counts = np.array([len(shard.chunks) for shard in source.shards])
    wanted, total = LEAST_SPLITS_PER_STREAM * num_streams, int(counts.sum())
    if total >= wanted:
        if len(counts) < wanted:
            wanted = min(total, MOST_SPLITS_PER_STREAM * num_streams)
        shard, number, ranges = _enumerate(np.minimum(counts, -(-counts * wanted // total)))
        first, last = number * counts[shard] // ranges, (number + 1) * counts[shard] // ranges
        return Splits(shard, first, last, np.zeros_like(shard), np.ones_like(shard))
    documents = np.concatenate([shard.chunks[:, 2] for shard in source.shards]).astype(np.int64)
    wanted = min(wanted, int(documents.sum()))
    most = bisect_left(range(wanted), wanted, key=lambda parts: np.minimum(documents, parts).sum())
    chunk, part, parts = _enumerate(np.clip(documents, 1, most))
    shard, number, _ = _enumerate(counts)
    return Splits(shard[chunk], number[chunk], number[chunk] + 1, part, parts)


def _enumerate(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give every item its owner, its number and the count there: [2, 1] -> [0, 0, 1], [0, 1, 0], [2, 2, 1]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(owner)) - np.repeat(counts.cumsum() - counts, counts)
    return owner, number, counts[owner]


@lru_cache(maxsize=32)
def _shuffled(num_splits: int, seed: int, epoch: int, source: int) -> np.ndarray:
    """Return the order of all splits in one epoch, shared by the streams of a process."""
    return np.random.default_rng([seed, epoch, source]).permutation(num_splits)


@dataclass(frozen=True)
class ShuffleWindow:
    """How a source's documents are spread: those of a chunk over the next `chunks` chunks.

    chunk_tokens: mean tokens of a chunk, C. `place` gives a piece's place in the order of the stream.
    """

    chunks: int
    chunk_tokens: float

    def place(
        self, used_before: int, offset: np.ndarray | int = 0, used_tokens: int = 1, first_epoch: int | None = None
    ) -> np.ndarray:
        """Return the mean number of used tokens before a piece.

        used_before: used tokens before its chunk. offset: used tokens of the chunk before it, of used_tokens.
        first_epoch: used tokens of the stream's first epoch, None until all of its chunks have been read. Places that
        depend on it are after the chunks read so far.
        """
        width = self.chunks * self.chunk_tokens
        at = used_before + np.asarray(offset) * max(1.0, width / max(1, used_tokens))
        if first_epoch is None:
            return self._growing(at)
        if used_before >= first_epoch:
            return first_epoch + self._growing(at - first_epoch)
        # After the last chunk, the documents that the window still holds take a share of the places that falls linearly
        # with the chunks that are left, from at most all of the epoch's. This is the share's integral.
        left = np.maximum(0.0, width - np.maximum(0.0, at - first_epoch))
        share = (left**2 - np.maximum(0.0, left - first_epoch) ** 2) / (width**2 - max(0.0, width - first_epoch) ** 2)
        end = self._growing(first_epoch)
        return np.minimum(first_epoch, self._growing(np.minimum(at, first_epoch)) + (first_epoch - end) * (1 - share))

    def _growing(self, at: np.ndarray | int) -> np.ndarray:
        # The places [i C, (i + 1) C) hold documents of i + 1 chunks, and of `chunks` chunks once the window is full: a
        # share 1 / `chunks` of each one's tokens. A place is the number of tokens before it, so it grows as they do.
        full = np.minimum(at // self.chunk_tokens, self.chunks - 1)
        return (self.chunk_tokens * full * (full + 1) / 2 + (full + 1) * (at - full * self.chunk_tokens)) / self.chunks


class SourceOrder:
    """The order in which one stream reads one source.

    Stream n of N reads the entries n, n + N, n + 2N, ... of the endless list of the shuffled epochs. The entries of one
    epoch are read in groups of `at_once` splits. share: the share of the source's tokens among those of a bin.
    """

    def __init__(self, source: Source, stream: StreamOrder, source_index: int, share: float):
        self._source, self._stream, self._index = source, stream, source_index
        self.splits = cut_into_splits(source, stream.num_streams)
        tokens = source.tokens / (1 if source.tokenizer_path is None else CHARACTERS_PER_TOKEN)
        # The number of bins that this source fills in an epoch of all streams.
        bins = max(1e-9, tokens / (share * stream.bin_tokens))
        chunks = max(1, int((self.splits.last - self.splits.first).sum()))
        # If n splits are read at once, share / n of a document's bin-mates come from its own split. In the next epoch
        # each of these is in the document's bin again with probability 1 / (bins made of n splits). The same holds for
        # chunks.
        at_once, window = (
            math.ceil(math.sqrt(share * parts / (bins * REPEATED_BINMATES))) for parts in (len(self.splits), chunks)
        )
        self.at_once = min(MOST_SPLITS_AT_ONCE, max(1, at_once))
        self.window = ShuffleWindow(min(MOST_CHUNKS_AT_ONCE, max(1, window)), max(1.0, tokens / chunks))

    def epoch_of(self, entry: int) -> int:
        return (self._stream.number + entry * self._stream.num_streams) // len(self.splits)

    def group(self, entry: int) -> range:
        """Return the entries of this stream that are read together with `entry`."""
        epoch = self.epoch_of(entry)
        begin, end = (
            max(0, -(-(e * len(self.splits) - self._stream.number) // self._stream.num_streams))
            for e in (epoch, epoch + 1)
        )
        first = entry - (entry - begin) % self.at_once
        return range(first, min(first + self.at_once, end))

    def chunks_of(self, group: range) -> np.ndarray:
        """Return the chunks of a group in the order of reading: (n, 4) of shard, chunk, part, parts."""
        seed, num_streams, splits = self._stream.seed, self._stream.num_streams, self.splits
        assert seed is not None, f"stream {self._stream.number} has no seed, so its chunks have no groups"
        epoch = self.epoch_of(group.start)
        order = _shuffled(len(splits), seed, epoch, self._index)
        entries = self._stream.number + np.arange(group.start, group.stop) * num_streams - epoch * len(splits)
        chosen = order[entries]
        split, number, _ = _enumerate((splits.last - splits.first)[chosen])
        chosen = chosen[split]
        rows = np.stack(
            [splits.shard[chosen], splits.first[chosen] + number, splits.part[chosen], splits.parts[chosen]], 1
        )
        # Plus 1, because numpy ignores zeros at the end of a seed.
        return np.random.default_rng([seed, epoch, self._index, int(entries[0]) + 1]).permutation(rows)

    def chunks_from(self, first: ChunkId) -> Iterator[ChunkRef]:
        """Yield the chunks to read, beginning with `first`. Shards of the next group are prefetched meanwhile."""
        if self._stream.seed is None:
            every = ((n, chunk) for n, shard in enumerate(self._source.shards) for chunk in range(len(shard.chunks)))
            for number, (shard, chunk) in enumerate(every):
                if number >= first.chunk:
                    yield ChunkRef(ChunkId(0, number), 0, shard, chunk, 0, 1)
            return
        group, rows = self.group(first.entry), self.chunks_of(self.group(first.entry))
        number = first.chunk
        while True:
            following = self.group(group.stop)
            upcoming = self.chunks_of(following)
            for shard in np.unique(upcoming[:, 0]).tolist():
                self._source.prefetch(shard)
            epoch = self.epoch_of(group.start)
            for n in range(number, len(rows)):
                yield ChunkRef(ChunkId(group.start, n), epoch, *rows[n].tolist())
            group, rows, number = following, upcoming, 0

    def documents(self, ref: ChunkRef, data: TokenChunk) -> Documents:
        """Return the documents of a chunk that this stream reads, in the order of this epoch."""
        size = data.lengths.astype(np.int64)
        start = size.cumsum() - size
        if self._stream.seed is None:
            return Documents(data.tokens, start, size)
        rng = np.random.default_rng([self._stream.seed, ref.epoch, self._index, ref.shard + 1, ref.chunk + 1])
        order = rng.permutation(len(size))
        if ref.parts > 1:
            # Each part has one of the `parts` longest documents, one of the next longest and so on: no part is empty,
            # and their tokens differ by one document at most.
            by_size = order[np.argsort(-size[order], kind="stable")]
            rounds = np.tile(np.arange(ref.parts), (-(-len(size) // ref.parts), 1))
            order = rng.permutation(by_size[rng.permuted(rounds, axis=1).ravel()[: len(size)] == ref.part])
        return Documents(data.tokens, start[order], size[order])
