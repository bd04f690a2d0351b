"""Statistics of the race: p-value, interval, and which budget counts."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000


def permutation_p(lower: Sequence[float], higher: Sequence[float]) -> float:
    """Return the exact one-sided p-value of "the mean of `lower` is lower": the share of splits at least as extreme."""
    values = [*lower, *higher]
    observed = sum(lower)
    splits = [sum(split) for split in itertools.combinations(values, len(lower))]
    return sum(total <= observed + 1e-12 * abs(observed) for total in splits) / len(splits)


class Line(NamedTuple):
    """A finish line: the baseline's value for each seed. Lower is better; scores are negated."""

    baseline: list[float]

    def is_reached(self, values: Sequence[float]) -> bool:
        return statistics.mean(values) <= statistics.mean(self.baseline)


class Attempt(NamedTuple):
    """The values of fresh seeds at one budget, in seconds."""

    budget_s: float
    values: list[float]


class Verdict(NamedTuple):
    """attempts: all that were made, the last of which reached the line, unless none did.

    p_value: that of the last attempt, times the number of attempts, because misses count.
    """

    attempts: list[Attempt]
    reached: bool
    p_value: float


def first_to_reach(line: Line, budgets: Sequence[float], run: Callable[[int, float], list[float]]) -> Verdict:
    """Try the budgets, shortest first, until the mean of fresh seeds reaches the line.

    run(number, budget) trains the seeds of attempt `number` and returns their values.
    """
    assert list(budgets) == sorted(budgets), "the shortest budget is tried first"
    attempts: list[Attempt] = []
    for number, budget in enumerate(budgets):
        attempts.append(Attempt(budget, run(number, budget)))
        if line.is_reached(attempts[-1].values):
            break
    return judge(line, attempts)


def judge(line: Line, attempts: list[Attempt]) -> Verdict:
    """Return what the last of these attempts shows."""
    last = attempts[-1].values
    p_value = min(1.0, permutation_p(last, line.baseline) * len(attempts))
    return Verdict(attempts, line.is_reached(last), p_value)


def lowest_p(seeds: int, attempts: int) -> float:
    """Return the p-value of an attempt whose every seed beats every seed of the baseline, after so many attempts."""
    return attempts / math.comb(2 * seeds, seeds)


def ratio_interval(
    baseline: Sequence[float], ours: Sequence[float], ratio: float, nats_per_e: float, step_ratios: Sequence[float]
) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the ratio of times.

    nats_per_e: by how much our value falls when our time grows e-fold, which turns differences of means into time.
    step_ratios: baseline's seconds per step / ours in each round of the clock, whose noise counts too.
    """
    rng = np.random.default_rng(0)

    def means(values: Sequence[float]) -> np.ndarray:
        return rng.choice(np.array(values), (RESAMPLES, len(values))).mean(axis=1)

    gained = (means(baseline) - means(ours)) / nats_per_e
    clocks = np.median(rng.choice(np.array(step_ratios), (RESAMPLES, len(step_ratios))), axis=1)
    logs = math.log(ratio) + gained + np.log(clocks / np.median(step_ratios))
    low, high = np.exp(np.quantile(logs, [0.025, 0.975]))
    return float(low), float(high)


def beats(values: Sequence[float], others: Sequence[float], errors: float) -> bool:
    """Return whether the mean of values exceeds that of others by so many standard errors of the difference."""
    difference = statistics.mean(values) - statistics.mean(others)
    if min(len(values), len(others)) < 2:
        return False
    error = math.sqrt(statistics.variance(values) / len(values) + statistics.variance(others) / len(others))
    return difference > errors * error
