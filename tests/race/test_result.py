"""The race's statistics, and its result: attempts, ratios, p-values and records."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from race.clock import Clock
from race.command import choose_budgets, slope_at
from race.records import Records
from race.result import Result, compare, print_result, why_no_score
from race.sides.baseline import Baseline
from race.sides.grids import FULL
from race.sides.ours import Ours
from race.significance import Line, beats, first_to_reach, permutation_p, ratio_interval
from race.trials import Track


def test_permutation_p_counts_splits():
    assert permutation_p([1, 2, 3], [4, 5, 6]) == 1 / 20
    assert permutation_p([4, 5, 6], [1, 2, 3]) == 1.0
    assert permutation_p([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]) == 1 / math.comb(10, 5) < 0.01
    assert permutation_p([2.0], [2.0]) == 1.0


def test_the_interval_comes_from_seeds_and_rounds():
    assert ratio_interval([4.0] * 5, [4.0] * 5, 3.0, 1.0, [2.0] * 5) == pytest.approx((3.0, 3.0))
    # A mean that is 0.7 nats better, at 1 nat for a time e times as long, means a ratio e^0.7 times as large.
    assert ratio_interval([4.7] * 5, [4.0] * 5, 3.0, 1.0, [2.0] * 5) == pytest.approx((3 * math.exp(0.7),) * 2)
    seeds = ratio_interval([4.0, 4.1, 3.9], [4.0, 4.1, 3.9], 3.0, 1.0, [2.0] * 5)
    # The mean of 3 of these values has a standard deviation of 0.0471.
    assert seeds == pytest.approx([3 * math.exp(sign * 1.96 * 0.0471 * 2**0.5) for sign in (-1, 1)], rel=0.04)
    low, high = ratio_interval([4.0] * 3, [4.0] * 3, 3.0, 1.0, [1.5, 2.0, 2.5])
    assert (low, high) == pytest.approx((3 * 0.75, 3 * 1.25))


def test_misses_count():
    line = Line([4.0, 4.1, 4.2])
    values: dict[float, list[float]] = {10: [5.0] * 3, 20: [4.11] * 3, 30: [3.0, 3.1, 3.2], 40: [1.0] * 3}
    verdict = first_to_reach(line, sorted(values), lambda number, budget: values[budget])
    assert [attempt.budget_s for attempt in verdict.attempts] == [10, 20, 30]
    assert verdict.reached
    assert verdict.p_value == pytest.approx(3 / 20)
    missed = first_to_reach(line, [10, 20], lambda number, budget: values[budget])
    assert (missed.reached, missed.p_value) == (False, 1.0)


@pytest.fixture
def track(tmp_path):
    return Track(SimpleNamespace(name="text"), Records(tmp_path / "records.jsonl", tmp_path), tmp_path / "out", [], 0)


def run_race(track, values: dict[float, list[float]], first: float, best: float) -> Result:
    """Compare with a baseline of 3.7 to 4.5 in 600 s. values: our losses at each budget.

    first, best: the budgets from which our search seed is below the baseline's mean, and below its best seed.
    """
    finals = [{"steps": 599, "loss": loss} for loss in (3.7, 4.5, 4.0, 4.0, 4.2)]

    def attempt(number: int, budget: float) -> list[dict[str, Any]]:
        return [{"loss": loss} for loss in values[budget]]

    def choose(line: float) -> tuple[list[float], float | None]:
        start = best if line == 3.7 else first
        return [budget for budget in sorted(values) if budget >= start], 1.0

    clocks = (Clock(1.0, 1.0, [1.0] * 5), Clock(1.0, 0.5, [0.5] * 5))
    return compare(track, (Baseline(), finals), (Ours(), attempt), clocks, choose)


def test_a_mean_that_reaches_the_line_by_chance_is_followed_by_one_that_does_not(track, capsys):
    values: dict[float, list[float]] = {60: [4.0, 4.1, 4.0, 4.0, 4.1], 75: [3.8] * 5, 120: [3.6, 3.65, 3.6, 3.5, 3.6]}
    result = run_race(track, values, first=60, best=120)
    assert (result.loss.reached, result.loss_speedup) == (True, pytest.approx(10.0))
    assert result.loss.p_value > 0.01
    assert [attempt.budget_s for attempt in result.record.attempts] == [60, 120]
    assert (result.record.p_value, result.record_speedup) == (pytest.approx(2 / 252), pytest.approx(5.0))
    print_result("text", result, FULL)
    assert "ratio 10.00, p 0.4" in (printed := capsys.readouterr().out)
    assert "  120.0 s, 5 seeds: mean 3.5900\n  ratio 5.00, p 0.0079 after 2 attempts: a record" in printed


def test_the_budget_of_a_record_may_not_suffice(track, capsys):
    values: dict[float, list[float]] = {60: [4.0] * 5, 120: [3.6, 3.75, 3.8, 3.6, 4.3]}
    result = run_race(track, values, first=60, best=120)
    assert (result.loss_speedup, result.record_speedup) == (pytest.approx(10.0), 0.0)
    print_result("text", result, FULL)
    assert "  120.0 s, 5 seeds: mean 3.8100\n  p 0.1905 after 2 attempts: no record" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "attempts"),
    [
        # The first attempt is a record already.
        ({60: [3.6] * 5, 120: [3.5] * 5}, 1),
        # After two misses no attempt with five seeds can be one.
        ({60: [4.9] * 5, 75: [4.8] * 5, 100: [4.0] * 5, 120: [3.5] * 5}, 3),
        # No longer budget is left.
        ({60: [4.9] * 5, 120: [4.0] * 5}, 2),
    ],
)
def test_no_attempt_is_made_in_vain(track, values, attempts):
    result = run_race(track, values, first=60, best=120)
    assert result.record is result.loss
    assert len(result.record.attempts) == attempts


@pytest.mark.parametrize("enough", [0, 37, 100, 150, 599, 601])
def test_our_first_budget_is_the_shortest_that_reaches_the_line(enough, track, monkeypatch):
    """A step takes a second, and the loss is below the line from `enough` of them."""
    tried: list[int] = []

    def train(wanted):
        tried.extend(trial.steps for trial in wanted)
        return [{"loss": (3.0 if trial.steps >= enough else 5.0) - trial.steps / 1000} for trial in wanted]

    monkeypatch.setattr(Track, "trials", lambda self, wanted: train(wanted))
    budgets, slope = choose_budgets(track, Ours(), Clock(0.0, 1.0, []), FULL, 4.0)
    ladder = sorted(FULL.budget_s / share for share in FULL.ladder)
    assert budgets == [budget for budget in ladder if math.floor(budget) >= enough] or budgets == ladder[-1:]
    assert len(tried) <= 4
    assert slope is not None
    assert slope > 0


def test_the_slope_is_that_between_the_budgets_around_the_line():
    losses = {10.0: 6.0, 20.0: 5.0, 40.0: 3.0, 80.0: 2.9}
    assert slope_at(4.0, losses) == pytest.approx(2 / math.log(2))
    assert slope_at(9.0, losses) == pytest.approx(1 / math.log(2))
    assert slope_at(1.0, losses) == pytest.approx(0.1 / math.log(2))
    assert slope_at(4.0, {10.0: 5.0}) is None
    assert slope_at(4.0, {10.0: 5.0, 20.0: 5.5}) is None


def test_the_score_line_counts_only_where_pretraining_shows(track):
    twins = [0.5, 0.51, 0.49, 0.5, 0.5]
    near = [{"scores": [0.5], "random_twin": [twin]} for twin in twins]
    far = [{"scores": [0.6, 0.62], "random_twin": [twin]} for twin in twins]
    assert why_no_score(track, far) == "a task has no data"
    scored = Track(track.corpus, track.records, track.out, ["a task"], 0)
    assert "is not 3 standard errors above its random twin's 0.500 (5 seeds)" in str(why_no_score(scored, near))
    assert why_no_score(scored, far) is None
    assert "(1 seeds)" in str(why_no_score(scored, far[:1]))
    assert beats([1.0, 1.2], [0.0, 0.2], 3.0)
    assert not beats([1.0, 1.2], [0.8, 1.0], 3.0)
