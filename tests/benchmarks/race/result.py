"""The result of a race on one text: attempts at both finish lines, ratios, intervals and p-values."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from race.clock import Clock, Contender
from race.sides.grids import SearchPlan
from race.significance import Line, Verdict, beats, first_to_reach, ratio_interval
from race.trials import Track, loss_of, short

Attempts = Callable[[int, float], list[dict[str, Any]]]
STANDARD_ERRORS = 3.0
SIGNIFICANT = 0.01


class Result(NamedTuple):
    """speedups: 0 where the line was not reached; score_speedup: None where the score line does not count."""

    baseline: Contender
    ours: Contender
    loss: Verdict
    loss_line: float
    loss_speedup: float
    loss_interval: tuple[float, float]
    score: Verdict | None
    score_speedup: float | None
    why_no_score: str | None

    @property
    def p_value(self) -> float:
        return self.loss.p_value


def compare(
    track: Track,
    baseline: tuple[Contender, list[dict[str, Any]]],
    ours: tuple[Contender, Attempts],
    clocks: tuple[Clock, Clock],
    budgets: Sequence[float],
    slope: float,
) -> Result:
    """Let ours try the budgets until it reaches the lines of the baseline's final trials.

    slope: nats by which our loss falls when our time grows e-fold.
    """
    theirs, finals = baseline
    mine, attempt = ours
    spent = clocks[0].seconds(finals[0]["steps"])
    losses = Line([loss_of(record) for record in finals])
    verdict = first_to_reach(losses, budgets, lambda number, budget: [loss_of(r) for r in attempt(number, budget)])
    speedup = spent / budget_of(verdict) if verdict.reached else 0.0
    interval = (0.0, 0.0)
    if verdict.reached:
        rounds = [a / b for a, b in zip(clocks[0].ratios, clocks[1].ratios, strict=True)]
        interval = ratio_interval(losses.baseline, verdict.attempts[-1].values, speedup, slope, rounds)
    why, score = why_no_score(track, finals), None
    if why is None:
        line = Line([-mean_score(record) for record in finals])
        score = first_to_reach(line, budgets, lambda number, budget: [-mean_score(r) for r in attempt(number, budget)])
    return Result(
        baseline=theirs,
        ours=mine,
        loss=verdict,
        loss_line=statistics.mean(losses.baseline),
        loss_speedup=speedup,
        loss_interval=interval,
        score=score,
        score_speedup=None if score is None else spent / budget_of(score) if score.reached else 0.0,
        why_no_score=why,
    )


def budget_of(verdict: Verdict) -> float:
    return verdict.attempts[-1].budget_s


def mean_score(record: dict[str, Any]) -> float:
    """Return the mean over tasks; 0 for a training that failed."""
    return statistics.mean(record.get("scores") or [0.0])


def why_no_score(track: Track, finals: Sequence[dict[str, Any]]) -> str | None:
    """Return why the score line does not count, or None."""
    if not track.tasks:
        return "a task has no data"
    twins = [statistics.mean(record.get("random_twin") or [0.0]) for record in finals]
    if beats([mean_score(record) for record in finals], twins, STANDARD_ERRORS):
        return None
    return (
        f"the baseline's mean score {statistics.mean(map(mean_score, finals)):.3f} is not {STANDARD_ERRORS:g} standard "
        f"errors above its random twin's {statistics.mean(twins):.3f} ({len(finals)} seeds)"
    )


def print_result(name: str, result: Result, plan: SearchPlan) -> None:
    print(f"\n{name}: baseline {short(result.baseline)}\n{name}: ours {short(result.ours)}")
    print_verdict(f"{name}, loss line {result.loss_line:.3f}", result.loss, result.loss_speedup, plan, 1.0)
    if result.loss.reached:
        print("  95 % interval of the ratio: {:.2f} to {:.2f}".format(*result.loss_interval))
    if result.score is None:
        print(f"{name}: the score line does not count: {result.why_no_score}")
    else:
        print_verdict(f"{name}, score line", result.score, result.score_speedup or 0.0, plan, -1.0)


def print_verdict(title: str, verdict: Verdict, speedup: float, plan: SearchPlan, sign: float) -> None:
    print(title)
    for attempt in verdict.attempts:
        missed = "" if attempt is verdict.attempts[-1] and verdict.reached else ": missed"
        print(
            f"  {attempt.budget_s:.1f} s, {plan.seeds} seeds: mean {sign * statistics.mean(attempt.values):.4f}{missed}"
        )
    claim = "a record" if verdict.reached and verdict.p_value < SIGNIFICANT else "no record"
    print(f"  ratio {speedup:.2f}, p {verdict.p_value:.4f} after {len(verdict.attempts)} attempts: {claim}")
