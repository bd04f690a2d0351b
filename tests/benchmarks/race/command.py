"""The command of the race: prepare the texts, search both sides' settings, train the final seeds, print the result."""

import bisect
import functools
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from race import clock, scoring
from race.clock import Clock, Contender
from race.records import COMMITTED, Records
from race.result import Result, compare, print_result, why_no_score
from race.sides.baseline import Baseline
from race.sides.grids import FULL, QUICK, SEARCH_SEEDS, SearchPlan, baseline_grid, open_baselines, open_ours, our_grid
from race.sides.ours import Ours
from race.texts import corpora, prose
from race.trials import Track, Trial, halve, loss_of, prepare_process
from support import report

from megabert.config.cli import Parser
from megabert.files.lock import LockHeldError, acquire


def make_parser(description: str) -> Parser:
    """Make a parser with the flags that run.py and ablation.py share."""
    parser = report.make_parser(description, quick="one seed and a small budget: at most ten minutes")
    parser.add_argument(
        "--corpus", choices=corpora.NAMES, help="only this text; default: both, with --quick docstrings"
    )
    parser.add_argument("--out", type=Path, help="folder for records and trials; default: runs/race[-quick][-fresh]")
    parser.add_argument(
        "--fresh", action="store_true", help="without the project's records: measure and train everything here"
    )
    return parser


def read_options(parser: Parser) -> Namespace:
    """Read the flags, and check what both commands need."""
    options = parser.parse_args()
    if find_spec("accelerate") is None:
        parser.error("transformers' Trainer needs accelerate: pip install accelerate")
    suffix = ("-quick" if options.quick else "") + ("-fresh" if options.fresh else "")
    options.out = options.out or corpora.REPOSITORY / f"runs/race{suffix}"
    return options


def prepared(options: Namespace) -> list[corpora.Corpus]:
    """Make the texts. One that cannot be downloaded is left out, with a line."""
    names = [options.corpus] if options.corpus else ["docstrings"] if options.quick else list(corpora.NAMES)
    found = []
    for name in names:
        try:
            found.append(corpora.prepare(name))
        except prose.UnreachableError as error:
            print(f"{name}: left out, since its packages cannot be downloaded: {error}", flush=True)
    if not found:
        raise SystemExit("no text to race on: connect to a Debian mirror, or pass --corpus docstrings.")
    return found


def best_baseline(track: Track, plan: SearchPlan, quick: bool, kind: str) -> Baseline:
    """Search the baseline's settings."""
    grid = baseline_grid(quick)
    print(f"baseline: {len(grid)} settings", flush=True)
    best = search(track, grid, plan, plan.baseline_rungs)
    return search(track, open_baselines(best), plan, plan.baseline_rungs[-1:]) if kind == "open" else best


def best_of_ours(track: Track, plan: SearchPlan, quick: bool, kind: str) -> Ours:
    grid = our_grid(quick)
    print(f"ours: {len(grid)} settings", flush=True)
    best = search(track, grid, plan, plan.our_rungs)
    return search(track, open_ours(best), plan, plan.our_rungs[-1:]) if kind == "open" else best


def search(track: Track, grid: Sequence[Any], plan: SearchPlan, rungs: Sequence[float]) -> Any:
    """Return the best setting of a grid. Its clock is measured first."""
    clock.measure(grid, track.corpus, track.records)
    return halve(track, grid, [plan.budget_s / rung for rung in rungs])[0][1]


def final_trials(
    track: Track, contender: Contender, steps: int, seeds: Sequence[int], scored: bool
) -> list[dict[str, Any]]:
    """Train the seeds of one attempt. scored: fine-tune too."""
    return track.trials([Trial(contender, steps, seed, scored) for seed in seeds])


def choose_budgets(
    track: Track, ours: Ours, clock_of_ours: Clock, plan: SearchPlan, line: float
) -> tuple[list[float], float | None]:
    """Fix the budgets to try: the shortest that reaches the line with a search seed, and all longer ones.

    It is found by bisection. Also returns by how many nats the loss falls when the time grows e-fold, or None.
    """
    budgets = [plan.budget_s / share for share in plan.ladder]
    budgets = sorted(budget for budget in budgets if clock_of_ours.steps_in(budget))
    tried: dict[float, float] = {}

    def reaches(number: int) -> bool:
        budget = budgets[number]
        steps = clock_of_ours.steps_in(budget)
        tried[budget] = loss_of(track.trials([Trial(ours, steps, SEARCH_SEEDS[1])])[0])
        print(f"  search seed, {budget:.0f} s, {steps} steps: loss {tried[budget]:.3f}, line {line:.3f}", flush=True)
        return tried[budget] <= line

    # The longest is tried with the final seeds in any case.
    first = bisect.bisect_left(range(len(budgets) - 1), True, key=reaches)
    return budgets[first:], slope_at(line, tried)


def slope_at(line: float, tried: Mapping[float, float]) -> float | None:
    """Return by how many nats the loss falls for an e-fold budget, between the two budgets nearest to the line.

    tried: loss of each budget in seconds. None if there is one budget alone, or if the longer one is not better.
    """
    if len(tried) < 2:
        return None
    budgets = sorted(tried)
    after = next((n for n, budget in enumerate(budgets) if tried[budget] <= line), len(budgets) - 1)
    short, long = budgets[max(0, after - 1)], budgets[max(1, after)]
    slope = (tried[short] - tried[long]) / math.log(long / short)
    return slope if slope > 0 else None


def race(track: Track, plan: SearchPlan, options: Namespace) -> Result:
    """Run the whole race on one text."""
    baseline = best_baseline(track, plan, options.quick, options.kind)
    ours = best_of_ours(track, plan, options.quick, options.kind)
    clocks = clock.measure_finalists(baseline, ours, track.corpus, track.records)
    finals = final_trials(track, baseline, clocks[0].steps_in(plan.budget_s), plan.final_seeds(0), bool(track.tasks))
    # Fine-tuning takes longer than our training, and shows nothing where the score line does not count.
    scored = why_no_score(track, finals) is None

    def attempt(number: int, budget: float) -> list[dict[str, Any]]:
        return final_trials(track, ours, clocks[1].steps_in(budget), plan.final_seeds(1 + number), scored)

    choose = functools.partial(choose_budgets, track, ours, clocks[1], plan)
    return compare(track, (baseline, finals), (ours, attempt), clocks, choose)


@contextmanager
def open_tracks(options: Namespace, plan: SearchPlan) -> Iterator[list[Track]]:
    """Lock the output folder for this command, and prepare a track per text."""
    prepare_process()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        lock = acquire(options.out / "race.lock")
    except LockHeldError as error:
        raise SystemExit(f"{options.out}: process {error.pid} races there. Wait for it, or pass --out.") from error
    try:
        for killed in options.out.glob("trial*"):
            shutil.rmtree(killed)
        texts = prepared(options)
        tasks, missing = scoring.available_tasks()
        for line in missing:
            print(f"score: {line}", flush=True)
        committed = None if options.fresh else COMMITTED
        records, scored = Records(options.out / "records.jsonl", committed), [] if missing else tasks
        processes = torch.get_num_threads()
        yield [Track(corpus, records, options.out, scored, plan.examples, processes) for corpus in texts]
    finally:
        lock.release()


def main(description: str) -> None:
    parser = make_parser(description)
    parser.add_argument("--class", dest="kind", choices=("same-size", "open"), default="same-size")
    options = read_options(parser)
    plan = QUICK if options.quick else FULL
    results = []
    with open_tracks(options, plan) as tracks:
        for track in tracks:
            results.append(race(track, plan, options))
            print_result(track.corpus.name, results[-1], plan)
    if options.quick:
        print("--quick: one seed, a small budget and few settings. This shows that the race runs; it is no result.")
    figures = figures_of(results, options.kind, plan)
    print(figures)
    report.write(figures, options.json, quick=options.quick)


def figures_of(results: Sequence[Result], kind: str, plan: SearchPlan) -> dict[str, float]:
    """Return the figures: of several texts the smallest speedup and the largest p-value."""
    name = kind.replace("-", "_")
    figures: dict[str, float] = {"seeds": plan.seeds, "p_value": max(result.p_value for result in results)}
    losses = [result.loss_speedup for result in results]
    scores = [result.score_speedup for result in results if result.score_speedup is not None]
    figures[f"{name}_loss_speedup"] = min(losses)
    figures[f"{name}_record_speedup"] = min(result.record_speedup for result in results)
    if scores:
        figures[f"{name}_score_speedup"] = min(scores)
    return figures
