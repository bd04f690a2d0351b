"""The contenders of the paper's ablation, their trainings at equal time, and the table and picture of the result."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from race import clock, command
from race.result import mean_score
from race.sides.grids import FULL, QUICK, SearchPlan
from race.sides.ours import Ours
from race.trials import Track, halve, loss_of
from support import report

from megabert.files.atomic import write_atomically

BERT: Mapping[str, Any] = {
    "model.position": "learned",
    "model.ffn": "gelu",
    "model.layer_norm_dtype": "float32",
    "model.padding": "padded",
    "masking.mlm_probability": 0.15,
}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "BERT": {},
    "+ unpadding": {"model.padding": "unpadded"},
    "+ GeGLU": {"model.ffn": "geglu"},
    "+ ALiBi": {"model.position": "alibi"},
    "+ low-precision LayerNorm": {"model.layer_norm_dtype": "bfloat16"},
    "+ 30 % masking": {"masking.mlm_probability": 0.3},
}
RATES = (5e-4, 1e-3, 2e-3)
# Shares of the budget at which curves have a point; each point is a training of its own, decayed to its end.
SHARES = (4, 2, 1)


class Point(NamedTuple):
    """Means and standard deviations over seeds of the trainings of one contender with one budget."""

    seconds: float
    loss: float
    loss_std: float
    score: float | None
    score_std: float


def contenders() -> dict[str, dict[str, Any]]:
    """Return the settings of each contender; MosaicBERT has all changes."""
    found = {name: {**BERT, **change} for name, change in CHANGES.items()}
    return found | {"MosaicBERT": {name: value for change in CHANGES.values() for name, value in change.items()}}


def best_rate(track: Track, settings: Mapping[str, Any], plan: SearchPlan, rates: tuple[float, ...]) -> Ours:
    """Choose a contender's learning rate by a search seed at a third of the budget, from the same ones for each."""
    return halve(track, [Ours({**settings, "optimizer.lr": rate}) for rate in rates], [plan.budget_s / 3])[0][1]


def point(track: Track, ours: Ours, budget_s: float, seeds: range) -> Point:
    records = command.final_trials(track, ours, track.clock(ours).steps_in(budget_s), seeds, bool(track.tasks))
    losses, scores = [loss_of(record) for record in records], [mean_score(record) for record in records]
    spread = statistics.stdev if len(seeds) > 1 else lambda _: 0.0
    has_scores = bool(track.tasks)
    return Point(
        seconds=track.clock(ours).seconds(records[0]["steps"]),
        loss=statistics.mean(losses),
        loss_std=spread(losses),
        score=statistics.mean(scores) if has_scores else None,
        score_std=spread(scores) if has_scores else 0.0,
    )


def ablate(track: Track, plan: SearchPlan, quick: bool) -> dict[str, list[Point]]:
    """Train every contender for every budget."""
    rates, shares = (RATES[1:2], SHARES[-1:]) if quick else (RATES, SHARES)
    clock.measure([Ours(settings) for settings in contenders().values()], track.corpus, track.records)
    curves: dict[str, list[Point]] = {}
    for name, settings in contenders().items():
        best = best_rate(track, settings, plan, rates)
        budgets = [plan.budget_s / share for share in shares]
        curves[name] = [point(track, best, budget, plan.final_seeds(0)) for budget in budgets]
        print(f"  {name}: {curves[name][-1]}", flush=True)
    return curves


def as_table(curves: Mapping[str, list[Point]], plan: SearchPlan) -> str:
    """Return the last point of each curve as a Markdown table."""
    lines = [f"| {plan.budget_s:.0f} s, {plan.seeds} seeds | held-out loss | score |", "|---|---|---|"]
    for name, points in curves.items():
        last = points[-1]
        score = "" if last.score is None else f"{100 * last.score:.2f}, std {100 * last.score_std:.2f}"
        lines.append(f"| {name} | {last.loss:.3f}, std {last.loss_std:.3f} | {score} |")
    return "\n".join(lines) + "\n"


def plot(curves: Mapping[str, list[Point]], path: Path) -> None:
    """Draw loss and score against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, points in curves.items():
        seconds = [each.seconds for each in points]
        axes[0].errorbar(seconds, [p.loss for p in points], [p.loss_std for p in points], marker="o", label=name)
        scored = [each for each in points if each.score is not None]
        axes[1].errorbar(
            [p.seconds for p in scored], [p.score for p in scored], [p.score_std for p in scored], marker="o"
        )
    for axis, label in zip(axes, ("held-out loss, nats per masked token", "fine-tuning score"), strict=True):
        axis.set(xlabel="seconds of pretraining", ylabel=label)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main(description: str) -> None:
    options = command.read_options(command.make_parser(description))
    plan = QUICK if options.quick else FULL
    figures: dict[str, float] = {"seeds": plan.seeds}
    with command.open_tracks(options, plan) as tracks:
        for track in tracks:
            curves = ablate(track, plan, options.quick)
            name = track.corpus.name
            write_atomically(options.out / f"ablation-{name}.md", as_table(curves, plan).encode())
            plot(curves, options.out / f"ablation-{name}.png")
            print(f"\n{name}\n{as_table(curves, plan)}")
            for contender, points in curves.items():
                key = f"{name}_{contender}".replace(" ", "_").replace("%", "percent").replace("+_", "").lower()
                figures[f"{key}_loss"] = points[-1].loss
                if points[-1].score is not None:
                    figures[f"{key}_score"] = points[-1].score
    if options.quick:
        print("--quick: one seed and a small budget. This shows that the ablation runs; it is no result.")
    report.write(figures, options.json, quick=options.quick)
