"""Collect score and cost of the checkpoints of several pretraining runs, and find their Pareto fronts."""

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megabert.files.checkpoint_format import STATE, State, check_files, list_tags, read_state
from megabert.finetune.results.report import read_results
from megabert.plots.pareto import Panel

# Costs of a point, with the labels of their axes.
COSTS = {"hours": "wall-clock hours", "tokens": "real tokens", "dollars": "dollars"}
# A run that took less time is plotted over seconds.
MIN_HOURS = 0.5
# Two points do not make a curve, and by default a run keeps its last two checkpoints.
MIN_POINTS = 3


@dataclass(frozen=True)
class Point:
    """One checkpoint of one run.

    score: from 0 to 1; dollars: None without a price; fronts: the costs for which the point is on the Pareto front.
    """

    run: str
    step: int
    score: float
    hours: float
    tokens: float
    dollars: float | None
    fronts: tuple[str, ...] = ()


def name_runs(folders: list[Path]) -> dict[str, Path]:
    """Name runs by the shortest distinct ends of their paths: runs/a/base, runs/b/base -> a/base, b/base.

    Raises ValueError for a folder that is listed twice.
    """
    paths = [folder.resolve() for folder in folders]
    if twice := [folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1]:
        raise ValueError(f"--runs: {twice[0]} is listed twice.")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]).lstrip("/") for path in paths]
        if len(set(names)) == len(names):
            break
    return dict(zip(names, folders, strict=True))


def checkpoints_of(run: Path) -> list[Path]:
    """List a run's checkpoints, oldest first. Raises ValueError if it has none, or if one does not record its cost."""
    tags = list_tags(run / "checkpoints")
    if not tags:
        raise ValueError(f"{run}: has no checkpoints/step-...; expected the output folder of a pretraining run.")
    found = [run / "checkpoints" / tag for tag in reversed(tags)]
    for checkpoint in found:
        if read_cost(checkpoint).wall_seconds <= 0:
            raise ValueError(f"{checkpoint}: does not record its hours; an older version wrote it.")
    return found


def read_cost(checkpoint: Path) -> State:
    """Read the state of a checkpoint. Raises ValueError if it is damaged, or was changed since it was written."""
    if problem := check_files(checkpoint, [STATE]):
        raise ValueError(f"{problem}. Its cost cannot be trusted: restore the file, or remove the checkpoint.")
    return read_state(checkpoint)


def measure(run: str, checkpoint: Path, results: Path, dollars_per_gpu_hour: float) -> Point:
    """Combine a checkpoint's recorded cost with the average score in a results.json.

    Hours include restarts, evaluation and saving; dollars are for the number of devices that wrote the checkpoint.
    Raises ValueError if there is no average.
    """
    found = read_results(results)
    if found["average"] is None:
        raise ValueError(f"{results}: has no average ({found['average_of']}).")
    state = read_cost(checkpoint)
    hours = state.wall_seconds / 3600
    price = hours * state.world_size * dollars_per_gpu_hour if dollars_per_gpu_hour else None
    return Point(run, state.step, found["average"], hours, state.tokens, price)


def mark_fronts(points: list[Point]) -> list[Point]:
    """Mark, for each cost, the points for which no other point has a better score at the same or a lower cost."""
    marked: list[list[str]] = [[] for _ in points]
    for cost in known_costs(points):
        best = float("-inf")
        for index in sorted(range(len(points)), key=lambda i: (getattr(points[i], cost), -points[i].score)):
            if points[index].score > best:
                best = points[index].score
                marked[index].append(cost)
    return [dataclasses.replace(point, fronts=tuple(costs)) for point, costs in zip(points, marked, strict=True)]


def known_costs(points: list[Point]) -> list[str]:
    return [cost for cost in COSTS if all(getattr(point, cost) is not None for point in points)]


def panels(points: list[Point]) -> list[Panel]:
    """Return the data of the plot, a panel per known cost; scores are times 100."""
    found = []
    for cost in known_costs(points):
        label, scale = COSTS[cost], 1.0
        if cost == "hours" and max(point.hours for point in points) < MIN_HOURS:
            label, scale = "wall-clock seconds", 3600.0
        placed = [(scale * getattr(point, cost), 100 * point.score) for point in points]
        lines: dict[str, list[tuple[float, float]]] = {}
        for point, place in zip(points, placed, strict=True):
            lines.setdefault(point.run, []).append(place)
        front = sorted(place for point, place in zip(points, placed, strict=True) if cost in point.fronts)
        found.append(Panel(label, lines, front))
    return found


def as_markdown(points: list[Point]) -> str:
    """Return a table, and a line for each run that kept too few checkpoints."""
    lines = ["| run | step | score | hours | tokens | dollars | on the front in |", "|---|---|---|---|---|---|---|"]
    for point in points:
        dollars = "-" if point.dollars is None else f"{point.dollars:.2f}"
        lines.append(
            f"| {point.run} | {point.step:,} | {100 * point.score:.2f} | {point.hours:.3f} | {point.tokens:,.0f} "
            f"| {dollars} | {', '.join(point.fronts)} |"
        )
    counts = {point.run: sum(other.run == point.run for other in points) for point in points}
    few = [
        f"{run}: only {count} checkpoint{'s' * (count > 1)}; train with run.keep_every_steps to keep more."
        for run, count in counts.items()
        if count < MIN_POINTS
    ]
    return "\n".join([*lines, *([""] if few else []), *few]) + "\n"


def as_records(points: list[Point]) -> list[dict[str, Any]]:
    return [asdict(point) for point in points]
