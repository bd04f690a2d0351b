"""Keep the packing buffer of one stream: pieces of every source that wait to be packed into bins.

A source cursor reads one source's share of the stream, in the order of order.py. Pieces are merged in the order of
(used tokens of their source before them) / weight, so that every stretch of the stream holds the sources in proportion
to their weights.
"""

from dataclasses import replace
from itertools import pairwise

import numpy as np

from megabert.data.batch import Bin
from megabert.data.chunk_pieces import ChunkPieces, PieceOptions
from megabert.data.order import StreamOrder
from megabert.data.packing import choose_pieces
from megabert.data.shards.source import Corpus
from megabert.data.source_cursor import SourceCursor, SourcePosition

# The lowest bit of the source's number in a chunk's key: room for 2^23 sources, and 2^40 chunks of each.
SOURCE_SHIFT = 40


def _chunk_key(cursor: SourceCursor, chunk: ChunkPieces) -> int:
    """Return a number of this chunk that grows with its source and, within it, in the order of reading.

    In a resumed stream the numbers are others, but their order is the same.
    """
    return (cursor.source_index << SOURCE_SHIFT) + chunk.number


class PackingBuffer:
    """The waiting pieces of one stream in merge order, from which bins are packed."""

    def __init__(
        self,
        corpus: Corpus,
        stream: StreamOrder,
        options: PieceOptions,
        positions: tuple[SourcePosition, ...],
        mixture: int = 0,
    ):
        """positions: one for each source, or none at the start of the run. mixture: the index of the
        phase's mixture."""
        self._positions = positions or (SourcePosition(),) * len(corpus.sources)
        self.options, self.mixture = options, mixture
        self.cursors = [
            SourceCursor(corpus, number, stream, options, self._positions[number], weight)
            for number, weight in enumerate(corpus.mixture(mixture))
            if weight
        ]
        self._corpus, self._stream = corpus, stream
        self._chunks: dict[int, ChunkPieces] = {}
        # A table of the waiting pieces, one entry for each in every column.
        self._chunk_key = np.empty(0, dtype=np.int64)
        # Index of each piece in its chunk.
        self._piece = np.empty(0, dtype=np.int64)
        self._length = np.empty(0, dtype=np.int64)
        self._merge_key = np.empty(0, dtype=np.float64)
        # The first pieces of the table, whose predecessors are all loaded.
        self._num_ready = 0
        for cursor in self.cursors:
            for chunk in cursor.chunks:
                self._append(cursor, chunk)
        self._sort()

    def next_phase(self, max_seq_len: int, mixture: int = 0) -> "PackingBuffer":
        """Cut the waiting tokens anew into pieces of at most max_seq_len, and mix the sources in other proportions.

        Sources that the next mixture leaves out keep their waiting tokens until a later one has them again.
        """
        positions = list(self.position())
        for cursor in self.cursors:
            after = positions[cursor.source_index].next_phase(self.options.max_seq_len)
            if mixture != self.mixture:
                after = replace(after, merged_before=cursor.oldest_place)
            positions[cursor.source_index] = after
        options = self.options._replace(max_seq_len=max_seq_len)
        return PackingBuffer(self._corpus, self._stream, options, tuple(positions), mixture)

    def fill(self, tokens: int) -> None:
        """Load chunks until this many tokens are ready, or every source has ended."""
        while self._length[: self._num_ready].sum() < tokens:
            cursor = min(self.cursors, key=lambda cursor: cursor.loaded_until)
            if cursor.ended:
                return
            first_epoch = cursor.first_epoch
            if (chunk := cursor.load()) is not None:
                self._append(cursor, chunk)
            if cursor.first_epoch != first_epoch:
                self._merge_again(cursor)
            self._sort()

    def next_bin(self, tokens: int, max_documents: int, look_ahead: int) -> Bin | None:
        """Take the pieces of one bin from the next `look_ahead` tokens, or None if no piece waits."""
        if not self._num_ready:
            return None
        lengths = self._length[: self._num_ready]
        ends = lengths.cumsum()
        near = int(np.searchsorted(ends, look_ahead, side="right"))
        if (closed := self._of_a_later_epoch(near)).any():
            # Without a look-ahead, no other source takes the places of these pieces.
            open_pieces = np.flatnonzero(~closed & (ends[:near] <= tokens))
            chosen = choose_pieces(lengths[open_pieces], tokens, max_documents, self.options.max_seq_len)
            chosen = open_pieces[chosen]
        else:
            chosen = choose_pieces(lengths[:near], tokens, max_documents, self.options.max_seq_len)
        # Neighbouring pieces of a chunk are taken together: most of a bin is a few runs of them.
        chosen = chosen[np.lexsort((self._piece[chosen], self._chunk_key[chosen]))]
        chunk_key, piece = self._chunk_key[chosen], self._piece[chosen]
        breaks = np.flatnonzero((np.diff(chunk_key) != 0) | (np.diff(piece) != 1)) + 1
        bounds = [0, *breaks.tolist(), len(chosen)]
        parts = [
            self._chunks[chunk_key[first]].take(int(piece[first]), int(piece[last - 1]) + 1)
            for first, last in pairwise(bounds)
        ]
        taken = Bin(parts, lengths[chosen])
        waiting = np.ones(len(self._length), dtype=bool)
        waiting[chosen] = False
        self._select(waiting)
        self._num_ready -= len(chosen)
        self._drop_finished()
        return taken

    def _of_a_later_epoch(self, near: int) -> np.ndarray:
        """Tell which of the first `near` pieces the next bin may not take.

        A bin with pieces of the first epoch of a source has none of a later one: other streams may not have used them
        yet. It is left emptier if need be, once in a run for each stream and source.
        """
        keys = self._chunk_key[:near]
        closed = np.zeros(near, dtype=bool)
        for cursor in self.cursors:
            if (chunks := cursor.chunks_of_both_epochs()) is not None:
                first, later, last = (_chunk_key(cursor, chunk) for chunk in chunks)
                if ((keys >= first) & (keys < later)).any():
                    closed |= (keys >= later) & (keys <= last)
        return closed

    def position(self) -> tuple[SourcePosition, ...]:
        positions = list(self._positions)
        for cursor in self.cursors:
            positions[cursor.source_index] = cursor.position()
        return tuple(positions)

    def _append(self, cursor: SourceCursor, chunk: ChunkPieces) -> None:
        key = _chunk_key(cursor, chunk)
        self._chunks[key] = chunk
        waiting = np.flatnonzero(~chunk.taken)
        self._chunk_key = np.concatenate([self._chunk_key, np.full(len(waiting), key)])
        self._piece = np.concatenate([self._piece, waiting])
        self._length = np.concatenate([self._length, chunk.lengths[waiting]])
        self._merge_key = np.concatenate([self._merge_key, cursor.merge_keys(chunk, waiting)])

    def _merge_again(self, cursor: SourceCursor) -> None:
        """Give a source's waiting pieces their order again, now that its first epoch has ended."""
        for chunk in cursor.chunks:
            rows = np.flatnonzero(self._chunk_key == _chunk_key(cursor, chunk))
            self._merge_key[rows] = cursor.merge_keys(chunk, self._piece[rows])
        # The lowest chunk of equal keys comes first, as when these chunks are loaded to resume.
        self._select(np.lexsort((self._piece, self._chunk_key)))

    def _sort(self) -> None:
        # Of equal merge keys, the lowest chunk comes first. The table of one source is in this order already.
        by_chunk = (self._chunk_key, self._merge_key)
        one = len(self.cursors) == 1
        self._select(np.argsort(self._merge_key, kind="stable") if one else np.lexsort(by_chunk))
        self._num_ready = int(np.searchsorted(self._merge_key, min(cursor.loaded_until for cursor in self.cursors)))

    def _select(self, rows: np.ndarray) -> None:
        """Keep only these rows of the table, in this order."""
        for name in ("_chunk_key", "_piece", "_length", "_merge_key"):
            setattr(self, name, getattr(self, name)[rows])

    def _drop_finished(self) -> None:
        dropped = {id(chunk) for cursor in self.cursors for chunk in cursor.drop_finished()}
        if dropped:
            self._chunks = {key: chunk for key, chunk in self._chunks.items() if id(chunk) not in dropped}
