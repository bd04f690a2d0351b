"""Choose D_max, the most pieces that a bin may have, from the lengths of a corpus's documents."""

import math

from megabert.data.packing import SPECIALS_PER_PIECE, pieces_per_token
from megabert.data.shards.source import Corpus


def default_max_documents(corpus: Corpus, bin_tokens: int, max_seq_len: int, truncate: bool) -> int:
    """Return D_max: the pieces of a bin by the corpus's lengths, and room for chance, so that few bins reach it.

    Of several sources the one with the shortest pieces counts, because a bin may be full of them.
    """
    known = [source.document_lengths() for source in corpus.sources]
    lengths = [item for item in known if item is not None]
    if len(lengths) < len(known):
        return four_medians(corpus, bin_tokens, max_seq_len)
    # A sample may have no document, so count at least the pieces of a bin of longest pieces.
    rate = max(1 / max_seq_len, *(pieces_per_token(*item, max_seq_len, truncate) for item in lengths))
    mean = bin_tokens * rate
    # Pieces of different lengths: their number in a bin varies by up to about its square root.
    return math.ceil(mean + max(mean / 4, 4 * math.sqrt(mean)))


def four_medians(corpus: Corpus, bin_tokens: int, max_seq_len: int) -> int:
    """Return D_max of corpora without a histogram of lengths, and of runs whose checkpoints do not record it."""
    median = min(corpus.median_document_tokens + SPECIALS_PER_PIECE, max_seq_len)
    return -(-4 * bin_tokens // max(SPECIALS_PER_PIECE + 1, median))


def check_max_documents(max_documents: int, bin_tokens: int, max_seq_len: int) -> None:
    """Raise ValueError if a bin of longest pieces has no room for some shorter ones."""
    # A bin of the longest pieces has T / S; each shorter piece needs a part of a place more. The oldest piece may be
    # alone in its bin, with filler in sequences of S.
    least = max(-(-5 * bin_tokens // (4 * max_seq_len)), -(-bin_tokens // max_seq_len) + 1)
    if max_documents < least:
        raise ValueError(
            f"data.max_documents is {max_documents}, expected at least {least} for {bin_tokens} tokens in pieces of at "
            f"most {max_seq_len}."
        )
