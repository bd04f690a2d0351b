"""A run that is so many hours long: the clock, the learning rate that follows it, and going on after a stop."""

import json
import signal

import pytest

from megabert.config.parser import RecipeParser
from megabert.files.checkpoint_format import find_checkpoint, read_state
from megabert.training.distributed.signals import REQUEUE
from megabert.training.telemetry.reporter import read_metrics
from megabert.training.telemetry.timers import Clock
from tests.conftest import TINY, last_of_each, pretrain_command, run_command
from tests.training.distributed.test_signals import start, wait_for_step


def test_the_clock_ends_before_a_step_that_would_be_late():
    clock = Clock(budget=60.0)
    clock.go_on_from(20.0, slowest=5.0)
    assert 20.0 <= clock.now() < 21.0
    for used in (30.0, 40.0):
        clock.agree(used)
    assert (clock.used, clock.share) == (40.0, 40 / 60)
    assert not clock.is_over
    clock.agree(53.0)
    assert clock.is_over  # 7 s left, and the last step took 13
    again = Clock(budget=60.0)
    again.go_on_from(clock.used, clock.slowest)
    assert again.is_over  # started again, a finished run makes no step more
    assert not Clock(budget=None, used=1e9).is_over


def test_one_slow_step_is_forgotten():
    clock = Clock(budget=100.0)
    for used in (30.0, *(30.0 + i for i in range(1, 40))):
        clock.agree(used)
    assert clock.slowest == 1.0
    assert not clock.is_over


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--run.max_hours=0"], "run.max_hours is 0.0, expected more than 0"),
        (["--run.max_hours=1", "--run.max_steps=5"], "run has max_steps 5 and max_hours 1.0, expected only one of them"),
        (["--max-hours=1", "--masking.schedule=linear"], "cannot change over the run"),
        (["--max_hours", "1", '--data.max_seq_len=[{"max_seq_len": 16, "until": 1}, {"max_seq_len": 32, "until": 1}]'], "until"),
    ],
)  # fmt: skip
def test_lengths_that_cannot_be(capsys, settings, message):
    with pytest.raises(SystemExit):
        RecipeParser("p", "").read(last_of_each([*TINY, *settings]))
    assert message in capsys.readouterr().err


def test_hours_replace_the_recipes_steps():
    recipe = RecipeParser("p", "").read(["--recipe=mosaicbert-base", "--max-hours=4.6"])[0]
    assert (recipe.run.max_hours, recipe.run.max_steps) == (4.6, None)
    assert RecipeParser("p", "").read(["--recipe=mosaicbert-base", "--run.max_steps=7"])[0].run.max_hours is None


SECONDS = 20.0


def test_a_run_of_some_seconds_ends_on_time_with_its_decay_done(corpus, tmp_path):
    """Told to stop and started again on two ranks: the clock goes on, and so does the learning rate."""
    length = f"--max-hours={SECONDS / 3600}"
    first = start(pretrain_command(corpus, tmp_path, length, ds_config="zero0"))
    wait_for_step(first, tmp_path, 2)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(60) == REQUEUE
    assert 0 < read_state(find_checkpoint(tmp_path)).used < SECONDS
    command = pretrain_command(corpus, tmp_path, length, ranks=2, ds_config="zero0")
    done = run_command(command)
    assert done.code == 0, done.output
    assert f"{SECONDS / 3600} hours of steps" in done.output
    points = [point for point in read_metrics(tmp_path / "metrics.jsonl") if "lr" in point]
    rates = [point["lr"] for point in points]
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    state = read_state(find_checkpoint(tmp_path))
    assert 0.5 * SECONDS < state.used <= SECONDS + 1
    assert state.step == points[-1]["step"] == json.loads((tmp_path / "result.json").read_text())["steps"]
    assert rates[-1] < 0.1 * max(rates)
    assert state.used + state.slowest > SECONDS
