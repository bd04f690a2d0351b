"""Cut a chunk into pieces, frame them as [CLS] ... [SEP], and record which ones are already in a bin."""

import base64
import zlib
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megabert.data.order import ChunkId, Documents
from megabert.data.packing import SPECIALS_PER_PIECE, Pieces, cut
from megabert.data.shards.manifest import TokenizerInfo


class PieceOptions(NamedTuple):
    """How documents are cut into pieces.

    max_seq_len: most tokens of a piece, specials counted; truncate: use only the first piece of each document.
    """

    max_seq_len: int
    truncate: bool


class Bits(NamedTuple):
    """Booleans packed into bits, small enough to store in every checkpoint."""

    count: int
    packed: bytes

    @classmethod
    def of(cls, values: np.ndarray) -> "Bits":
        return cls(len(values), np.packbits(values).tobytes())

    def values(self) -> np.ndarray:
        return np.unpackbits(np.frombuffer(self.packed, dtype=np.uint8), count=self.count).astype(bool)

    def to_json(self) -> list[int | str]:
        return [self.count, base64.b64encode(zlib.compress(self.packed, 9)).decode()]

    @classmethod
    def from_json(cls, raw: tuple[int, str]) -> "Bits":
        return cls(raw[0], zlib.decompress(base64.b64decode(raw[1])))


class Intervals(NamedTuple):
    """Ranges of raw tokens of a chunk, each within one document.

    start, size: (n,) in the chunk's tokens. used_offset: (n,) used tokens of the chunk before each range; this places
    the range in the order of a mixture.
    """

    start: np.ndarray
    size: np.ndarray
    used_offset: np.ndarray


class PhaseSnapshot(NamedTuple):
    """Which pieces of a chunk were in bins when a phase ended.

    max_seq_len: of that phase; taken: (n,) bool over the chunk's pieces in that phase.
    """

    max_seq_len: int
    taken: np.ndarray


@dataclass
class ChunkPieces:
    """The pieces of one chunk in a packing buffer. Only `taken` and `num_waiting` change while it is there.

    used_before: used tokens of the same source and stream before this chunk.
    ids: framed pieces end to end; begins, lengths: (n,) of each piece in ids; used_offset: (n,) as in Intervals.
    taken: (n,) bool, True for a piece that is in a bin.
    used_tokens: raw tokens of all pieces when the chunk was first loaded.
    snapshots: one for each earlier phase, None where the chunk was not in the buffer when that phase ended.
    number: how many chunks of the source its cursor loaded before.
    """

    chunk_id: ChunkId
    used_before: int
    ids: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    used_offset: np.ndarray
    taken: np.ndarray
    used_tokens: int
    snapshots: tuple[PhaseSnapshot | None, ...] = ()
    damaged: bool = False
    number: int = 0
    num_waiting: int = field(init=False)

    def __post_init__(self):
        self.num_waiting = len(self.taken)

    def restore_taken(self, taken: np.ndarray) -> None:
        """Mark the pieces that were in bins at a saved position. A chunk damaged since then has no pieces to mark."""
        if len(self.taken):
            self.taken[: len(taken)] = taken
        self.num_waiting = len(self.taken) - int(np.count_nonzero(self.taken))

    def take(self, first: int, last: int) -> np.ndarray:
        """Mark pieces [first, last) as taken. Returns their framed ids."""
        self.taken[first:last] = True
        self.num_waiting -= last - first
        return self.ids[self.begins[first] : self.begins[last - 1] + self.lengths[last - 1]]


def cut_chunk(
    chunk_id: ChunkId,
    used_before: int,
    documents: Documents | None,
    options: PieceOptions,
    tokenizer: TokenizerInfo,
    snapshots: list[PhaseSnapshot | None],
) -> ChunkPieces:
    """Cut a chunk into pieces, leaving out what earlier phases put into bins. documents is None for a damaged chunk."""
    if documents is None:
        none = np.empty(0, dtype=np.int64)
        taken = none.astype(bool)
        return ChunkPieces(chunk_id, used_before, none, none, none, none, taken, 0, tuple(snapshots), damaged=True)
    intervals, used_tokens = remaining_intervals(documents, options, snapshots)
    pieces = cut(intervals.size, *options)
    start = intervals.start[pieces.document] + pieces.start
    used_offset = intervals.used_offset[pieces.document] + pieces.start
    ids, begins, lengths = frame(documents.tokens, start, pieces.size, tokenizer)
    taken = np.zeros(len(start), bool)
    return ChunkPieces(chunk_id, used_before, ids, begins, lengths, used_offset, taken, used_tokens, tuple(snapshots))


def remaining_intervals(
    documents: Documents, options: PieceOptions, snapshots: list[PhaseSnapshot | None]
) -> tuple[Intervals, int]:
    """Find the tokens that earlier phases left unused.

    Returns the intervals, and the used tokens of the chunk when it was first loaded.
    """
    earlier = [snapshot for snapshot in snapshots if snapshot is not None]
    first = options._replace(max_seq_len=earlier[0].max_seq_len) if earlier else options
    size = documents.size
    used = np.minimum(size, first.max_seq_len - SPECIALS_PER_PIECE) if first.truncate else size
    intervals = Intervals(documents.start, size, used.cumsum() - used)
    for snapshot in earlier:
        pieces = cut(intervals.size, snapshot.max_seq_len, options.truncate)
        intervals = _untaken(intervals, pieces, snapshot.taken, options.truncate)
    return intervals, int(used.sum())


def frame(
    tokens: np.ndarray, start: np.ndarray, size: np.ndarray, tokenizer: TokenizerInfo
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay pieces end to end, each as [CLS] ... [SEP].

    start, size: (n,) of each piece in tokens. Returns the ids, and (n,) begin and length of each piece in them.
    """
    lengths = size + SPECIALS_PER_PIECE
    begins = lengths.cumsum() - lengths
    # [SEP] of one piece and [CLS] of the next are one array; what is too much at both ends is cut off.
    between = np.array([tokenizer.special_ids["sep"], tokenizer.special_ids["cls"]], dtype=tokens.dtype)
    parts = [between] * (2 * len(size) + 1)
    parts[1::2] = [tokens[a:b] for a, b in zip(start.tolist(), (start + size).tolist(), strict=True)]
    return np.concatenate(parts)[1:-1], begins, lengths


def _untaken(intervals: Intervals, pieces: Pieces, taken: np.ndarray, truncate: bool) -> Intervals:
    """Keep what is in no bin, and join neighbouring pieces of one interval.

    With truncate, an interval has one piece and is kept or dropped whole.
    """
    waiting = np.flatnonzero(~taken)
    owner = pieces.document[waiting]
    if truncate:
        return Intervals(*(column[owner] for column in intervals))
    first = np.ones(len(waiting), dtype=bool)
    first[1:] = (np.diff(waiting) != 1) | (np.diff(owner) != 0)
    heads = np.flatnonzero(first)
    size = np.add.reduceat(pieces.size[waiting], heads) if len(heads) else np.empty(0, dtype=np.int64)
    owner, offset = owner[heads], pieces.start[waiting[heads]]
    return Intervals(intervals.start[owner] + offset, size, intervals.used_offset[owner] + offset)
