"""The schedule of a run: its steps, batch sizes, lengths, masking rate and learning rate, computed from the recipe."""

from megabert.config.recipe import OptimizerConfig, Recipe
from megabert.data.schedule import Length, MaskingRate, Plan, make_plan
from megabert.optim.lr_schedule import warmup_and_decay

# Total steps of a run whose length is given in hours: more steps than any run makes.
ENDLESS = 1 << 40


def batches_per_step(recipe: Recipe, world_size: int) -> int:
    """The micro-batches of one optimizer step over all ranks. Raises ValueError if the ranks cannot share them."""
    data = recipe.data
    if data.global_batch_tokens == "auto":
        return world_size
    total = data.global_batch_tokens // data.micro_batch_tokens
    if total % world_size:
        raise ValueError(
            f"data.global_batch_tokens {data.global_batch_tokens} is {total} micro-batches of "
            f"{data.micro_batch_tokens} tokens, which {world_size} ranks cannot share evenly. Choose a data.micro_batch_tokens that gives each "
            "rank the same number, another number of ranks, or a data.global_batch_tokens that is a multiple of "
            f"{world_size} x {data.micro_batch_tokens} = {world_size * data.micro_batch_tokens}."
        )
    return total


def total_steps(recipe: Recipe, step_batches: int) -> int:
    """The optimizer steps of the whole run, at least 1; ENDLESS if the clock ends the run."""
    if recipe.run.max_steps is not None:
        return recipe.run.max_steps
    if recipe.run.max_tokens is None:
        return ENDLESS
    return max(1, recipe.run.max_tokens // (step_batches * recipe.data.micro_batch_tokens))


def batch_schedule(recipe: Recipe, step_batches: int, total_steps: int) -> Plan:
    """The stages of the run: micro-batches per step and the longest piece in each."""
    data = recipe.data
    first = data.batch_warmup_from and data.batch_warmup_from // data.micro_batch_tokens
    lengths = [Length(*phase) for phase in data.lengths]
    return make_plan(total_steps, step_batches, lengths, first_batches=first, warmup=data.batch_warmup)


def masking_rate(recipe: Recipe, schedule: Plan, total_steps: int) -> MaskingRate:
    """The share of masked tokens over the run. schedule: from `batch_schedule`."""
    masking = recipe.masking
    if masking.schedule == "constant":
        return MaskingRate.constant(masking.mlm_probability)
    over = schedule.bins_before(total_steps)
    return MaskingRate(masking.mlm_probability, masking.final_mlm_probability, over, masking.schedule)


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
