"""Estimate the size of a micro-batch of web documents: its tokens, padding, masked tokens and attended keys."""

import math
from dataclasses import dataclass
from statistics import NormalDist

from megabert.config.recipe import ModelConfig, Recipe

# Web documents in tokens, as tests/benchmarks draw them: their logarithm has this mean and standard deviation.
LOG_LENGTH = NormalDist(5.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch. tokens: real ones; slots: computed, with padding; masked: tokens to predict; attended: the mean
    number of keys per token and layer."""

    tokens: float
    slots: float
    masked: float
    attended: float


def piece_lengths(longest: int, documents: str) -> tuple[float, float]:
    """Return the mean length of a document's pieces, and the mean of the squares over the mean, with [CLS] and [SEP].

    documents: truncate or split, as data.documents.
    """
    sums = [0.0, 0.0, 0.0]
    for index in range(1000):
        length = math.exp(LOG_LENGTH.inv_cdf((index + 0.5) / 1000))
        pieces = 1 if documents == "truncate" else max(1, math.ceil(length / (longest - 2)))
        piece = min(max(length / pieces + 2, 3), longest)
        sums = [sums[0] + pieces, sums[1] + pieces * piece, sums[2] + pieces * piece**2]
    return sums[1] / sums[0], sums[2] / sums[1]


def batch_of(model: ModelConfig, tokens: int, longest: int, documents: str, masking: float) -> Batch:
    """Return what a bin of real tokens computes; a padded model computes every document at the longest length."""
    mean, attended = piece_lengths(longest, documents)
    padded = model.padding == "padded"
    return Batch(
        tokens=tokens,
        slots=tokens * longest / mean if padded else tokens,
        masked=masking * tokens,
        attended=longest if padded else attended,
    )


def batch_of_web_pages(recipe: Recipe, tokens: int) -> Batch:
    """Return what a recipe's micro-batch computes in its last phase, with documents as of web pages.

    Of several masking rates it has the highest.
    """
    length = recipe.data.lengths[-1][0]
    return batch_of(recipe.model, tokens, length, recipe.data.documents, max(recipe.masking_rates))


def largest_batch(recipe: Recipe, tokens: int, max_documents: dict[int, int]) -> Batch:
    """Return the most that a micro-batch of a run computes. max_documents: by max_seq_len, from the run's corpus.

    A padded model computes at most max_documents rows of each max_seq_len.
    """
    slots = tokens
    if recipe.model.padding == "padded":
        slots = max((length * count for length, count in max_documents.items()), default=tokens)
    return Batch(tokens=tokens, slots=slots, masked=max(recipe.masking_rates) * tokens, attended=0)
