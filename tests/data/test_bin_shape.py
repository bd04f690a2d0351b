"""D_max: how many bins have more pieces than places."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megabert.data.bin_shape import default_max_documents
from megabert.data.packing import SPECIALS_PER_PIECE, cut

BINS = 400


@given(
    st.sampled_from([128, 512, 1024, 8192]),
    st.sampled_from([2, 8, 64]),
    st.sampled_from([5, 20, 100, 400, 2000]),
    st.floats(0, 1),
    st.booleans(),
    st.integers(0, 1 << 20),
)
@settings(max_examples=50)
def test_few_bins_have_more_pieces_than_places(max_seq_len, bin_pieces, median, spread, truncate, seed):
    """Of documents in random order, with lengths as on the web: log-normal, up to its spread of 1."""
    rng = np.random.default_rng(seed)
    bin_tokens = bin_pieces * max_seq_len
    count = max(20_000, 4 * bin_tokens // median)
    documents = np.maximum(1, rng.lognormal(np.log(median), spread, count).astype(int))
    source = SimpleNamespace(document_lengths=lambda: np.unique(documents, return_counts=True))
    corpus: Any = SimpleNamespace(sources=[source])
    places = default_max_documents(corpus, bin_tokens, max_seq_len, truncate)
    sizes = cut(documents, max_seq_len, truncate).size + SPECIALS_PER_PIECE
    ends = np.concatenate([[0], sizes.cumsum()])
    first = rng.integers(0, np.searchsorted(ends, ends[-1] - bin_tokens), BINS)
    pieces = np.searchsorted(ends, ends[first] + bin_tokens, side="right") - 1 - first
    assert (pieces > places).mean() <= 0.02
    # Nor many more than they need.
    assert places <= max(1.3 * pieces.mean(), pieces.mean() + 5 * pieces.mean() ** 0.5) + 2
