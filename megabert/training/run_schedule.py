"""Compute a run's steps, batch sizes, lengths, masking rate and learning rate from the recipe."""

import os
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.sharedctypes import RawArray, RawValue

from megabert.config.data_section import DataConfig
from megabert.config.recipe import OptimizerConfig, Recipe
from megabert.data import ranks
from megabert.data.batch_schedule import (
    BatchSchedule,
    Length,
    MaskingRate,
    MaskingSteps,
    Stage,
    count_steps,
    make_schedule,
)
from megabert.optim.lr_schedule import warmup_and_decay

# Total steps of a run whose length is given in hours: more steps than any run makes.
ENDLESS = 1 << 40
# A timed run is divided into this many equal intervals; within one, only the learning rate changes.
PARTS = 1000
NEVER = 1 << 62
POLL_S = 0.01


def part_of_time(share: float) -> int:
    return min(PARTS - 1, int(share * PARTS))


class TimeTable:
    """The first bin of each part of a run's time.

    The training process fills it in by the clock, some bins ahead of what it trains on, and its loader's workers, which
    share the memory, read it. A bin's part never changes once it is known, so the bins of a resumed run are the same.
    """

    def __init__(self) -> None:
        # Written by one process. A worker that reads while it writes sees the old or the new value of an element, and
        # `known` last.
        self._writer = os.getpid()
        self._first_bins = RawArray("q", [0] + [NEVER] * (PARTS - 1))
        self._known = RawValue("q", 0)

    @property
    def known(self) -> int:
        """The number of bins whose part is known."""
        return self._known.value

    @property
    def newest(self) -> int:
        """The last part that has begun."""
        return bisect_right(self._first_bins, NEVER - 1) - 1

    def begin(self, part: int, num_bins: int) -> None:
        """Assign the next num_bins bins to a part, which is not before the newest one."""
        for begun in range(self.newest + 1, part + 1):
            self._first_bins[begun] = self.known
        self._known.value += num_bins

    def part_of(self, index: int) -> int:
        """Return the part of bin `index`. A loader's worker waits until it is known."""
        while index >= self.known:
            assert os.getpid() != self._writer, f"bin {index} is needed, but parts are known up to bin {self.known - 1}"
            time.sleep(POLL_S)
        return bisect_right(self._first_bins, index) - 1

    def to_json(self) -> list[int]:
        """Return the first bin of every part that has begun, and at the end the number of known bins."""
        return [*self._first_bins[: self.newest + 1], self.known]

    def restore(self, saved: Sequence[int]) -> None:
        """Continue from the values of a checkpoint."""
        *first_bins, known = saved
        self._first_bins[:] = first_bins + [NEVER] * (PARTS - len(first_bins))
        self._known.value = known


@dataclass(frozen=True)
class TimedStages(BatchSchedule):
    """Stages that begin with a part of the time: their first_step and first_index are numbers of parts."""

    table: TimeTable

    @classmethod
    def follow(cls, stages: BatchSchedule) -> "TimedStages":
        """Let the stages of a run of PARTS steps follow the time instead."""
        return cls(tuple(stage._replace(first_index=stage.first_step) for stage in stages.stages), TimeTable())

    def bins_before(self, step: int) -> int:
        """Take and return a number of parts: how many bins they have is known only afterwards."""
        return step

    def at(self, index: int) -> Stage:
        return super().at(self.table.part_of(index))

    def plan_ahead(self, next_index: int, share: float, num_bins: int) -> None:
        """Fill in the table by whole steps, up to num_bins bins after the step that begins with bin next_index.

        share: of the time, as all ranks agreed after the last step.
        """
        part = max(self.table.newest, part_of_time(share))
        while self.table.known <= next_index + num_bins:
            self.table.begin(part, super().at(part).batches_per_step)


@dataclass(frozen=True)
class TimedMasking(MaskingSteps):
    """Another share of maskable tokens in each part of the time. rates: (part, share), the first from part 0."""

    table: TimeTable

    @classmethod
    def follow(cls, masking: MaskingRate | MaskingSteps, table: TimeTable) -> "TimedMasking":
        """masking: counts parts instead of bins."""
        return cls(tuple((part, masking.at(part)) for part in range(PARTS)), table)

    def at(self, index: int) -> float:
        return super().at(self.table.part_of(index))


@dataclass(frozen=True)
class RunSchedule:
    """How a run changes from step to step, except for its learning rate."""

    batches_per_step: int
    """micro-batches of a full step over all ranks"""
    total_steps: int
    stages: BatchSchedule
    """micro-batches per step and longest piece in each stage of the run"""
    masking: MaskingRate | MaskingSteps

    @property
    def timed(self) -> TimedStages | None:
        """The stages of a run whose length is given in hours; None for other runs."""
        return self.stages if isinstance(self.stages, TimedStages) else None


def make_run_schedule(recipe: Recipe, world_size: int) -> RunSchedule:
    """Compute the schedule of a run. Raises ValueError if the ranks cannot share a batch."""
    batches_per_step = choose_batches_per_step(recipe.data, world_size)
    steps = total_steps(recipe, batches_per_step)
    data, masking = recipe.data, recipe.masking
    first = first_batches(data)
    lengths = [Length(*phase, number) for phase, number in zip(data.lengths, data.mixture_numbers, strict=True)]
    num_parts = PARTS if steps == ENDLESS else steps
    stages = make_schedule(num_parts, batches_per_step, lengths, first_batches=first, warmup=data.batch_warmup)
    if steps == ENDLESS:
        stages = TimedStages.follow(stages)
    ranks.check_warmup(stages.batches_per_step, data.bin_tokens, world_size, listed_streams(data))
    if any(phase.mlm_probability for phase in data.phases or ()):
        rate = masking_steps(recipe, num_parts, stages)
    elif masking.schedule == "constant":
        rate = MaskingRate.constant(masking.mlm_probability)
    else:
        over = stages.bins_before(num_parts)
        rate = MaskingRate(masking.mlm_probability, masking.final_mlm_probability, over, masking.schedule)
    if isinstance(stages, TimedStages):
        rate = TimedMasking.follow(rate, stages.table)
    return RunSchedule(batches_per_step, steps, stages, rate)


def masking_steps(recipe: Recipe, steps: int, stages: BatchSchedule) -> MaskingSteps:
    """Return the masking rate of each phase of data.phases."""
    begin, rates = 0.0, {}
    for phase in recipe.data.phases or ():
        first = stages.bins_before(round(begin * steps))
        rates[first] = phase.mlm_probability or recipe.masking.mlm_probability
        begin = phase.until
    return MaskingSteps(tuple(rates.items()))


def choose_batches_per_step(data: DataConfig, world_size: int) -> int:
    """Return the micro-batches of a step over all ranks. Raises ValueError if the ranks cannot share them."""
    if data.global_batch_tokens == "auto":
        return world_size
    return ranks.choose_batches_per_step(
        data.global_batch_tokens,
        data.bin_tokens,
        data.longest,
        world_size,
        listed_streams(data),
        data.batch_warmup_from,
    )


def listed_streams(data: DataConfig) -> int:
    """Return the streams of a new run whose numbers of ranks are listed; 0 if its first number of ranks decides."""
    return ranks.count_streams(data.ranks, data.num_workers) if data.ranks else 0


def shared_batches(data: DataConfig, schedule: RunSchedule) -> list[int]:
    """Return the numbers of micro-batches that ranks must share evenly; none if each rank has one of each step."""
    return [] if data.global_batch_tokens == "auto" else schedule.stages.batches_per_step


def first_batches(data: DataConfig) -> int | None:
    """Return the micro-batches of a step at the start of the batch warm-up; None without one."""
    return data.batch_warmup_from and data.batch_warmup_from // data.bin_tokens


def total_steps(recipe: Recipe, batches_per_step: int) -> int:
    """Return the optimizer steps of the whole run, at least 1; ENDLESS if the clock ends the run.

    With a batch warm-up, run.max_tokens are more steps than they would be with full batches.
    """
    if recipe.run.max_steps is not None:
        return recipe.run.max_steps
    if recipe.run.max_tokens is None:
        return ENDLESS
    data = recipe.data
    bins = recipe.run.max_tokens // data.bin_tokens
    return count_steps(bins, batches_per_step, first_batches(data), data.batch_warmup)


def lr_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Return the learning rate of step `step`, counted from 0, as a share of the peak. See `warmup_and_decay`."""
    return warmup_and_decay(
        step,
        total_steps,
        round(config.warmup * total_steps),
        schedule=config.schedule,
        decay_steps=round(config.decay * total_steps) if config.schedule == "wsd" else None,
        final=config.final_lr,
    )
