"""Score against what it cost: the checkpoints of several runs, one line per run, the Pareto front marked."""

import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from megabert.files.checkpoint_format import list_tags, read_state

AXES = {"hours": "wall-clock hours", "tokens": "real tokens", "dollars": "dollars"}
FEWEST = 3  # points that make a line: by default a run keeps its last two checkpoints


@dataclass(frozen=True)
class Point:
    """One checkpoint of one run. score: of 1; dollars: None without a price; fronts: the costs at which no other is as cheap and better."""

    run: str
    step: int
    score: float
    hours: float
    tokens: float
    dollars: float | None
    fronts: tuple[str, ...] = ()


def name_runs(folders: list[Path]) -> dict[str, Path]:
    """Runs by the shortest ends of their paths that differ: runs/a/base, runs/b/base -> a/base, b/base.

    Raises ValueError if a folder is there twice.
    """
    paths = [folder.resolve() for folder in folders]
    if twice := [folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1]:
        raise ValueError(f"--runs: {twice[0]} is there twice.")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]).lstrip("/") for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, folders, strict=True))


def checkpoints_of(run: Path) -> list[Path]:
    """A run's checkpoints, oldest first. Raises ValueError if it has none, or if one does not say what it cost."""
    tags = list_tags(run / "checkpoints")
    if not tags:
        raise ValueError(f"{run}: has no checkpoints/step-...; expected the output folder of a pretraining run.")
    found = [run / "checkpoints" / tag for tag in reversed(tags)]
    for checkpoint in found:
        if read_state(checkpoint).wall_seconds <= 0:
            raise ValueError(f"{checkpoint}: does not say how long the run had taken; an older version wrote it.")
    return found


def measure(run: str, checkpoint: Path, results: Path, dollars_per_gpu_hour: float) -> Point:
    """One point: a checkpoint's cost by its own record, restarts, evaluation and saving included, and the average in a results.json.

    Dollars are of as many devices as wrote the checkpoint. Raises ValueError if there is no average.
    """
    found = json.loads(results.read_text())
    if found["average"] is None:
        raise ValueError(f"{results}: has no average ({found['average_of']}).")
    state = read_state(checkpoint)
    hours = state.wall_seconds / 3600
    price = hours * state.world_size * dollars_per_gpu_hour if dollars_per_gpu_hour else None
    return Point(run, state.step, found["average"], hours, state.tokens, price)


def mark_fronts(points: list[Point]) -> list[Point]:
    """Mark, for each cost, the points that no other beats at the same or less of it."""
    marked: list[list[str]] = [[] for _ in points]
    for cost in costs_known(points):
        best = float("-inf")
        for number in sorted(range(len(points)), key=lambda n: (getattr(points[n], cost), -points[n].score)):
            if points[number].score > best:
                best = points[number].score
                marked[number].append(cost)
    return [dataclasses.replace(point, fronts=tuple(costs)) for point, costs in zip(points, marked, strict=True)]


def costs_known(points: list[Point]) -> list[str]:
    return [cost for cost in AXES if all(getattr(point, cost) is not None for point in points)]


def draw(points: list[Point], title: str, out: Path) -> None:
    """A panel per cost, a line per run; the points on that cost's front are ringed."""
    costs = costs_known(points)
    figure = Figure(figsize=(5.5 * len(costs), 4.5), layout="constrained")
    for axes, cost in zip(figure.subplots(1, len(costs), squeeze=False)[0], costs, strict=True):
        for run in dict.fromkeys(point.run for point in points):
            mine = [(getattr(point, cost), 100 * point.score) for point in points if point.run == run]
            axes.plot(*zip(*mine, strict=True), marker="o", label=run)
        front = sorted((getattr(point, cost), 100 * point.score) for point in points if cost in point.fronts)
        axes.plot(*zip(*front, strict=True), "o", ms=12, mfc="none", color="black", label="Pareto front")
        axes.set_xlabel(AXES[cost])
        axes.set_ylabel("score x 100")
        axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(title)
    figure.savefig(out, dpi=120)


def as_markdown(points: list[Point]) -> str:
    """A table; then a line for each run of which too few checkpoints are kept."""
    lines = ["| run | step | score | hours | tokens | dollars | on the front in |", "|---|---|---|---|---|---|---|"]
    for point in points:
        dollars = "-" if point.dollars is None else f"{point.dollars:.2f}"
        lines.append(
            f"| {point.run} | {point.step:,} | {100 * point.score:.2f} | {point.hours:.3f} | {point.tokens:,.0f} | {dollars} | "
            f"{', '.join(point.fronts)} |"
        )
    counts = {point.run: sum(other.run == point.run for other in points) for point in points}
    few = [
        f"{run}: only {count} checkpoint{'s' * (count > 1)}; train with run.keep_every_steps to keep more."
        for run, count in counts.items()
        if count < FEWEST
    ]
    return "\n".join([*lines, *([""] if few else []), *few]) + "\n"


def as_records(points: list[Point]) -> list[dict[str, Any]]:
    return [asdict(point) for point in points]
