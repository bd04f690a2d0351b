"""Cut documents into pieces, and choose whole pieces for bins of exactly T tokens, in pure functions."""

from typing import NamedTuple

import numpy as np

# Each piece begins with [CLS] and ends with [SEP].
SPECIALS_PER_PIECE = 2

# More than this many times max_pieces waiting means that most pieces are short: the look-ahead holds at most four bins
# of tokens.
CROWDED = 8


class Pieces(NamedTuple):
    """document: (n,) index of each piece's document; start, size: (n,) raw tokens within it, specials not counted."""

    document: np.ndarray
    start: np.ndarray
    size: np.ndarray


def cut(lengths: np.ndarray, max_seq_len: int, truncate: bool) -> Pieces:
    """Cut documents evenly into pieces that fit max_seq_len with their specials.

    lengths: (documents,) raw tokens. With truncate, only the first max_seq_len - 2 tokens of each document are used.
    Empty documents have no piece. A document of 300 tokens with max_seq_len 128 becomes 100, 100, 100.
    """
    room = max_seq_len - SPECIALS_PER_PIECE
    lengths = lengths.astype(np.int64)
    if truncate:
        lengths = np.minimum(lengths, room)
    # Number of pieces of each document.
    counts = -(-lengths // room)
    document = np.repeat(np.arange(len(lengths)), counts)
    # Number of each piece within its document.
    number = np.arange(len(document)) - np.repeat(counts.cumsum() - counts, counts)
    short, longer = lengths[document] // counts[document], lengths[document] % counts[document]
    size = short + (number < longer)
    start = number * short + np.minimum(number, longer)
    return Pieces(document, start, size)


def pieces_per_token(lengths: np.ndarray, documents: np.ndarray, max_seq_len: int, truncate: bool) -> float:
    """Return how many pieces cut() makes per token of the pieces, specials counted; 0.0 without documents.

    lengths: raw tokens, also fractions; documents: how many documents have each of them.
    """
    room = max_seq_len - SPECIALS_PER_PIECE
    counts = np.minimum(np.ceil(lengths / room), 1) if truncate else np.ceil(lengths / room)
    tokens = (np.minimum(lengths, room) if truncate else lengths) + SPECIALS_PER_PIECE * counts
    return float(documents @ counts) / max(1.0, float(documents @ tokens))


def choose_pieces(lengths: np.ndarray, capacity: int, max_pieces: int, max_seq_len: int) -> np.ndarray:
    """Choose the pieces of one bin from those waiting: the oldest first, then the ones that fill the end best.

    lengths: (n,) of the waiting pieces in order of arrival, specials counted, each at most max_seq_len.
    capacity: T, at least max_seq_len. max_pieces: D_max, above T / max_seq_len; the ceil(free / max_seq_len) filler
    sequences count. Returns indices into lengths, ascending. The oldest piece is always chosen, so no piece waits for
    more bins than the look-ahead holds.
    """
    ends = lengths.cumsum()
    number = np.arange(1, len(lengths) + 1)
    allowed = number - (-(capacity - ends) // max_seq_len) <= max_pieces
    # Many short pieces: the bin runs out of places before it runs out of tokens. Take pieces in order of arrival only;
    # a best fit would prefer long pieces, and the short ones would pile up.
    if len(lengths) > CROWDED * max_pieces:
        fit = allowed & (ends <= capacity)
        return np.arange(int(np.flatnonzero(fit)[-1]) + 1 if fit.any() else 1)
    # Leave between max_seq_len and 2 * max_seq_len tokens free, to be filled with the two pieces that fit best.
    head = int(np.searchsorted(ends, capacity - max_seq_len, side="right"))
    head = min(head, int(allowed.argmin()) if not allowed.all() else len(lengths))
    # Always choose the oldest, so that no piece waits for ever.
    head = min(max(head, 1), len(lengths))
    free = capacity - int(ends[head - 1])
    chosen = list(range(head))
    waiting = np.arange(head, len(lengths))
    while free > 0 and len(waiting):
        slots = max_pieces - len(chosen)
        pick = _best(lengths[waiting], free, slots)
        filled = int(lengths[waiting[pick]].sum())
        if not pick or len(pick) - (-(free - filled) // max_seq_len) > slots:
            break
        chosen += waiting[pick].tolist()
        waiting = np.delete(waiting, pick)
        free -= filled
    return np.sort(np.array(chosen, dtype=np.int64))


def _best(lengths: np.ndarray, free: int, slots: int) -> list[int]:
    """Find the piece, or with two slots the pair, whose tokens come closest to `free` from below.

    lengths: (n,). Among pieces of one length the oldest wins. Returns indices into lengths, none if no piece fits.
    """
    # return_index finds the oldest of several pieces of one length.
    values, first = np.unique(lengths, return_index=True)
    place = int(np.searchsorted(values, free, side="right"))
    if not place or slots < 1:
        return []
    one = [int(first[place - 1])]
    if slots < 2:
        return one
    partner = np.searchsorted(values, free - values, side="right") - 1  # (k,) the longest that fits together with each
    sums = np.where(partner >= 0, values + values[np.maximum(partner, 0)], -1)
    best = int(sums.argmax())
    if sums[best] <= values[place - 1]:
        return one
    if best != partner[best]:
        return [int(first[best]), int(first[partner[best]])]
    # The pair may be two pieces of the same length, if there are two.
    twins = np.flatnonzero(lengths == values[best])[:2]
    return twins.tolist() if len(twins) == 2 else one


def filler_lengths(free: int, max_seq_len: int) -> np.ndarray:
    """Cut the free end of a bin into sequences of [PAD] of at most max_seq_len tokens each."""
    full, rest = divmod(free, max_seq_len)
    return np.array([max_seq_len] * full + ([rest] if rest else []), dtype=np.int64)
