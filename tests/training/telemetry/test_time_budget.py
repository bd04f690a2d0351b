"""Runs with run.max_hours: the time budget, the learning rate that follows it, and resuming."""

import json

import pytest

from megabert.files.checkpoint_format import find_checkpoint, read_state
from megabert.process.exit_codes import EXIT_REQUEUE
from megabert.training.telemetry.reporter import read_metrics
from megabert.training.telemetry.timers import TimeBudget
from tests.helpers.recipes import read_recipe
from tests.helpers.runs import TINY, finish_ranks, last_of_each, patched, pretrain_command, run_command, start_ranks


def test_the_budget_is_over_before_a_step_that_would_exceed_it():
    budget = TimeBudget(limit=60.0)
    budget.resume(20.0, max_step=5.0)
    assert budget.elapsed() >= 20.0
    for used in (30.0, 40.0):
        budget.update(used)
    assert (budget.used, budget.share_of_schedule) == (40.0, 40 / 60)
    assert not budget.is_over
    budget.update(53.0)
    # 7 s left, and the last step took 13.
    assert budget.is_over
    again = TimeBudget(limit=60.0)
    again.resume(budget.used, budget.max_step)
    # A finished run that is started again makes no further step.
    assert again.is_over
    assert not TimeBudget(limit=None, used=1e9).is_over


def test_the_schedule_begins_after_the_first_step():
    budget = TimeBudget(limit=100.0)
    assert budget.share_of_schedule == 0.0
    shares = []
    for used in (20.0, 60.0, 100.0):
        budget.update(used)
        shares.append(budget.share_of_schedule)
    assert shares == [0.0, 0.5, 1.0]
    again = TimeBudget(limit=100.0)
    again.resume(60.0, max_step=1.0, schedule_start=20.0)
    assert again.share_of_schedule == 0.5
    again.update(80.0)
    assert again.share_of_schedule == 0.75
    late = TimeBudget(limit=10.0)
    late.update(11.0)
    assert late.share_of_schedule == 1.0


def test_one_slow_step_is_forgotten():
    budget = TimeBudget(limit=100.0)
    for used in (30.0, *(30.0 + i for i in range(1, 40))):
        budget.update(used)
    assert budget.max_step == 1.0
    assert not budget.is_over


PHASES = '[{"max_seq_len": 16, "until": 1}, {"max_seq_len": 32, "until": 1}]'


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--run.max_hours=0"], "run.max_hours is 0.0, expected a number in (0, 1e5]"),
        (["--run.max_hours=1", "--run.max_steps=5"], "max_steps 5 and max_hours 1.0, expected only one of them"),
        (["--max_hours", "1", f"--data.max_seq_len={PHASES}"], "until"),
    ],
)  # fmt: skip
def test_impossible_lengths_are_refused(capsys, settings, message):
    with pytest.raises(SystemExit):
        read_recipe(*last_of_each([*TINY, *settings]))
    assert message in capsys.readouterr().err


def test_max_hours_replaces_the_recipes_max_steps():
    recipe = read_recipe("--recipe=mosaicbert-base", "--max-hours=4.6")
    assert (recipe.run.max_hours, recipe.run.max_steps) == (4.6, None)
    assert read_recipe("--recipe=mosaicbert-base", "--run.max_steps=7").run.max_hours is None


SECONDS = 20.0

FAKE_CLOCK = """
import os, signal
from megabert.training.telemetry.timers import TimeBudget
calls = 0
def elapsed(self):
    global calls
    calls += 1
    if calls == int(os.environ["STOP_AT"]):
        os.kill(os.getpid(), signal.SIGUSR1)
    return self.used_before + 0.5 * calls
TimeBudget.elapsed = elapsed
"""


def test_a_run_of_20_seconds_ends_in_time_with_a_decayed_learning_rate(corpus, tmp_path):
    """On a fake clock each step takes 0.5 s. Budget, learning rate and masking continue when it is stopped and resumed.

    Each step's share of masked tokens is that of its time, before and after.
    """
    out = tmp_path / "run"
    settings = [f"--max-hours={SECONDS / 3600}", "--masking.schedule=linear"]
    command = patched(pretrain_command(corpus, out, *settings, ds_config="zero0"))
    done = run_command(command, PATCH=FAKE_CLOCK, STOP_AT="10")
    assert done.code == EXIT_REQUEUE, done.output
    stopped = read_state(find_checkpoint(out))
    assert stopped.wall_seconds == 0.5 * stopped.step
    done = finish_ranks(start_ranks(command, 2, PATCH=FAKE_CLOCK, STOP_AT="0"))
    assert done.code == 0, done.output
    assert f"{SECONDS / 3600} hours of steps" in done.output
    points = [point for point in read_metrics(out / "metrics.jsonl") if "lr" in point]
    rates = [point["lr"] for point in points]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.1 * max(rates)
    # The first step's time is not part of the schedule, so the second step has the same share of masked tokens.
    expected = [0.3 - 0.15 * max(0, point["step"] - 2) * 0.5 / (SECONDS - 0.5) for point in points]
    assert [point["masked_share"] / points[0]["masked_share"] for point in points] == pytest.approx(
        [share / 0.3 for share in expected], rel=0.05
    )
    state = read_state(find_checkpoint(out))
    assert state.step == points[-1]["step"] == json.loads((out / "result.json").read_text())["steps"]
    assert state.wall_seconds == SECONDS
    assert state.step == SECONDS / 0.5
