"""Read one source's share of a stream, and keep its chunks with pieces that wait to be packed into bins."""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megabert.data.chunk_pieces import Bits, ChunkPieces, PhaseSnapshot, PieceOptions, cut_chunk
from megabert.data.order import ChunkId, ChunkRef, SourceOrder, StreamOrder
from megabert.data.shards.read_ahead import read_ahead
from megabert.data.shards.sample_format import TokenChunk
from megabert.data.shards.source import Corpus, DamagedShardError, Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourcePosition:
    """How far one stream has read one source.

    entry, chunk: the oldest chunk in the buffer. used_tokens: tokens of this source and stream before that chunk.
    pieces: number of pieces of each chunk in the buffer. taken: one bit for each of these pieces, set if it is in a
    bin. phases: the same at the end of each earlier phase, as (max_seq_len, pieces, taken); in pieces, None stands
    for a chunk that was not in the buffer then. damaged: chunks in the buffer that could not be read; skipped:
    damaged chunks so far. merged_before: place of the oldest piece that waited when the mixture last changed.
    first_epoch: used tokens of the stream's first epoch of this source, None until a chunk of the second was read.
    """

    entry: int = 0
    chunk: int = 0
    used_tokens: int = 0
    pieces: tuple[int, ...] = ()
    taken: Bits = Bits(0, b"")  # noqa: RUF009 (immutable)
    phases: tuple[tuple[int, tuple[int | None, ...], Bits], ...] = ()
    damaged: tuple[ChunkId, ...] = ()
    skipped: int = 0
    merged_before: float = 0.0
    first_epoch: int | None = None

    def to_json(self) -> dict[str, object]:
        return {
            "entry": self.entry,
            "chunk": self.chunk,
            "used_tokens": self.used_tokens,
            "pieces": list(self.pieces),
            "taken": self.taken.to_json(),
            "phases": [[max_seq_len, list(pieces), bits.to_json()] for max_seq_len, pieces, bits in self.phases],
            "damaged": [list(chunk_id) for chunk_id in self.damaged],
            "skipped": self.skipped,
            "first_epoch": self.first_epoch,
            **({"merged_before": self.merged_before} if self.merged_before else {}),
        }

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "SourcePosition":
        return cls(
            entry=raw["entry"],
            chunk=raw["chunk"],
            used_tokens=raw["used_tokens"],
            pieces=tuple(raw["pieces"]),
            taken=Bits.from_json(raw["taken"]),
            phases=tuple((length, tuple(pieces), Bits.from_json(bits)) for length, pieces, bits in raw["phases"]),
            damaged=tuple(ChunkId(*chunk_id) for chunk_id in raw["damaged"]),
            skipped=raw["skipped"],
            merged_before=raw.get("merged_before", 0.0),
            first_epoch=raw["first_epoch"],
        )

    def next_phase(self, max_seq_len: int) -> "SourcePosition":
        """Return this position converted for the next phase. max_seq_len: that of the phase that ends.

        Phases in which no chunk of the buffer had been loaded are dropped.
        """
        phases = (*self.phases, (max_seq_len, self.pieces, self.taken))
        while phases and all(size is None for size in phases[0][1]):
            phases = phases[1:]
        return replace(self, pieces=(0,) * len(self.pieces), taken=Bits(0, b""), phases=phases)


def read_chunks(
    refs: Iterator[ChunkRef], source: Source, known_damaged: frozenset[ChunkId], on_bad_shard: str
) -> Iterator[tuple[ChunkRef, TokenChunk | None]]:
    """Read the tokens of every chunk; None for a damaged chunk if on_bad_shard is "skip".

    known_damaged: chunks that were damaged in the run to resume; they are skipped again even if they were repaired
    since. Raises DamagedShardError for a damaged chunk if on_bad_shard is not "skip", and when more chunks in a row
    are damaged than the source has.
    """

    def read(ref: ChunkRef) -> TokenChunk | None:
        if ref.chunk_id in known_damaged:
            return None
        try:
            return source.read_chunk(ref.shard, ref.chunk)
        except DamagedShardError as error:
            if on_bad_shard != "skip":
                raise
            if (ref.shard, ref.chunk) not in source.reported_damaged:
                source.reported_damaged.add((ref.shard, ref.chunk))
                log.warning("skipped: %s", error)
            return None

    consecutive = 0
    for ref, data in read_ahead(refs, read, source.storage.read_ahead):
        consecutive = consecutive + 1 if data is None else 0
        if consecutive > source.num_chunks:
            raise DamagedShardError(f"{source.folder}: none of its {source.num_chunks} chunks can be read.")
        yield ref, data


class SourceCursor:
    """One source's share of one stream: it reads chunks and keeps those with waiting pieces, oldest first."""

    def __init__(
        self,
        corpus: Corpus,
        source_index: int,
        stream: StreamOrder,
        options: PieceOptions,
        position: SourcePosition,
        weight: float,
    ):
        source = corpus.sources[source_index]
        self.source_index = source_index
        self.weight = weight
        # Each stream starts at a different offset within one median document. Otherwise every stream would
        # begin with a document of each source, even of the rarest.
        self._offset = (stream.number + 0.5) / stream.num_streams * source.median_document_tokens
        self.chunks: deque[ChunkPieces] = deque()
        # Tokens of this source and stream before the next chunk to load.
        self.used_tokens = position.used_tokens
        self.num_loaded = 0
        self.skipped = position.skipped - len(position.damaged)
        self.first_epoch = position.first_epoch
        self.ended = False
        self._tokenizer = source.tokenizer
        self._options = options
        self._start = position
        # Use the largest share over all phases, not this phase's weight: a position needs one order for the whole run.
        self._order = SourceOrder(source, stream, source_index, corpus.largest_share(source_index))
        refs = self._order.chunks_from(ChunkId(position.entry, position.chunk))
        self._reader = read_chunks(refs, source, frozenset(position.damaged), corpus.on_bad_shard)
        self._restore(position)

    def _restore(self, position: SourcePosition) -> None:
        """Load the chunks that were in the buffer, and mark the pieces that are already in bins."""
        taken = _split_by_chunk(position.pieces, position.taken.values())
        phases = [(length, _split_by_chunk(pieces, bits.values())) for length, pieces, bits in position.phases]
        for _ in position.pieces:
            snapshots = [
                None if (mask := next(masks)) is None else PhaseSnapshot(length, mask) for length, masks in phases
            ]
            chunk = self._load(snapshots)
            assert chunk is not None, (
                f"the position lists {len(position.pieces)} chunks, more than the source has from there on"
            )
            mask = next(taken)
            assert mask is not None, "the position has no record of the pieces of a chunk that are in bins"
            chunk.restore_taken(mask)

    def load(self) -> ChunkPieces | None:
        """Read the next chunk, or None at the end."""
        return self._load([None] * len(self._start.phases))

    def _load(self, snapshots: list[PhaseSnapshot | None]) -> ChunkPieces | None:
        """Read the next chunk. snapshots: which of its pieces were in bins when earlier phases ended."""
        if (read := next(self._reader, None)) is None:
            self.ended = True
            return None
        ref, data = read
        if self.first_epoch is None and ref.epoch > 0:
            self.first_epoch = self.used_tokens
        documents = None if data is None else self._order.documents(ref, data)
        chunk = cut_chunk(ref.chunk_id, self.used_tokens, documents, self._options, self._tokenizer, snapshots)
        chunk.number = self.num_loaded
        self.num_loaded += 1
        self.chunks.append(chunk)
        self.used_tokens += chunk.used_tokens
        self.skipped += chunk.damaged
        return chunk

    @property
    def loaded_until(self) -> float:
        """The merge key up to which all pieces of this source are loaded."""
        return np.inf if self.ended else float(self._merge_key(self._next_place))

    def merge_keys(self, chunk: ChunkPieces, pieces: np.ndarray) -> np.ndarray:
        """Give the merge order of pieces of a chunk, by their indices in it."""
        return self._merge_key(self._place(chunk, pieces))

    def chunks_of_both_epochs(self) -> tuple[ChunkPieces, ChunkPieces, ChunkPieces] | None:
        """Return the oldest chunk, the first one after the first epoch, and the newest; None if there are not both."""
        if self.first_epoch is None or self._order.epoch_of(self.chunks[0].chunk_id.entry) > 0:
            return None
        later = next(chunk for chunk in self.chunks if self._order.epoch_of(chunk.chunk_id.entry) > 0)
        return self.chunks[0], later, self.chunks[-1]

    @property
    def oldest_place(self) -> float:
        """The place of the oldest waiting piece in the order of this source."""
        waiting = [self._place(chunk, np.flatnonzero(~chunk.taken)) for chunk in self.chunks if chunk.num_waiting]
        return min([float(places.min()) for places in waiting] or [float(self._next_place)])

    @property
    def _next_place(self) -> np.ndarray:
        return self._order.window.place(self.used_tokens, first_epoch=self.first_epoch)

    def _place(self, chunk: ChunkPieces, pieces: np.ndarray) -> np.ndarray:
        offset = chunk.used_offset[pieces]
        return self._order.window.place(chunk.used_before, offset, chunk.used_tokens, self.first_epoch)

    def _merge_key(self, place: np.ndarray) -> np.ndarray:
        return (place - self._start.merged_before + self._offset) / self.weight

    def drop_finished(self) -> list[ChunkPieces]:
        """Drop the oldest chunks without waiting pieces. One chunk always stays, because the position refers to it."""
        dropped = []
        while len(self.chunks) > 1 and not self.chunks[0].num_waiting:
            dropped.append(self.chunks.popleft())
        return dropped

    def position(self) -> SourcePosition:
        if not self.chunks:
            return self._start
        oldest = self.chunks[0]
        phases = []
        for number, (max_seq_len, _, _) in enumerate(self._start.phases):
            snapshots = [chunk.snapshots[number] for chunk in self.chunks]
            masks = [None if snapshot is None else snapshot.taken for snapshot in snapshots]
            sizes = tuple(None if mask is None else len(mask) for mask in masks)
            phases.append((max_seq_len, sizes, _pack_masks(masks)))
        return SourcePosition(
            entry=oldest.chunk_id.entry,
            chunk=oldest.chunk_id.chunk,
            used_tokens=oldest.used_before,
            pieces=tuple(len(chunk.taken) for chunk in self.chunks),
            taken=_pack_masks([chunk.taken for chunk in self.chunks]),
            phases=tuple(phases),
            damaged=tuple(chunk.chunk_id for chunk in self.chunks if chunk.damaged),
            skipped=self.skipped,
            merged_before=self._start.merged_before,
            first_epoch=self.first_epoch,
        )


def _split_by_chunk(sizes: Sequence[int | None], masks: np.ndarray) -> Iterator[np.ndarray | None]:
    """Yield each chunk's part of masks laid end to end; None for a chunk that has no mask."""
    begin = 0
    for size in sizes:
        yield None if size is None else masks[begin : begin + size]
        begin += size or 0


def _pack_masks(masks: Sequence[np.ndarray | None]) -> Bits:
    return Bits.of(np.concatenate([np.empty(0, dtype=bool), *(mask for mask in masks if mask is not None)]))
