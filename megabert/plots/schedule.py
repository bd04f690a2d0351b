"""Plot a recipe's schedules: learning rate, masking rate, batch size and sequence length."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megabert.config.recipe import Recipe
from megabert.plots.figures import save_figure
from megabert.training.micro_batch.sizes import micro_batch_on_cpu
from megabert.training.run_schedule import PARTS, lr_factor, make_run_schedule

DRAWN_POINTS = 2000


def plot_schedule(recipe: Recipe, out: Path) -> None:
    """Plot every schedule of a recipe against its steps. Raises ValueError for schedules that a run would refuse."""
    if recipe.data.micro_batch_tokens == "auto":
        recipe = recipe.with_micro_batch(micro_batch_on_cpu(recipe.data, 1))
    schedule = make_run_schedule(recipe, 1)
    total, plan, masking = schedule.total_steps, schedule.stages, schedule.masking
    if schedule.timed is not None:
        total = PARTS
        for part in range(PARTS):
            # It is drawn as if each part of the time had one bin.
            schedule.timed.table.begin(part, 1)
    steps = np.unique(np.linspace(0, total - 1, DRAWN_POINTS).round().astype(int))
    bins = [plan.bins_before(step) for step in steps.tolist()]
    hours = recipe.run.max_hours
    x = steps if hours is None else steps * (hours / total)
    curves = {
        "learning rate": [recipe.optimizer.lr * lr_factor(step, total, recipe.optimizer) for step in steps.tolist()],
        "masked share": [masking.at(index) for index in bins],
        "batch, token slots": [plan.at(index).batches_per_step * recipe.data.bin_tokens for index in bins],
        "max_seq_len, tokens": [plan.at(index).max_seq_len for index in bins],
    }
    figure = Figure(figsize=(8, 9), layout="constrained")
    for axes, (name, values) in zip(figure.subplots(len(curves), sharex=True), curves.items(), strict=True):
        axes.plot(x, values, drawstyle="default" if name == "learning rate" else "steps-post")
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    axes.set_xlabel(f"optimizer steps, of {total:,}" if hours is None else f"hours, of {hours}")
    save_figure(figure, out)
