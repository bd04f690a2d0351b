"""Which micro-batches make which step, how long their pieces may be, and how much of them is masked.

All pure functions of a bin's global index.

A run is a list of stages. In the one that holds bin i, a step is `step_batches` bins and pieces have at most
`max_seq_len` tokens. Bins that a rollback left behind are not used again, so a run that rolled back is further in this
list than its count of steps says; the last stage goes on for as long as it takes.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NamedTuple


class Stage(NamedTuple):
    """first_step, first_index: where it begins, in a run that never rolls back."""

    first_step: int
    first_index: int
    step_batches: int
    max_seq_len: int


@dataclass(frozen=True)
class Plan:
    """The stages of a run, each beginning with a step."""

    stages: tuple[Stage, ...]

    def at(self, index: int) -> Stage:
        """The stage of bin `index`."""
        return self.stages[bisect_right(self.stages, index, key=lambda stage: stage.first_index) - 1]

    def bins_before(self, step: int) -> int:
        """The first bin of a step, in a run that never rolls back."""
        stage = self.stages[bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1]
        return stage.first_index + (step - stage.first_step) * stage.step_batches

    @property
    def longest(self) -> int:
        return max(stage.max_seq_len for stage in self.stages)

    @property
    def step_batches(self) -> list[int]:
        """The different sizes that a step has, micro-batches."""
        return sorted({stage.step_batches for stage in self.stages})


@dataclass(frozen=True)
class MaskingRate:
    """The share of maskable tokens to hide: from `first` in bin 0 to `last` in bin `over` and all later ones."""

    first: float
    last: float
    over: int
    shape: Literal["linear", "cosine"] = "linear"

    @classmethod
    def constant(cls, probability: float) -> "MaskingRate":
        return cls(probability, probability, 1)

    def at(self, index: int) -> float:
        done = min(1.0, index / max(1, self.over))
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.first + (self.last - self.first) * done

    @property
    def highest(self) -> float:
        return max(self.first, self.last)


class Length(NamedTuple):
    """max_seq_len up to this share of the run's steps."""

    max_seq_len: int
    until: float


def make_plan(
    total_steps: int,
    step_batches: int,
    lengths: Sequence[Length],
    *,
    first_batches: int | None = None,
    warmup: float = 0,
) -> Plan:
    """Lay out a run of total_steps steps.

    step_batches: micro-batches of a step; first_batches: the same at the start of a batch warm-up, which grows in equal
    stages of first_batches over the share `warmup` of the steps. lengths: in order, the last until 1.
    """
    first_batches = first_batches or step_batches
    if step_batches % first_batches:
        raise ValueError(
            f"the batch warm-up starts at {first_batches} micro-batches, which do not divide the {step_batches} at its end."
        )
    levels = step_batches // first_batches
    batch_starts = {
        round(level * warmup * total_steps / levels): (level + 1) * first_batches for level in range(levels)
    }
    length_starts, begin = {}, 0.0
    for length, until in lengths:
        length_starts[round(begin * total_steps)] = length
        begin = until
    starts = sorted({0, *batch_starts, *length_starts})
    batches = list(accumulate((batch_starts.get(step, 0) for step in starts), lambda old, new: new or old))
    caps = list(accumulate((length_starts.get(step, 0) for step in starts), lambda old, new: new or old))
    index, stages = 0, []
    for number, step in enumerate(starts):
        if number:
            index += (step - starts[number - 1]) * batches[number - 1]
        stages.append(Stage(step, index, batches[number], caps[number]))
    return Plan(tuple(stages))
