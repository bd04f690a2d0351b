"""Masked language modelling on one bin. Pure: (ids, rng) -> (ids, masked positions, labels)."""

from typing import NamedTuple

import numpy as np

MASK_SHARE = 0.8  # of the chosen tokens become [MASK] ...
RANDOM_SHARE = 0.1  # ... or a random token; the rest stay as they are (https://arxiv.org/abs/1810.04805, 3.1)


class Masked(NamedTuple):
    """ids: (T,) with holes; positions: (M,) ascending; labels: (M,) what was there."""

    ids: np.ndarray
    positions: np.ndarray
    labels: np.ndarray


def masked_count(maskable: int, probability: float) -> int:
    """Give M: the rounded share of the maskable tokens, never more than there are."""
    return min(round(probability * maskable), maskable)


def mask(
    ids: np.ndarray,
    maskable: np.ndarray,
    probability: float,
    mask_id: int,
    ordinary_ids: np.ndarray,
    rng: np.random.Generator,
) -> Masked:
    """Hide a share of the maskable tokens.

    ids: (T,); maskable: (n,) positions that are neither special nor filler; ordinary_ids: the tokenizer's ids that
    a random token may be: no special ones, and none of the rows that only pad the embedding.
    """
    count = masked_count(len(maskable), probability)
    positions = np.sort(rng.choice(maskable, count, replace=False, shuffle=False))
    labels = ids[positions]
    fate = rng.random(count)
    ids = ids.copy()
    ids[positions[fate < MASK_SHARE]] = mask_id
    random = positions[(fate >= MASK_SHARE) & (fate < MASK_SHARE + RANDOM_SHARE)]
    ids[random] = ordinary_ids[rng.integers(len(ordinary_ids), size=len(random))]
    return Masked(ids, positions, labels)
