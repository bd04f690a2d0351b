"""The result of a race on one text: attempts at both finish lines, ratios, intervals and p-values."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from race.clock import Clock, Contender
from race.sides.grids import SearchPlan
from race.significance import Attempt, Line, Verdict, beats, first_to_reach, judge, lowest_p, ratio_interval
from race.trials import Track, loss_of, short

Attempts = Callable[[int, float], list[dict[str, Any]]]
"""trains the seeds of an attempt, given its number and its budget in seconds"""
Budgets = Callable[[float], tuple[list[float], float | None]]
"""chooses the budgets to try for a line, and the slope of our loss: choose_budgets() in command.py"""
STANDARD_ERRORS = 3.0
SIGNIFICANT = 0.01


class Result(NamedTuple):
    """speedups: 0 where the line was not reached; score_speedup: None where the score line does not count.

    record: the first verdict on the loss line that is significant, or the last that was tried for that.
    """

    baseline: Contender
    ours: Contender
    loss: Verdict
    loss_line: float
    loss_speedup: float
    loss_interval: tuple[float, float] | None
    record: Verdict
    record_speedup: float
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
    choose: Budgets,
) -> Result:
    """Let ours try budgets until it reaches the lines of the baseline's final trials."""
    theirs, finals = baseline
    mine, attempt = ours
    spent = clocks[0].seconds(finals[0]["steps"])
    losses = Line(losses_of(finals))
    budgets, slope = choose(statistics.mean(losses.baseline))
    verdict = first_to_reach(losses, budgets, lambda number, budget: losses_of(attempt(number, budget)))
    speedup = spent / budget_of(verdict) if verdict.reached else 0.0
    interval = None
    if verdict.reached and slope is not None:
        rounds = [a / b for a, b in zip(clocks[0].ratios, clocks[1].ratios, strict=True)]
        interval = ratio_interval(losses.baseline, verdict.attempts[-1].values, speedup, slope, rounds)
    record = try_for_record(losses, verdict, attempt, choose)
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
        record=record,
        record_speedup=spent / budget_of(record) if is_record(record) else 0.0,
        score=score,
        score_speedup=None if score is None else spent / budget_of(score) if score.reached else 0.0,
        why_no_score=why,
    )


def try_for_record(line: Line, verdict: Verdict, attempt: Attempts, choose: Budgets) -> Verdict:
    """Let ours try one longer budget, if it has reached the line, but not significantly.

    A mean that just reaches the line differs from it by chance. So the budget is the shortest that beats the
    baseline's best seed with a search seed.
    """
    number = len(verdict.attempts) + 1
    hopeless = lowest_p(len(line.baseline), number) >= SIGNIFICANT
    if not verdict.reached or is_record(verdict) or hopeless:
        return verdict
    longer = [budget for budget in choose(min(line.baseline))[0] if budget > budget_of(verdict)]
    if not longer:
        return verdict
    values = losses_of(attempt(number - 1, longer[0]))
    return judge(line, [*verdict.attempts, Attempt(longer[0], values)])


def is_record(verdict: Verdict) -> bool:
    return verdict.reached and verdict.p_value < SIGNIFICANT


def losses_of(records: Sequence[dict[str, Any]]) -> list[float]:
    return [loss_of(record) for record in records]


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
    if result.loss_interval is not None:
        print("  95 % interval of the ratio: {:.2f} to {:.2f}".format(*result.loss_interval))
    if result.record is not result.loss:
        print(f"{name}, loss line, at a budget that beats the baseline's best seed with a search seed")
        print_attempt(result.record.attempts[-1], plan, 1.0)
        print_ratio(result.record, result.record_speedup)
    if result.score is None:
        print(f"{name}: the score line does not count: {result.why_no_score}")
    else:
        print_verdict(f"{name}, score line", result.score, result.score_speedup or 0.0, plan, -1.0)


def print_verdict(title: str, verdict: Verdict, speedup: float, plan: SearchPlan, sign: float) -> None:
    print(title)
    for attempt in verdict.attempts:
        reached = attempt is verdict.attempts[-1] and verdict.reached
        print_attempt(attempt, plan, sign, "" if reached else ": missed")
    print_ratio(verdict, speedup)


def print_attempt(attempt: Attempt, plan: SearchPlan, sign: float, missed: str = "") -> None:
    print(f"  {attempt.budget_s:.1f} s, {plan.seeds} seeds: mean {sign * statistics.mean(attempt.values):.4f}{missed}")


def print_ratio(verdict: Verdict, speedup: float) -> None:
    claim = "a record" if is_record(verdict) else "no record"
    ratio = f"ratio {speedup:.2f}, " if speedup else ""
    print(f"  {ratio}p {verdict.p_value:.4f} after {len(verdict.attempts)} attempts: {claim}")
