"""Plot the loss and the throughput of runs, from their metrics.jsonl."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megabert.files.metrics_format import METRICS, read_metrics
from megabert.plots.figures import as_label, save_figure

MILLION, HOUR = 1e6, 3600.0
# What a record of a training loss has, unless the file was changed.
DRAWN = {"tokens", "seconds", "tokens_per_s"}


def plot_runs(folders: list[Path], out: Path) -> None:
    """Plot loss and real tokens per second, in two rows, against million tokens and hours of training, in two columns.

    Dots are the held-out loss, drawn at the tokens and hours of the last logged step before. Raises ValueError for a
    folder without metrics.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey="row")
    for number, folder in enumerate(folders):
        _draw(axes, read_points(folder), as_label(folder.resolve().name), f"C{number % 10}")
    axes[0, 0].set_ylabel("loss, nats per masked token")
    axes[1, 0].set_ylabel("real tokens / s")
    axes[1, 0].set_xlabel("million tokens")
    axes[1, 1].set_xlabel("hours of training")
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    for panel in axes[1]:
        panel.set_ylim(bottom=0)
    axes[0, 0].legend()
    save_figure(figure, out)


def read_points(folder: Path) -> list[dict[str, Any]]:
    """Read the records of a run, without damaged ones. Raises ValueError if there are none."""
    points = [point for point in read_metrics(folder / METRICS) if "loss" not in point or point.keys() >= DRAWN]
    if not any("loss" in point for point in points):
        raise ValueError(f"{folder}: has no {METRICS} with a training loss; expected the run.output_dir of a run.")
    return points


def _draw(axes: Any, points: list[dict[str, Any]], name: str, color: str) -> None:
    logged = [point for point in points if "loss" in point]
    for column, (key, unit) in enumerate((("tokens", MILLION), ("seconds", HOUR))):
        x = [point[key] / unit for point in logged]
        loss, speed = axes[0, column], axes[1, column]
        loss.plot(x, [point["loss"] for point in logged], color=color, alpha=0.6, linewidth=1, label=name)
        speed.plot(x, [point["tokens_per_s"] for point in logged], color=color, linewidth=1)
        _draw_held_out(loss, points, key, unit, color)


def _draw_held_out(panel: Axes, points: list[dict[str, Any]], key: str, unit: float, color: str) -> None:
    latest, x, losses = 0.0, [], []
    for point in points:
        latest = point.get(key, latest)
        if "heldout_loss" in point:
            x.append(latest / unit)
            losses.append(point["heldout_loss"])
    panel.plot(x, losses, "o", color=color, markersize=4)
