"""What changes over a run: the learning rate, the masking rate, the batch, the length. And a picture of it."""

import math
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megabert.config.recipe import OptimizerConfig, Recipe, batches_per_step, total_steps
from megabert.training.feed import masking_rate, plan_of

DRAWN_POINTS = 2000


def lr_factor(step: int, total: int, config: OptimizerConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) as a share of the peak.

    Linear up from 1 / warm-up steps; then, with t the share done of what is left (wsd: of its decay) and f = final_lr:
    linear f + (1 - f)(1 - t); cosine f + (1 - f)(1 + cos(pi t)) / 2; wsd f + (1 - f)(1 - sqrt(t))
    (https://arxiv.org/abs/2405.18392, section 4); constant 1.
    """
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    decay = max(1, round(config.decay * total) if config.schedule == "wsd" else total - warmup)
    done = min(1.0, max(0.0, (step - (total - decay)) / decay))
    left = {
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "wsd": 1 - math.sqrt(done),
        "constant": 1.0,
    }[config.schedule]
    return config.final_lr + (1 - config.final_lr) * left


def plot_schedule(recipe: Recipe, out: Path) -> None:
    """Draw every schedule of a recipe against its steps. Raises ValueError as a run would, for what cannot be."""
    step_batches = batches_per_step(recipe, 1)
    total = total_steps(recipe, step_batches)
    plan = plan_of(recipe, step_batches, total)
    masking = masking_rate(recipe, plan, total)
    steps = np.unique(np.linspace(0, total - 1, DRAWN_POINTS).round().astype(int))
    bins = [plan.bins_before(step) for step in steps.tolist()]
    hours = recipe.run.max_hours
    places = steps if hours is None else steps * (hours / total)
    curves = {
        "learning rate": [recipe.optimizer.lr * lr_factor(step, total, recipe.optimizer) for step in steps.tolist()],
        "masked share": [masking.at(index) for index in bins],
        "batch, token slots": [plan.at(index).step_batches * recipe.data.micro_batch_tokens for index in bins],
        "max_seq_len, tokens": [plan.at(index).max_seq_len for index in bins],
    }
    figure = Figure(figsize=(8, 9), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(len(curves), sharex=True), curves.items(), strict=True):
        axes.plot(places, values, drawstyle="default" if name == "learning rate" else "steps-post")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.set_xlabel(f"optimizer steps, of {total:,}" if hours is None else f"hours, of {hours}")
    figure.savefig(out, dpi=120)
