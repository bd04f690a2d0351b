"""Pieces of a chunk: framing, truncation, and cutting again what earlier phases left."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabert.data.chunk_pieces import Bits, PhaseSnapshot, PieceOptions, cut_chunk, frame, remaining_intervals
from megabert.data.order import ChunkId, Documents
from megabert.data.packing import cut
from megabert.data.shards.manifest import TokenizerInfo

TOKENIZER = TokenizerInfo("f" * 64, 100_000, {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}, (0, 1, 2, 3, 4))
lengths_of_documents = st.lists(st.integers(0, 300), min_size=1, max_size=20)


def chunk_of(lengths: list[int]) -> Documents:
    """Number the tokens from 5 on, so that a missing or repeated token shows."""
    size = np.array(lengths, dtype=np.int64)
    return Documents(np.arange(5, 5 + sum(lengths), dtype=np.uint32), size.cumsum() - size, size)


def text_of(ids: np.ndarray) -> list[int]:
    return ids[ids >= 5].tolist()


@given(st.lists(st.booleans(), max_size=3000))
def test_bits_survive_json(values):
    bits = Bits.of(np.array(values, dtype=bool))
    assert Bits.from_json(bits.to_json()).values().tolist() == values


@given(lengths_of_documents, st.integers(3, 64), st.booleans())
def test_pieces_are_framed_and_complete(lengths, max_seq_len, truncate):
    data = chunk_of(lengths)
    chunk = cut_chunk(ChunkId(0, 0), 0, data, PieceOptions(max_seq_len, truncate), TOKENIZER, [])
    kept = [min(length, max_seq_len - 2) if truncate else length for length in lengths]
    assert chunk.used_tokens == sum(kept)
    begins = np.cumsum([0, *lengths])[:-1]
    assert text_of(chunk.ids) == [5 + b + i for b, n in zip(begins, kept, strict=True) for i in range(n)]
    for begin, length in zip(chunk.begins, chunk.lengths, strict=True):
        piece = chunk.ids[begin : begin + length]
        assert (piece[0], piece[-1]) == (2, 3)
        assert (piece[1:-1] >= 5).all()
        assert 3 <= length <= max_seq_len
    assert chunk.lengths.sum() == len(chunk.ids)


@given(lengths_of_documents, st.lists(st.integers(3, 64), min_size=2, max_size=4), st.booleans(), st.integers(0, 99))
def test_a_new_phase_cuts_only_the_waiting_tokens(lengths, phases, truncate, seed):
    """Take some of the pieces in every phase: all phases together use every token once."""
    rng = np.random.default_rng(seed)
    data, snapshots, seen = chunk_of(lengths), [], []
    for number, max_seq_len in enumerate(phases):
        chunk = cut_chunk(ChunkId(0, 0), 0, data, PieceOptions(max_seq_len, truncate), TOKENIZER, snapshots)
        taken = rng.random(len(chunk.lengths)) < (1.0 if number == len(phases) - 1 else 0.4)
        for piece in np.flatnonzero(taken):
            seen += text_of(chunk.take(piece, piece + 1))
        assert chunk.num_waiting == (~taken).sum()
        snapshots.append(PhaseSnapshot(max_seq_len, chunk.taken))
    # The first tokens of every document, as many as fit in the phase that took it.
    if truncate:
        begins = {5 + b for b, n in zip(np.cumsum([0, *lengths])[:-1], lengths, strict=True) if n}
        assert begins <= set(seen)
        assert len(seen) == len(set(seen))
    else:
        assert sorted(seen) == data.tokens.tolist()


def test_waiting_neighbours_of_one_document_are_joined():
    """Of 10 tokens in 5 pieces, the second piece is in a bin: the 2 tokens before it and the 6 after it are left."""
    taken = np.array([False, True, False, False, False])
    left, used = remaining_intervals(chunk_of([10]), PieceOptions(6, False), [PhaseSnapshot(4, taken)])
    assert used == 10
    assert (left.start.tolist(), left.size.tolist(), left.used_offset.tolist()) == ([0, 4], [2, 6], [0, 4])
    assert cut(left.size, 6, False).size.tolist() == [2, 3, 3]


def test_a_damaged_chunk_has_no_pieces():
    chunk = cut_chunk(ChunkId(3, 1), 7, None, PieceOptions(16, False), TOKENIZER, [])
    assert (chunk.damaged, chunk.used_tokens, len(chunk.ids), chunk.num_waiting) == (True, 0, 0, 0)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_frames_keep_the_dtype(dtype):
    tokens = np.arange(10, 16).astype(dtype)
    ids, begins, lengths = frame(tokens, np.array([0, 4]), np.array([3, 2]), TOKENIZER)
    assert ids.tolist() == [2, 10, 11, 12, 3, 2, 14, 15, 3]
    assert ids.dtype == dtype
    assert (begins.tolist(), lengths.tolist()) == ([0, 5], [5, 4])
