"""Masking: exact counts, the shares of BERT, and uniform positions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megabert.data.masking import choose_masked, mask, masked_count

MASK_ID = 4
ORDINARY = np.arange(5, 100, dtype=np.int32)


def masked_bin(num_tokens: int, probability: float, seed: int):
    """(ids before, maskable, ids after, masked)"""
    rng = np.random.Generator(np.random.Philox(seed))
    ids = rng.integers(5, 100, num_tokens).astype(np.int32)
    special = rng.random(num_tokens) < 0.1
    ids[special] = 2
    after = ids.copy()
    return ids, ~special, after, mask(after, ~special, probability, MASK_ID, ORDINARY, rng)


@given(st.integers(1, 400), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_masking_never_touches_special_tokens_and_hides_the_exact_share(num_tokens, probability, seed):
    ids, maskable, after, masked = masked_bin(num_tokens, probability, seed)
    assert len(masked.positions) == masked_count(int(maskable.sum()), probability) <= maskable.sum()
    assert maskable[masked.positions].all()
    assert (np.diff(masked.positions) > 0).all()
    assert np.array_equal(masked.labels, ids[masked.positions])
    untouched = np.setdiff1d(np.arange(num_tokens), masked.positions)
    assert np.array_equal(after[untouched], ids[untouched])
    assert np.isin(after[masked.positions], [MASK_ID, *ORDINARY]).all()


def test_80_percent_become_mask_10_random_10_stay():
    _, _, after, masked = masked_bin(400_000, 0.5, 0)
    new = after[masked.positions]
    became_mask = (new == MASK_ID).mean()
    stayed = (new == masked.labels).mean()
    assert abs(became_mask - 0.8) < 0.005
    assert abs(stayed - (0.1 + 0.1 / len(ORDINARY))) < 0.005


def test_every_position_is_equally_likely():
    """In 20,000 draws of 3 of 12 positions, each position and each pair has its expected frequency."""
    rng = np.random.Generator(np.random.Philox(1))
    maskable = np.array([True, False, True] * 6)
    drawn = np.stack([choose_masked(maskable, 0.25, rng) for _ in range(20_000)])[:, maskable].astype(float)
    assert (drawn.sum(axis=1) == 3).all()
    # Standard error 0.003.
    assert np.abs(drawn.mean(axis=0) - 3 / 12).max() < 0.015
    together = drawn.T @ drawn / len(drawn)
    pairs = together[~np.eye(12, dtype=bool)]
    # Standard error 0.0015.
    assert np.abs(pairs - (3 * 2) / (12 * 11)).max() < 0.01


def test_masking_depends_only_on_the_random_generator():
    first, second = masked_bin(500, 0.3, 7), masked_bin(500, 0.3, 7)
    assert np.array_equal(first[2], second[2])
    assert all(np.array_equal(a, b) for a, b in zip(first[3], second[3], strict=True))


def test_nothing_is_masked_without_maskable_tokens():
    ids = np.zeros(8, dtype=np.int32)
    rng = np.random.Generator(np.random.Philox(0))
    assert len(mask(ids, np.zeros(8, dtype=bool), 0.3, MASK_ID, ORDINARY, rng).positions) == 0
    assert not ids.any()
