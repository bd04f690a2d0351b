"""Choose the tokens of a bin that a model has to predict, hide them in place, and return their labels."""

from typing import NamedTuple

import numpy as np

# Shares of the chosen tokens that become [MASK] or a random token; the rest stay (https://arxiv.org/abs/1810.04805,
# 3.1).
MASK_SHARE = 0.8
RANDOM_SHARE = 0.1
# Random numbers have 16 bits, so a share is exact to 0.001 %.
STEPS = 1 << 16


class Masked(NamedTuple):
    """positions: (M,) ascending; labels: (M,) the original ids at these positions."""

    positions: np.ndarray
    labels: np.ndarray


def masked_count(maskable: int, probability: float) -> int:
    """Return M, the number of tokens to mask: the rounded share of the maskable ones."""
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

    ids: (T,). maskable: (T,) bool, False for special tokens and filler. ordinary_ids: the ids that a random token may
    have: no special tokens, and no rows that only pad the embedding.
    """
    positions = np.flatnonzero(choose_masked(maskable, probability, rng))
    labels = ids[positions]
    fate = _draw(len(positions), rng)
    ids[positions[fate < round(MASK_SHARE * STEPS)]] = mask_id
    random = positions[fate >= round((1 - RANDOM_SHARE) * STEPS)]
    ids[random] = ordinary_ids[rng.integers(len(ordinary_ids), size=len(random))]
    return Masked(positions, labels)


def choose_masked(maskable: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
    """Choose exactly M of the maskable positions, uniformly over all sets of M. (T,) bool -> (T,) bool.

    Draws each position independently, which is fast and gives about M; then adds or drops a few at random. Neither step
    prefers a position, so the result is uniform.
    """
    wanted = masked_count(int(np.count_nonzero(maskable)), probability)
    chosen = maskable & (_draw(len(maskable), rng) < round(probability * STEPS))
    excess = int(np.count_nonzero(chosen)) - wanted
    pool = np.flatnonzero(chosen) if excess > 0 else np.flatnonzero(maskable & ~chosen)
    chosen[rng.choice(pool, abs(excess), replace=False)] = excess < 0
    return chosen


def _draw(count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw (count,) uniform uint16, four from each 64 random bits."""
    raw = np.asarray(rng.bit_generator.random_raw(-(-count // 4)), dtype="<u8")
    return raw.view("<u2")[:count]
