"""The race's clock: a training's seconds are its start-up and its steps, times a step's seconds measured in turns.

Every round times the reference, the baseline's default settings, and then each contender. A contender's step is the
median over the rounds of its ratio to the reference. The reference's own step is its processor time divided by the
number of cores. So other load on the machine does not change how many steps a budget buys, as long as it slows both
alike. The ratio of the two finalists is measured once more, with more and longer rounds. The start-up, mostly
compilation, is measured in a new process with an empty cache, as a number of steps of that process. Every start-up and
every round is a record.

A race that continues on another machine keeps the clock of the first one, and trains the steps that this clock buys.
The ratio of the finalists is measured on one machine.
"""

import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from race.records import Records, hash_of
from race.sides.baseline import Baseline
from race.texts.corpora import Corpus
from support.report import machine

from megabert.process.subprocesses import exit_with_parent

REFERENCE = Baseline()
ROUNDS = 5
STEPS, WARM_UP_STEPS = 9, 3
# Of the finalists. Rounds of the search differ by up to a third from their median; a selection can bear that.
FINAL_ROUNDS = 11
FINAL_STEPS = 60
COLD_STEPS = 14


class Contender(Protocol):
    """One side with its settings."""

    @property
    def side(self) -> str: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def profile(self) -> dict[str, Any]: ...
    def train(self, corpus: Corpus, steps: int, seed: int, out: Path) -> Path: ...
    def step_seconds(self, corpus: Corpus, steps: int, out: Path) -> list[float]: ...
    def load(self, folder: Path) -> Any: ...


class Clock(NamedTuple):
    """startup_s: before and beside the steps. step_s: of one step. ratios: to the reference's step, in each round."""

    startup_s: float
    step_s: float
    ratios: list[float]

    def steps_in(self, budget_s: float) -> int:
        """Return the steps that a budget buys; 0 if it does not pay for the start-up."""
        return max(0, math.floor((budget_s - self.startup_s) / self.step_s + 1e-9))

    def seconds(self, steps: int) -> float:
        return self.startup_s + steps * self.step_s


def profile_of(contender: Contender) -> str:
    return hash_of([contender.side, contender.profile])


def measure(contenders: Sequence[Contender], corpus: Corpus, records: Records) -> None:
    """Measure the start-ups, and rounds in turns, of the contenders that have no clock."""
    here = {**place(corpus), "load": os.getloadavg()[0]}
    profiles = {
        profile_of(contender): contender for contender in contenders if find(contender, corpus, records) is None
    }
    for contender in profiles.values():
        measure_startup(contender, corpus, records)
    while lacking := {
        name: each for name, each in profiles.items() if len(rounds(name, place(corpus), records)) < ROUNDS
    }:
        with tempfile.TemporaryDirectory() as scratch:
            wall, cpu = REFERENCE.reference_step(corpus, STEPS, WARM_UP_STEPS, Path(scratch))
            taken = {name: turn(contender, corpus, Path(scratch)) for name, contender in lacking.items()}
        print(f"clock: a round of {len(taken)} contenders; the reference's step took {wall:.3f} s", flush=True)
        records.append({"kind": "round", **here, "reference_s": wall, "reference_cpu_s": cpu, "step_s": taken})


def measure_startup(contender: Contender, corpus: Corpus, records: Records) -> None:
    """Measure a contender's start-up on this machine, if there is no record of it."""
    name = profile_of(contender)
    if records.last(kind="startup", profile=name, **place(corpus)) is not None:
        return
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        steps = startup_steps(contender, corpus, Path(scratch))
    print(f"clock: start-up {steps:.1f} steps, {contender.side} {contender.profile}", flush=True)
    row = {"kind": "startup", "profile": name, **place(corpus), "load": load, "steps": steps}
    records.append(row | {"settings": contender.profile})


def place(corpus: Corpus) -> dict[str, Any]:
    """Return what a measured time depends on, besides the contender."""
    return {"corpus": corpus.hash, "cpu": machine()["cpu"], "cores": machine()["cores"]}


def places(corpus: Corpus, records: Records, **fields: Any) -> list[dict[str, Any]]:
    """Return the places of the corpus's records with these values, that of the first record first."""
    found: list[dict[str, Any]] = []
    for row in records.find(corpus=corpus.hash, **fields):
        where = {name: row[name] for name in ("corpus", "cpu", "cores")}
        if where not in found:
            found.append(where)
    return found


def rounds(profile: str, where: Mapping[str, Any], records: Records) -> list[float]:
    """Return a profile's ratio to the reference in each round of a place that has it."""
    found = records.find(kind="round", **where)
    return [row["step_s"][profile] / row["reference_s"] for row in found if profile in row["step_s"]]


def find(contender: Contender, corpus: Corpus, records: Records) -> Clock | None:
    """Return the contender's clock, if it was measured.

    The reference's step is that of the place of the first rounds, for all contenders. The ratio to it and the start-up
    are those of the first place that has measured this contender.
    """
    profile = profile_of(contender)
    for where in places(corpus, records, kind="round"):
        startup = records.last(kind="startup", profile=profile, **where)
        # The first rounds, so that later ones do not change the steps of a budget.
        ratios = rounds(profile, where, records)[:ROUNDS]
        if startup is not None and len(ratios) == ROUNDS:
            step = statistics.median(ratios) * reference_step(corpus, records)
            return Clock(startup["steps"] * step, step, ratios)
    return None


def reference_step(corpus: Corpus, records: Records) -> float:
    """Return the seconds of the reference's step in the first rounds, which one machine has measured."""
    where = places(corpus, records, kind="round")[0]
    first = list(records.find(kind="round", **where))[:ROUNDS]
    return statistics.median(row["reference_cpu_s"] for row in first) / where["cores"]


def measure_finalists(theirs: Baseline, mine: Contender, corpus: Corpus, records: Records) -> tuple[Clock, Clock]:
    """Return the clocks of the baseline and of ours, whose ratio comes from rounds of these two on one machine.

    Uses the rounds of the first machine that measured all of them; otherwise measures the missing ones here. The
    baseline's step remains that of the search, so its final trials have as many steps as the one that was selected,
    and stay valid when another setting of ours becomes a finalist.
    """
    pair = {"kind": "final round", "baseline": profile_of(theirs), "ours": profile_of(mine)}
    complete = (p for p in places(corpus, records, **pair) if len(list(records.find(**pair, **p))) >= FINAL_ROUNDS)
    where = next(complete, place(corpus))
    found = list(records.find(**pair, **where))
    if len(found) < FINAL_ROUNDS:
        measure_startup(mine, corpus, records)
    while len(found) < FINAL_ROUNDS:
        load = os.getloadavg()[0]
        with tempfile.TemporaryDirectory() as scratch:
            wall, _ = theirs.reference_step(corpus, FINAL_STEPS, WARM_UP_STEPS, Path(scratch))
            taken = turn(mine, corpus, Path(scratch), FINAL_STEPS)
        print(f"clock: finalists, round {len(found) + 1}: {wall:.3f} s and {taken:.3f} s a step", flush=True)
        seconds = {"baseline_s": wall, "ours_s": taken}
        found.append(records.append({**pair, **where, "load": load, **seconds}))
    print(f"clock: the finalists were timed on {where['cores']} cores of {where['cpu']}", flush=True)
    base = find(theirs, corpus, records)
    startup = records.last(kind="startup", profile=profile_of(mine), **where)
    assert base is not None, "the search has measured it"
    assert startup is not None, "it is measured before the rounds"
    ratios = [row["ours_s"] / row["baseline_s"] for row in found[:FINAL_ROUNDS]]
    step = statistics.median(ratios) * base.step_s
    return base._replace(ratios=[1.0] * FINAL_ROUNDS), Clock(startup["steps"] * step, step, ratios)


def turn(contender: Contender, corpus: Corpus, scratch: Path, steps: int = STEPS) -> float:
    """Return the mean seconds of a step after the first ones."""
    return statistics.mean(contender.step_seconds(corpus, steps, scratch)[WARM_UP_STEPS:])


def startup_steps(contender: Contender, corpus: Corpus, scratch: Path) -> float:
    """Return by how much the first steps take longer than later ones where nothing is compiled, in steps."""
    with tempfile.TemporaryDirectory() as cache, environment(TORCHINDUCTOR_CACHE_DIR=cache):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), exit_with_parent) as pool:
            seconds = pool.submit(contender.step_seconds, corpus, COLD_STEPS, scratch).result()
    return excess_steps(seconds)


def excess_steps(seconds: Sequence[float]) -> float:
    """seconds: of each step. [9, 1, 1, 1] -> 8.0"""
    steady = statistics.median(seconds[len(seconds) // 2 :])
    return max(0.0, sum(seconds) / steady - len(seconds))


@contextmanager
def environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
