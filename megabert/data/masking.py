"""Masked language modelling on one bin. Pure: (ids, rng) -> (masked positions, labels), with holes put into ids."""

from typing import NamedTuple

import numpy as np

MASK_SHARE = 0.8  # of the chosen tokens become [MASK] ...
RANDOM_SHARE = 0.1  # ... or a random token; the rest stay as they are (https://arxiv.org/abs/1810.04805, 3.1)
STEPS = 1 << 16  # shares are drawn with 16 bits: to 0.001 %


class Masked(NamedTuple):
    """positions: (M,) ascending; labels: (M,) what was there."""

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
    """Hide a share of the maskable tokens, in place.

    ids: (T,); maskable: (T,) bool, neither special nor filler; ordinary_ids: the tokenizer's ids that a random token may
    be: no special ones, and none of the rows that only pad the embedding.
    """
    positions = np.flatnonzero(choose(maskable, probability, rng))
    labels = ids[positions]
    fate = _draw(len(positions), rng)
    ids[positions[fate < round(MASK_SHARE * STEPS)]] = mask_id
    random = positions[fate >= round((1 - RANDOM_SHARE) * STEPS)]
    ids[random] = ordinary_ids[rng.integers(len(ordinary_ids), size=len(random))]
    return Masked(positions, labels)


def choose(maskable: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Choose exactly M of the maskable places, each set of M as likely as any other. (T,) bool -> (T,) bool.

    Each place alone first, which is fast and nearly right; then a few are added or dropped at random. Neither step
    prefers a place, so the result does not either.
    """
    wanted = masked_count(int(np.count_nonzero(maskable)), probability)
    chosen = maskable & (_draw(len(maskable), rng) < round(probability * STEPS))
    excess = int(np.count_nonzero(chosen)) - wanted
    pool = np.flatnonzero(chosen) if excess > 0 else np.flatnonzero(maskable & ~chosen)
    chosen[rng.choice(pool, abs(excess), replace=False)] = excess < 0
    return chosen


def _draw(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) uniform uint16, four from each 64 bits of the generator."""
    raw = np.asarray(rng.bit_generator.random_raw(-(-count // 4)), dtype="<u8")
    return raw.view("<u2")[:count]
