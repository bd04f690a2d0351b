"""Plot fine-tuning scores as bars."""

from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from megabert.plots.figures import as_label, save_figure


class Bar(NamedTuple):
    """One score. group: name under the bar's group; label: its entry in the legend; error: of the score, or None."""

    group: str
    label: str
    score: float
    error: float | None


def plot_score_bars(bars: list[Bar], groups: list[str], labels: list[str], title: str, out: Path) -> None:
    """Draw a group of bars for each task, with one color for each label. groups, labels: in their order."""
    figure = Figure(figsize=(max(5.0, 1.3 * len(groups) + 2), 4.2), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(labels)
    for bar in bars:
        column = labels.index(bar.label)
        axes.bar(
            groups.index(bar.group) + (column - (len(labels) - 1) / 2) * width,
            bar.score,
            0.92 * width,
            yerr=bar.error or None,
            color=f"C{column}",
            capsize=3,
            label=bar.label,
        )
    axes.set_xticks(range(len(groups)), [as_label(group) for group in groups])
    axes.set_ylabel("score x 100")
    axes.set_title(as_label(title), fontsize=10)
    handles, names = axes.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axes.legend(list(unique.values()), list(unique), fontsize=8, loc="lower right")
    axes.grid(axis="y", alpha=0.3)
    save_figure(figure, out)
