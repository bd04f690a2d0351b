"""Plot score against cost, a line per run, with the Pareto front marked."""

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from megabert.plots.figures import as_label, save_figure


class Panel(NamedTuple):
    """Score against one cost. lines: run -> its (cost, score) points; front: the points on the Pareto front."""

    cost: str
    lines: dict[str, list[tuple[float, float]]]
    front: list[tuple[float, float]]


def plot_pareto(panels: list[Panel], title: str, out: Path) -> None:
    """Draw the panels next to each other; the points on a panel's front are ringed."""
    figure = Figure(figsize=(5.5 * len(panels), 4.5), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for run, points in panel.lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=as_label(run))
        axes.plot(*zip(*panel.front, strict=True), "o", ms=12, mfc="none", color="black", label="Pareto front")
        axes.set_xlabel(panel.cost)
        axes.set_ylabel("score x 100")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(as_label(title))
    save_figure(figure, out)
