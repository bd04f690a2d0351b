"""Packing: cutting documents into pieces and choosing the pieces of a bin."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabert.data.packing import SPECIALS_PER_PIECE, choose_pieces, cut, filler_lengths, pieces_per_token

lengths_of_documents = st.lists(st.integers(0, 2000), min_size=1, max_size=50)


@given(lengths_of_documents, st.integers(3, 300))
def test_cut_covers_every_token_once_and_evenly(lengths, max_seq_len):
    pieces = cut(np.array(lengths), max_seq_len, truncate=False)
    for document, length in enumerate(lengths):
        mine = pieces.document == document
        start, size = pieces.start[mine], pieces.size[mine]
        covered = np.concatenate([np.arange(a, a + n) for a, n in zip(start, size, strict=True)] or [np.empty(0)])
        assert np.array_equal(covered, np.arange(length))
        if len(size):
            assert size.max() <= max_seq_len - SPECIALS_PER_PIECE
            assert size.max() - size.min() <= 1


@given(lengths_of_documents, st.integers(3, 300))
def test_truncate_keeps_only_the_first_piece(lengths, max_seq_len):
    pieces = cut(np.array(lengths), max_seq_len, truncate=True)
    expected = [min(length, max_seq_len - SPECIALS_PER_PIECE) for length in lengths if length]
    assert pieces.size.tolist() == expected
    assert not pieces.start.any()


@settings(max_examples=500)
@given(st.data())
def test_chosen_pieces_fit_and_include_the_oldest(data):
    max_seq_len = data.draw(st.integers(3, 128))
    capacity = max_seq_len * data.draw(st.integers(1, 20))
    max_pieces = data.draw(st.integers(capacity // max_seq_len + 1, 200))
    lengths = np.array(data.draw(st.lists(st.integers(3, max_seq_len), min_size=1, max_size=200)))
    chosen = choose_pieces(lengths, capacity, max_pieces, max_seq_len)
    assert len(set(chosen.tolist())) == len(chosen)
    assert chosen[0] == 0 or lengths[0] > capacity
    assert (np.diff(chosen) > 0).all()
    free = capacity - lengths[chosen].sum()
    assert free >= 0
    assert len(chosen) + len(filler_lengths(free, max_seq_len)) <= max_pieces


def test_bins_are_full_for_real_lengths():
    """Bins of at least 16 longest pieces are filled to 99.5 %, bins of 8 to 97 %."""
    rng = np.random.default_rng(0)
    for max_seq_len, multiple, wanted in ((128, 16, 0.995), (512, 16, 0.995), (128, 8, 0.97)):
        capacity = max_seq_len * multiple
        documents = np.maximum(1, rng.lognormal(5.5, 1.0, 20_000)).astype(int)
        waiting = cut(documents, max_seq_len, truncate=False).size + SPECIALS_PER_PIECE
        filled = []
        for _ in range(200):
            near = int(np.searchsorted(waiting.cumsum(), 4 * capacity))
            chosen = choose_pieces(waiting[:near], capacity, 10_000, max_seq_len)
            filled.append(waiting[chosen].sum() / capacity)
            waiting = np.delete(waiting, chosen)
        assert np.mean(filled) >= wanted


def test_filler_is_cut_into_sequences():
    assert filler_lengths(300, 128).tolist() == [128, 128, 44]
    assert filler_lengths(0, 128).tolist() == []


@given(st.lists(st.integers(0, 900), max_size=20), st.integers(3, 300), st.booleans())
def test_pieces_per_token_counts_what_cut_makes(lengths, max_seq_len, truncate):
    lengths = np.array(lengths, np.int64)
    pieces = cut(lengths, max_seq_len, truncate)
    expected = len(pieces.size) / max(1, pieces.size.sum() + SPECIALS_PER_PIECE * len(pieces.size))
    assert pieces_per_token(lengths, np.ones(len(lengths)), max_seq_len, truncate) == pytest.approx(expected)
