"""Compute micro-batches per step, longest piece and masking rate as functions of a bin's global index."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Literal, NamedTuple


class Stage(NamedTuple):
    """Steps of `batches_per_step` bins (micro-batches) with pieces of at most `max_seq_len` tokens.

    first_step, first_index: the step and the bin with which the stage begins in a run without rollbacks. mixture: the
    index of its mixture of sources.
    """

    first_step: int
    first_index: int
    batches_per_step: int
    max_seq_len: int
    mixture: int = 0


@dataclass(frozen=True)
class BatchSchedule:
    """The stages of a run. Each begins with the first bin of a step, and the last has no end.

    Bins that a rollback skipped are never used again, so after a rollback the run is further in this list than its step
    count says.
    """

    stages: tuple[Stage, ...]

    def at(self, index: int) -> Stage:
        """Return the stage of bin `index`."""
        return self.stages[bisect_right(self.stages, index, key=lambda stage: stage.first_index) - 1]

    def bins_before(self, step: int) -> int:
        """Count the bins before a step in a run without rollbacks."""
        stage = self.stages[bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1]
        return stage.first_index + (step - stage.first_step) * stage.batches_per_step

    @property
    def longest(self) -> int:
        return max(stage.max_seq_len for stage in self.stages)

    @property
    def batches_per_step(self) -> list[int]:
        """The different numbers of micro-batches per step, ascending."""
        return sorted({stage.batches_per_step for stage in self.stages})


@dataclass(frozen=True)
class MaskingRate:
    """The share of maskable tokens to mask: `first` at bin 0, changing along `shape` to `last` at bin `num_bins`."""

    first: float
    last: float
    num_bins: int
    shape: Literal["linear", "cosine"] = "linear"

    @classmethod
    def constant(cls, probability: float) -> "MaskingRate":
        return cls(probability, probability, 1)

    def at(self, index: int) -> float:
        progress = min(1.0, index / max(1, self.num_bins))
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.first + (self.last - self.first) * progress

    @property
    def highest(self) -> float:
        return max(self.first, self.last)


@dataclass(frozen=True)
class MaskingSteps:
    """Another share of maskable tokens in each phase. rates: (first bin, share) of each phase, the first from bin 0."""

    rates: tuple[tuple[int, float], ...]

    def at(self, index: int) -> float:
        return self.rates[bisect_right(self.rates, index, key=lambda rate: rate[0]) - 1][1]

    @property
    def highest(self) -> float:
        return max(rate for _, rate in self.rates)


class Length(NamedTuple):
    """max_seq_len, and the index of a mixture of sources, up to the share `until` of the run's steps."""

    max_seq_len: int
    until: float
    mixture: int = 0


def count_steps(num_bins: int, batches_per_step: int, first_batches: int | None = None, warmup: float = 0) -> int:
    """Return the steps, at least 1, of a run of num_bins bins: exactly, rounded down, without a batch warm-up.

    With one, make_schedule() rounds the steps at which the batch grows, so that the run has up to two steps' bins more
    or less. The other arguments are make_schedule()'s.
    """
    levels = max(1, batches_per_step // (first_batches or batches_per_step))
    # Level k of the warm-up has (k + 1) / levels of the full batch: on average (levels + 1) / (2 * levels) of it.
    missing = Fraction(warmup) * (levels - 1) / (2 * levels)
    return max(1, math.floor(num_bins / (batches_per_step * (1 - missing))))


def make_schedule(
    total_steps: int,
    batches_per_step: int,
    lengths: Sequence[Length],
    *,
    first_batches: int | None = None,
    warmup: float = 0,
) -> BatchSchedule:
    """Lay out a run of total_steps steps.

    batches_per_step: micro-batches of a step after the batch warm-up. first_batches: micro-batches of a step at its
    start; they grow by first_batches in equal stages over the share `warmup` of the steps. lengths: in order, the
    last until 1.
    """
    first_batches = first_batches or batches_per_step
    if batches_per_step % first_batches:
        raise ValueError(
            f"the batch warm-up starts at {first_batches} micro-batches, which do not divide the {batches_per_step} at "
            "its end."
        )
    levels = batches_per_step // first_batches
    batch_starts = {
        round(level * warmup * total_steps / levels): (level + 1) * first_batches for level in range(levels)
    }
    length_starts, begin = {}, 0.0
    for length, until, mixture in lengths:
        length_starts[round(begin * total_steps)] = (length, mixture)
        begin = until
    starts = sorted({0, *batch_starts, *length_starts})
    batches = list(accumulate((batch_starts.get(step, 0) for step in starts), lambda old, new: new or old))
    caps = list(accumulate((length_starts.get(step) for step in starts), lambda old, new: new or old))
    index, stages = 0, []
    for number, step in enumerate(starts):
        if number:
            index += (step - starts[number - 1]) * batches[number - 1]
        stages.append(Stage(step, index, batches[number], *caps[number]))
    return BatchSchedule(tuple(stages))
