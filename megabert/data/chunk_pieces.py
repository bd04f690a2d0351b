"""The pieces of one chunk, framed as [CLS] ... [SEP], and which of them are in a bin already. Pure but for that."""

import base64
import zlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from megabert.data.packing import SPECIALS_PER_PIECE, Pieces, cut
from megabert.data.shards.manifest import TokenizerInfo
from megabert.data.shards.sample_format import TokenChunk


class Cutting(NamedTuple):
    """How documents become pieces. truncate: only each document's first piece is used."""

    max_seq_len: int
    truncate: bool


class Bits(NamedTuple):
    """A row of booleans, small enough to write down with every checkpoint."""

    count: int
    packed: bytes

    @classmethod
    def of(cls, values: np.ndarray) -> "Bits":
        return cls(len(values), np.packbits(values).tobytes())

    def values(self) -> np.ndarray:
        return np.unpackbits(np.frombuffer(self.packed, dtype=np.uint8), count=self.count).astype(bool)

    def to_json(self) -> list[Any]:
        return [self.count, base64.b64encode(zlib.compress(self.packed, 9)).decode()]

    @classmethod
    def from_json(cls, raw: list[Any]) -> "Bits":
        return cls(raw[0], zlib.decompress(base64.b64decode(raw[1])))


class Intervals(NamedTuple):
    """Runs of raw tokens that belong together. start, size: (n,) in the chunk's tokens.

    arrival: (n,) tokens of the chunk that come before, counting only those that are used: where in the order of a
    mixture the run belongs.
    """

    start: np.ndarray
    size: np.ndarray
    arrival: np.ndarray


class Past(NamedTuple):
    """What of a block was in bins when a phase ended. max_seq_len: of that phase; taken: (n,) bool over its pieces."""

    max_seq_len: int
    taken: np.ndarray


@dataclass
class Block:
    """A chunk in a stream's window.

    entry, chunk: its place in the stream. before: tokens of its lane before it. ids: framed pieces end to end.
    begins, lengths: (n,) of each piece in ids; arrival: (n,) as in Intervals; taken: (n,) whether it is in a bin.
    used_tokens: raw tokens of all its pieces when it was loaded. past: for every earlier phase of the lane what was taken
    at its end, None where the block was not there yet.
    """

    entry: int
    chunk: int
    before: int
    ids: np.ndarray
    begins: np.ndarray
    lengths: np.ndarray
    arrival: np.ndarray
    taken: np.ndarray
    used_tokens: int
    past: tuple[Past | None, ...] = ()
    damaged: bool = False
    num_waiting: int = field(init=False)

    def __post_init__(self):
        self.num_waiting = len(self.taken)

    def mark(self, taken: np.ndarray) -> None:
        """Say which pieces are in bins already; of a chunk that was whole then and is damaged now, nothing is left."""
        if len(self.taken):
            self.taken[: len(taken)] = taken
        self.num_waiting = len(self.taken) - int(np.count_nonzero(self.taken))

    def take(self, first: int, last: int) -> np.ndarray:
        """Put pieces [first, last) into a bin. Returns their framed ids."""
        self.taken[first:last] = True
        self.num_waiting -= last - first
        return self.ids[self.begins[first] : self.begins[last - 1] + self.lengths[last - 1]]


class Place(NamedTuple):
    """Where a chunk is in its stream: the entry in the stream's list of splits, and the chunk within the split."""

    entry: int
    chunk: int


def make_block(
    place: Place,
    before: int,
    data: TokenChunk | None,
    cutting: Cutting,
    tokenizer: TokenizerInfo,
    past: list[Past | None],
) -> Block:
    """Cut a chunk into pieces: what earlier phases left of it, where it was in some. data None: damaged, no pieces."""
    if data is None:
        none = np.empty(0, dtype=np.int64)
        return Block(*place, before, none, none, none, none, none.astype(bool), 0, tuple(past), damaged=True)
    intervals, used_tokens = intervals_left(data.lengths, cutting, past)
    pieces = cut(intervals.size, *cutting)
    start = intervals.start[pieces.document] + pieces.start
    arrival = intervals.arrival[pieces.document] + pieces.start
    ids, begins, lengths = frame(data.tokens, start, pieces.size, tokenizer)
    return Block(*place, before, ids, begins, lengths, arrival, np.zeros(len(start), bool), used_tokens, tuple(past))


def intervals_left(lengths: np.ndarray, cutting: Cutting, past: list[Past | None]) -> tuple[Intervals, int]:
    """What earlier phases left of documents of these lengths, and the raw tokens that were used of them at first."""
    been = [phase for phase in past if phase is not None]
    first = cutting._replace(max_seq_len=been[0].max_seq_len) if been else cutting
    size = lengths.astype(np.int64)
    used = np.minimum(size, first.max_seq_len - SPECIALS_PER_PIECE) if first.truncate else size
    intervals = Intervals(size.cumsum() - size, size, used.cumsum() - used)
    for phase in been:
        pieces = cut(intervals.size, phase.max_seq_len, cutting.truncate)
        intervals = _left_over(intervals, pieces, phase.taken, cutting.truncate)
    return intervals, int(used.sum())


def frame(
    tokens: np.ndarray, start: np.ndarray, size: np.ndarray, tokenizer: TokenizerInfo
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay pieces end to end, each as [CLS] ... [SEP].

    start, size: (n,) of each piece in tokens. Returns the ids, and (n,) where each piece begins and how long it is.
    """
    lengths = size + SPECIALS_PER_PIECE
    ends = lengths.cumsum()
    begins = ends - lengths
    num_text = int(size.sum())
    if num_text == len(tokens):  # all of it, in order
        text = tokens
    else:
        text = tokens[np.arange(num_text) + np.repeat(start - (size.cumsum() - size), size)]
    ids = np.empty(int(lengths.sum()), dtype=tokens.dtype)
    is_text = np.ones(len(ids), dtype=bool)
    is_text[begins] = is_text[ends - 1] = False
    ids[is_text] = text
    ids[begins] = tokenizer.special_ids["cls"]
    ids[ends - 1] = tokenizer.special_ids["sep"]
    return ids, begins, lengths


def _left_over(intervals: Intervals, pieces: Pieces, taken: np.ndarray, truncate: bool) -> Intervals:
    """What no bin has: neighbours of one interval joined again. Truncated, an interval is used whole or not at all."""
    waiting = np.flatnonzero(~taken)
    owner = pieces.document[waiting]
    if truncate:
        return Intervals(*(column[owner] for column in intervals))
    first = np.ones(len(waiting), dtype=bool)
    first[1:] = (np.diff(waiting) != 1) | (np.diff(owner) != 0)
    heads = np.flatnonzero(first)
    size = np.add.reduceat(pieces.size[waiting], heads) if len(heads) else np.empty(0, dtype=np.int64)
    owner, offset = owner[heads], pieces.start[waiting[heads]]
    return Intervals(intervals.start[owner] + offset, size, intervals.arrival[owner] + offset)
