"""The pieces of one stream that wait to be packed, from every source of the corpus, and where they came from.

A source's part in a stream is a *lane*: its splits n, n + N, ... one after the other. With several sources, pieces line up
by (tokens of their source that came before) / weight, so that every stretch of the line holds the sources by weight.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, pairwise
from typing import Any, NamedTuple

import numpy as np
import webdataset

from megabert.data.batch import Bin
from megabert.data.chunk_pieces import Bits, Block, Cutting, Past, Place, make_block
from megabert.data.packing import choose
from megabert.data.shards.cache import threads
from megabert.data.shards.sample_format import TokenChunk
from megabert.data.shards.source import Corpus, DamagedShardError, Source, SplitOrder, log


@dataclass(frozen=True)
class LanePosition:
    """Where one source stands in one stream.

    entry, chunk: the oldest chunk that is held. used_tokens: tokens of this lane before it. taken: a bit per piece from
    there to the last one loaded, set where it is in a bin; pieces: how many each held chunk has. past: the same at the end of
    earlier phases, as (max_seq_len, pieces, taken), with None for the pieces of a chunk that came later. damaged: the held
    chunks that could not be read; skipped: how many there were so far.
    """

    entry: int = 0
    chunk: int = 0
    used_tokens: int = 0
    pieces: tuple[int, ...] = ()
    taken: Bits = Bits(0, b"")  # noqa: RUF009 (immutable)
    past: tuple[tuple[int, tuple[int | None, ...], Bits], ...] = ()
    damaged: tuple[Place, ...] = ()
    skipped: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "entry": self.entry,
            "chunk": self.chunk,
            "used_tokens": self.used_tokens,
            "pieces": list(self.pieces),
            "taken": self.taken.to_json(),
            "past": [[max_seq_len, list(pieces), bits.to_json()] for max_seq_len, pieces, bits in self.past],
            "damaged": [list(place) for place in self.damaged],
            "skipped": self.skipped,
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "LanePosition":
        return cls(
            entry=raw["entry"],
            chunk=raw["chunk"],
            used_tokens=raw["used_tokens"],
            pieces=tuple(raw["pieces"]),
            taken=Bits.from_json(raw["taken"]),
            past=tuple((length, tuple(pieces), Bits.from_json(bits)) for length, pieces, bits in raw["past"]),
            damaged=tuple(Place(*place) for place in raw["damaged"]),
            skipped=raw["skipped"],
        )

    def after(self, max_seq_len: int) -> "LanePosition":
        """The same place at the beginning of a phase, after one of max_seq_len. Phases that no held chunk was in go."""
        past = (*self.past, (max_seq_len, self.pieces, self.taken))
        while past and all(count is None for count in past[0][1]):
            past = past[1:]
        return replace(self, pieces=(0,) * len(self.pieces), taken=Bits(0, b""), past=past)


class StreamOf(NamedTuple):
    """Which stream: n of N. seed: of the order of splits; None reads every split once, in order."""

    number: int
    num_streams: int
    seed: int | None


class ChunkRef(NamedTuple):
    """A chunk's place in the stream, and in its source."""

    place: Place
    shard: int
    number: int


def split_entries(source: Source, stream: StreamOf, number: int, first: int) -> Iterator[tuple[int, int]]:
    """First stage: (entry, index of its split). number: the source's in the corpus."""
    if stream.seed is None:
        yield from ((entry, entry) for entry in range(first, len(source.splits)))
        return
    order = SplitOrder(len(source.splits), stream.seed, number)
    for entry in count(first):
        yield entry, order[stream.number + entry * stream.num_streams]


def list_chunks(entries: Iterator[tuple[int, int]], source: Source, first: int) -> Iterator[ChunkRef]:
    """Second stage: each split's chunks in order, while the shard of the split after it is on its way."""
    coming = next(entries, None)
    while coming is not None:
        entry, split = coming[0], source.splits[coming[1]]
        coming = next(entries, None)
        if coming is not None:
            source.prefetch(source.splits[coming[1]].shard)
        for chunk in range(split.first + first, split.last):
            yield ChunkRef(Place(entry, chunk - split.first), split.shard, chunk)
        first = 0


def read_chunks(
    refs: Iterator[ChunkRef], source: Source, skip: frozenset[Place], on_bad_shard: str
) -> Iterator[tuple[Place, TokenChunk | None]]:
    """Third stage: every chunk's tokens, None for one that is damaged, if on_bad_shard allows that.

    skip: chunks known to be damaged, which stay so whatever is there now. Raises DamagedShardError when as many in a row are
    damaged as the source has.
    """

    def read(ref: ChunkRef) -> TokenChunk | None:
        if ref.place in skip:
            return None
        try:
            return source.read_chunk(ref.shard, ref.number)
        except DamagedShardError as damage:
            if on_bad_shard != "skip":
                raise
            if (ref.shard, ref.number) not in source.known_damaged:
                source.known_damaged.add((ref.shard, ref.number))
                log.warning("skipped: %s", damage)
            return None

    in_a_row = 0
    for ref, data in _ahead(refs, read, source.storage.read_ahead):
        in_a_row = in_a_row + 1 if data is None else 0
        if in_a_row > source.num_chunks:
            raise DamagedShardError(f"{source.folder}: none of its {source.num_chunks} chunks can be read.")
        yield ref.place, data


def _ahead(
    refs: Iterator[ChunkRef], read: Callable[[ChunkRef], TokenChunk | None], depth: int
) -> Iterator[tuple[ChunkRef, TokenChunk | None]]:
    """Read in order, `depth` chunks before they are wanted."""
    if not depth:
        yield from ((ref, read(ref)) for ref in refs)
        return
    under_way: deque = deque()
    for ref in refs:
        under_way.append((ref, threads(os.getpid()).submit(read, ref)))
        if len(under_way) > depth:
            done, future = under_way.popleft()
            yield done, future.result()
    yield from ((done, future.result()) for done, future in under_way)


class Lane:
    """One source's part in one stream: the chunks that hold its waiting pieces, oldest first."""

    def __init__(self, corpus: Corpus, number: int, stream: StreamOf, cutting: Cutting, position: LanePosition):
        source = corpus.sources[number]
        self.number = number
        self.weight = corpus.weights[number]
        # Staggered over the streams by a document's length: else all would begin with one of even the rarest source.
        self._offset = (stream.number + 0.5) / stream.num_streams * source.median_document_tokens
        self.blocks: deque[Block] = deque()
        self.used_tokens = position.used_tokens  # before the next chunk to come
        self.skipped = position.skipped - len(position.damaged)
        self.ended = False
        self._tokenizer = source.tokenizer
        self._cutting = cutting
        self._start = position
        self._chunks = iter(
            webdataset.DataPipeline(
                lambda: split_entries(source, stream, number, position.entry),
                lambda entries: list_chunks(entries, source, position.chunk),
                lambda refs: read_chunks(refs, source, frozenset(position.damaged), corpus.on_bad_shard),
            )
        )
        self._restore(position)

    def _restore(self, position: LanePosition) -> None:
        """Load what was held, with every piece that is in a bin already marked."""
        taken = Rows(position.pieces, position.taken.values())
        past = [(max_seq_len, Rows(pieces, bits.values())) for max_seq_len, pieces, bits in position.past]
        for _ in position.pieces:
            mine = [None if (row := rows.next()) is None else Past(length, row) for length, rows in past]
            block = self._load(mine)
            assert block is not None, "a position refers to chunks that were there"
            row = taken.next()
            assert row is not None, "every held chunk says what of it is taken"
            block.mark(row)

    def load(self) -> Block | None:
        """Read the next chunk, or None at the end."""
        return self._load([None] * len(self._start.past))

    def _load(self, past: list[Past | None]) -> Block | None:
        """past: what was taken of this chunk when earlier phases ended."""
        if (read := next(self._chunks, None)) is None:
            self.ended = True
            return None
        place, data = read
        block = make_block(place, self.used_tokens, data, self._cutting, self._tokenizer, past)
        self.blocks.append(block)
        self.used_tokens += block.used_tokens
        self.skipped += block.damaged
        return block

    @property
    def horizon(self) -> float:
        """Up to here in the line, this lane's pieces are loaded."""
        return np.inf if self.ended else float(self.time(self.used_tokens))

    def time(self, tokens: Any) -> Any:
        """The place in the line of a piece with so many tokens of its lane before it."""
        return (tokens + self._offset) / self.weight

    def release(self) -> list[Block]:
        """Let go of leading blocks that have no piece left; one always stays, to say where the lane is."""
        gone = []
        while len(self.blocks) > 1 and not self.blocks[0].num_waiting:
            gone.append(self.blocks.popleft())
        return gone

    def position(self) -> LanePosition:
        if not self.blocks:
            return self._start
        oldest = self.blocks[0]
        past = []
        for number, (max_seq_len, _, _) in enumerate(self._start.past):
            rows = [None if (phase := block.past[number]) is None else phase.taken for block in self.blocks]
            past.append((max_seq_len, tuple(None if row is None else len(row) for row in rows), _joined(rows)))
        return LanePosition(
            entry=oldest.entry,
            chunk=oldest.chunk,
            used_tokens=oldest.before,
            pieces=tuple(len(block.taken) for block in self.blocks),
            taken=_joined([block.taken for block in self.blocks]),
            past=tuple(past),
            damaged=tuple(Place(block.entry, block.chunk) for block in self.blocks if block.damaged),
            skipped=self.skipped,
        )


class Rows:
    """Booleans of several chunks end to end, given back chunk by chunk."""

    def __init__(self, sizes: Sequence[int | None], values: np.ndarray):
        self._sizes = iter(sizes)
        self._values = values

    def next(self) -> np.ndarray | None:
        """The next chunk's, or None if it has none."""
        if (size := next(self._sizes)) is None:
            return None
        row, self._values = self._values[:size], self._values[size:]
        return row


def _joined(rows: Sequence[np.ndarray | None]) -> Bits:
    return Bits.of(np.concatenate([np.empty(0, dtype=bool), *(row for row in rows if row is not None)]))


class Window:
    """All that waits in one stream, lined up. Its pieces leave it in bins."""

    def __init__(self, corpus: Corpus, stream: StreamOf, cutting: Cutting, positions: tuple[LanePosition, ...]):
        """positions: one per source, or none at the start."""
        positions = positions or (LanePosition(),) * len(corpus.sources)
        self.cutting = cutting
        self.lanes = [Lane(corpus, n, stream, cutting, position) for n, position in enumerate(positions)]
        self._corpus, self._stream = corpus, stream
        self._blocks: dict[int, Block] = {}
        self._next_key = count()
        # Of every waiting piece, in line: the key of its block, its number there, its length, its place in the line, its lane.
        self._block = np.empty(0, dtype=np.int64)
        self._piece = np.empty(0, dtype=np.int64)
        self._length = np.empty(0, dtype=np.int64)
        self._time = np.empty(0, dtype=np.float64)
        self._lane = np.empty(0, dtype=np.int64)
        self._ready = 0  # so many of them have all before them loaded
        for lane in self.lanes:
            for block in lane.blocks:
                self._append(lane, block)
        self._line_up()

    def next_phase(self, max_seq_len: int) -> "Window":
        """The same pieces as raw tokens, cut anew."""
        return Window(
            self._corpus,
            self._stream,
            self.cutting._replace(max_seq_len=max_seq_len),
            tuple(lane.position().after(self.cutting.max_seq_len) for lane in self.lanes),
        )

    def fill(self, tokens: int) -> None:
        """Load chunks until so many tokens wait, or all have come."""
        while self._length[: self._ready].sum() < tokens:
            lane = min(self.lanes, key=lambda lane: lane.horizon)
            if lane.ended:
                return
            if (block := lane.load()) is not None:
                self._append(lane, block)
            self._line_up()

    def next_bin(self, tokens: int, max_documents: int, look_ahead: int) -> Bin | None:
        """Take the pieces of one bin from the next `look_ahead` tokens, or None if nothing waits."""
        if not self._ready:
            return None
        lengths = self._length[: self._ready]
        near = int(np.searchsorted(lengths.cumsum(), look_ahead, side="right"))
        chosen = choose(lengths[:near], tokens, max_documents, self.cutting.max_seq_len)
        block, piece = self._block[chosen], self._piece[chosen]
        # Neighbours leave together: most of a bin is a few long runs.
        breaks = np.flatnonzero((np.diff(block) != 0) | (np.diff(piece) != 1)) + 1
        bounds = [0, *breaks.tolist(), len(chosen)]
        parts = [
            self._blocks[block[first]].take(int(piece[first]), int(piece[last - 1]) + 1)
            for first, last in pairwise(bounds)
        ]
        taken = Bin(parts, lengths[chosen])
        stay = np.ones(len(self._length), dtype=bool)
        stay[chosen] = False
        self._keep(stay)
        self._ready -= len(chosen)
        self._release()
        return taken

    def position(self) -> tuple[LanePosition, ...]:
        return tuple(lane.position() for lane in self.lanes)

    def _append(self, lane: Lane, block: Block) -> None:
        key = next(self._next_key)
        self._blocks[key] = block
        waiting = np.flatnonzero(~block.taken)
        self._block = np.concatenate([self._block, np.full(len(waiting), key)])
        self._piece = np.concatenate([self._piece, waiting])
        self._length = np.concatenate([self._length, block.lengths[waiting]])
        self._time = np.concatenate([self._time, lane.time(block.before + block.arrival[waiting])])
        self._lane = np.concatenate([self._lane, np.full(len(waiting), lane.number)])

    def _line_up(self) -> None:
        if len(self.lanes) == 1:
            self._ready = len(self._length)
            return
        # By lane where times are equal: a resumed stream loads in another order, and must line up the same.
        self._keep(np.lexsort((self._lane, self._time)))
        self._ready = int(np.searchsorted(self._time, min(lane.horizon for lane in self.lanes)))

    def _keep(self, which: np.ndarray) -> None:
        for name in ("_block", "_piece", "_length", "_time", "_lane"):
            setattr(self, name, getattr(self, name)[which])

    def _release(self) -> None:
        gone = {id(block) for lane in self.lanes for block in lane.release()}
        if gone:
            self._blocks = {key: block for key, block in self._blocks.items() if id(block) not in gone}
