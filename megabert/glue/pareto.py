"""Score against what it cost: the checkpoints of several runs, one line per run, the Pareto front marked."""

import dataclasses
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megabert.checkpoint_format import list_tags, read_state, step_of
from megabert.metrics_format import METRICS, read_metrics

AXES = {"hours": "wall-clock hours of training", "tokens": "real tokens", "dollars": "dollars"}


@dataclass(frozen=True)
class Point:
    """One checkpoint of one run. score: of 1; dollars: None without a price. on_front: no other is better and as cheap in hours."""

    run: str
    step: int
    score: float
    hours: float
    tokens: float
    dollars: float | None
    on_front: bool = False


def checkpoints_of(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first. Raises ValueError if it has none."""
    tags = list_tags(run / "checkpoints")
    if not tags:
        raise ValueError(f"{run}: has no checkpoints/step-...; training keeps as many as run.keep_checkpoints says.")
    return [run / "checkpoints" / tag for tag in reversed(tags)]


def cost_of(run: Path, step: int) -> tuple[float, float]:
    """(seconds, tokens) that the run's own log had counted at a step, restarts included.

    Between two lines of the log in proportion. Raises ValueError if the log does not reach the step.
    """
    path = run / METRICS
    if not path.is_file():
        raise ValueError(f"{path}: no such file: not a pretraining run.")
    known = [(0, 0.0, 0.0)]
    for record in read_metrics(path):
        if "seconds" in record and record["step"] > known[-1][0]:
            known.append((record["step"], record["seconds"], record["tokens"]))
    for before, after in itertools.pairwise(known):
        if before[0] <= step <= after[0]:
            share = (step - before[0]) / (after[0] - before[0])
            return before[1] + share * (after[1] - before[1]), before[2] + share * (after[2] - before[2])
    raise ValueError(f"{path}: ends at step {known[-1][0]}, before the checkpoint of step {step}.")


def measure(run: Path, checkpoint: Path, score: float, dollars_per_gpu_hour: float) -> Point:
    """One point from a checkpoint and its score."""
    step = step_of(checkpoint.name)
    seconds, tokens = cost_of(run, step)
    hours = seconds / 3600
    price = hours * read_state(checkpoint).world_size * dollars_per_gpu_hour if dollars_per_gpu_hour else None
    return Point(run.name, step, score, hours, tokens, price)


def mark_front(points: list[Point]) -> list[Point]:
    """Mark the points that no other beats at the same or less time: in order of hours, each better than all before."""
    best, marked = float("-inf"), set()
    for number in sorted(range(len(points)), key=lambda number: (points[number].hours, -points[number].score)):
        if points[number].score > best:
            best = points[number].score
            marked.add(number)
    return [dataclasses.replace(point, on_front=number in marked) for number, point in enumerate(points)]


def draw(points: list[Point], title: str, out: Path) -> None:
    """A panel per cost, a line per run; the front's points are ringed."""
    axes_used = [name for name in AXES if all(getattr(point, name) is not None for point in points)]
    figure = Figure(figsize=(5.5 * len(axes_used), 4.5), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(axes_used), squeeze=False)[0], axes_used, strict=True):
        for run in dict.fromkeys(point.run for point in points):
            mine = [(getattr(point, name), 100 * point.score) for point in points if point.run == run]
            axes.plot(*zip(*mine, strict=True), marker="o", label=run)
        front = sorted((getattr(point, name), 100 * point.score) for point in points if point.on_front)
        axes.plot(*zip(*front, strict=True), "o", ms=12, mfc="none", color="black", label="Pareto front in hours")
        axes.set_xlabel(AXES[name])
        axes.set_ylabel("score x 100")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(title)
    figure.savefig(out, dpi=120)


def as_markdown(points: list[Point]) -> str:
    lines = ["| run | step | score | hours | tokens | dollars | front |", "|---|---|---|---|---|---|---|"]
    for point in points:
        dollars = "-" if point.dollars is None else f"{point.dollars:.2f}"
        lines.append(
            f"| {point.run} | {point.step:,} | {100 * point.score:.2f} | {point.hours:.3f} | {point.tokens:,.0f} | {dollars} | "
            f"{'yes' if point.on_front else ''} |"
        )
    return "\n".join(lines) + "\n"


def as_records(points: list[Point]) -> list[dict[str, Any]]:
    return [asdict(point) for point in points]
