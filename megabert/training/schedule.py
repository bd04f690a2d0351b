"""The schedule of a run: its steps, batch sizes, lengths, masking rate and learning rate, computed from the recipe."""

from dataclasses import dataclass

from megabert.config.data_section import DataConfig
from megabert.config.recipe import OptimizerConfig, Recipe
from megabert.data import ranks
from megabert.data.schedule import BatchSchedule, Length, MaskingRate, MaskingSteps, make_schedule
from megabert.optim.lr_schedule import warmup_and_decay

# Total steps of a run whose length is given in hours: more steps than any run makes.
ENDLESS = 1 << 40


@dataclass(frozen=True)
class RunSchedule:
    """How a run changes from step to step, except for its learning rate."""

    step_batches: int
    """micro-batches of a full step over all ranks"""
    total_steps: int
    stages: BatchSchedule
    """micro-batches per step and longest piece in each stage of the run"""
    masking: MaskingRate | MaskingSteps


def make_run_schedule(recipe: Recipe, world_size: int) -> RunSchedule:
    """Compute the schedule of a run. Raises ValueError if the ranks cannot share a batch."""
    step_batches = batches_per_step(recipe, world_size)
    steps = total_steps(recipe, step_batches)
    data, masking = recipe.data, recipe.masking
    first = data.batch_warmup_from and data.batch_warmup_from // data.bin_tokens
    lengths = [Length(*phase, number) for phase, number in zip(data.lengths, data.mixture_numbers, strict=True)]
    stages = make_schedule(steps, step_batches, lengths, first_batches=first, warmup=data.batch_warmup)
    ranks.check_warmup(stages.step_batches, data.bin_tokens, world_size, listed_streams(data))
    if any(phase.mlm_probability for phase in data.phases or ()):
        rate = masking_steps(recipe, steps, stages)
    elif masking.schedule == "constant":
        rate = MaskingRate.constant(masking.mlm_probability)
    else:
        over = stages.bins_before(steps)
        rate = MaskingRate(masking.mlm_probability, masking.final_mlm_probability, over, masking.schedule)
    return RunSchedule(step_batches, steps, stages, rate)


def masking_steps(recipe: Recipe, steps: int, stages: BatchSchedule) -> MaskingSteps:
    """The masking rate of each phase of data.phases."""
    begin, rates = 0.0, {}
    for phase in recipe.data.phases or ():
        first = stages.bins_before(round(begin * steps))
        rates[first] = phase.mlm_probability or recipe.masking.mlm_probability
        begin = phase.until
    return MaskingSteps(tuple(rates.items()))


def batches_per_step(recipe: Recipe, world_size: int) -> int:
    """The micro-batches of one optimizer step over all ranks. Raises ValueError if the ranks cannot share them."""
    data = recipe.data
    if data.global_batch_tokens == "auto":
        return world_size
    return ranks.batches_per_step(
        data.global_batch_tokens, data.bin_tokens, data.longest, world_size, listed_streams(data)
    )


def listed_streams(data: DataConfig) -> int:
    """The streams of a new run whose numbers of ranks are listed; 0 if its first number of ranks decides."""
    return ranks.count_streams(data.ranks, data.num_workers) if data.ranks else 0


def shared_batches(recipe: Recipe, schedule: RunSchedule) -> list[int]:
    """The numbers of micro-batches that ranks must share evenly; none if each rank has one of each step."""
    return [] if recipe.data.global_batch_tokens == "auto" else schedule.stages.step_batches


def total_steps(recipe: Recipe, step_batches: int) -> int:
    """The optimizer steps of the whole run, at least 1; ENDLESS if the clock ends the run."""
    if recipe.run.max_steps is not None:
        return recipe.run.max_steps
    if recipe.run.max_tokens is None:
        return ENDLESS
    return max(1, recipe.run.max_tokens // (step_batches * recipe.data.bin_tokens))


def lr_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The learning rate of optimizer step `step`, counted from 0, as a share of the peak. See `warmup_and_decay`."""
    return warmup_and_decay(
        step,
        total_steps,
        round(config.warmup * total_steps),
        schedule=config.schedule,
        decay_steps=round(config.decay * total_steps) if config.schedule == "wsd" else None,
        final=config.final_lr,
    )
