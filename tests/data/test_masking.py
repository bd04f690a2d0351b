import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megabert.data.masking import mask, masked_count

MASK_ID = 4
ORDINARY = np.arange(5, 100, dtype=np.int32)


def masked_bin(num_tokens: int, probability: float, seed: int):
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, 100, num_tokens).astype(np.int32)
    special = rng.random(num_tokens) < 0.1
    ids[special] = 2
    maskable = np.flatnonzero(~special)
    return ids, maskable, mask(ids, maskable, probability, MASK_ID, ORDINARY, rng)


@given(st.integers(1, 400), st.floats(0.01, 0.99), st.integers(0, 1000))
def test_masking_never_touches_special_tokens_and_hides_the_exact_share(num_tokens, probability, seed):
    ids, maskable, masked = masked_bin(num_tokens, probability, seed)
    assert len(masked.positions) == masked_count(len(maskable), probability) <= len(maskable)
    assert np.isin(masked.positions, maskable).all()
    assert (np.diff(masked.positions) > 0).all()
    assert np.array_equal(masked.labels, ids[masked.positions])
    untouched = np.setdiff1d(np.arange(num_tokens), masked.positions)
    assert np.array_equal(masked.ids[untouched], ids[untouched])
    assert np.isin(masked.ids[masked.positions], [MASK_ID, *ORDINARY]).all()


def test_eight_tenths_become_mask_one_random_one_stays():
    _, _, masked = masked_bin(200_000, 0.5, 0)
    new = masked.ids[masked.positions]
    became_mask = (new == MASK_ID).mean()
    stayed = (new == masked.labels).mean()
    assert abs(became_mask - 0.8) < 0.01
    assert abs(stayed - (0.1 + 0.1 / len(ORDINARY))) < 0.01


def test_masking_is_a_function_of_the_random_numbers():
    first, second = masked_bin(500, 0.3, 7)[2], masked_bin(500, 0.3, 7)[2]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
