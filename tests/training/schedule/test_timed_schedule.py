"""Schedules that follow the share of a run's time: batch, length, data and masking, known ahead of their bins."""

import json
import multiprocessing
import os

import pytest

from megabert.config.recipe_parser import RecipeParser
from megabert.data.stream import PREFETCHED
from megabert.training.run_schedule import PARTS, RunSchedule, TimedStages, TimeTable, lr_factor, make_run_schedule
from tests.helpers.runs import TINY, last_of_each

LENGTHS = '[{"max_seq_len": 16, "until": 0.25}, {"max_seq_len": 32, "until": 1}]'
PHASES = '[{"until": 0.5}, {"until": 1, "mlm_probability": 0.15}]'
WARM_UP = ["--data.global_batch_tokens=1024", "--data.batch_warmup=0.5", "--data.batch_warmup_from=512"]


def schedule_of(*flags: str) -> tuple[RunSchedule, TimedStages]:
    recipe = RecipeParser("p", "").read(last_of_each([*TINY, "--max-hours=1", *flags]))[0]
    schedule = make_run_schedule(recipe, 1)
    assert schedule.timed is not None
    return schedule, schedule.timed


def bins_of_steps(schedule: RunSchedule, shares: list[float], ahead: int = 0) -> list[int]:
    """Take a step at each share of the time. Returns the first bin of each."""
    bins = [0]
    for share in shares:
        assert schedule.timed is not None
        schedule.timed.plan_ahead(bins[-1], share, ahead)
        bins.append(bins[-1] + schedule.stages.at(bins[-1]).batches_per_step)
    return bins[:-1]


def test_batch_length_and_masking_follow_the_time_however_many_steps_it_has():
    for steps in (8, 40):
        schedule, _ = schedule_of(*WARM_UP, f"--data.max_seq_len={LENGTHS}", "--masking.schedule=linear")
        shares = [step / steps for step in range(steps)]
        bins = bins_of_steps(schedule, shares)
        assert [schedule.stages.at(i).batches_per_step for i in bins] == [2 if s < 0.25 else 4 for s in shares]
        assert [schedule.stages.at(i).max_seq_len for i in bins] == [16 if s < 0.25 else 32 for s in shares]
        assert [schedule.masking.at(i) for i in bins] == pytest.approx([0.3 - 0.15 * s for s in shares], abs=2e-4)
        assert schedule.masking.highest == 0.3


def test_phases_change_the_masking_by_the_time():
    schedule, _ = schedule_of(f"--data.phases={PHASES}", "--optimizer.schedule=wsd")
    bins = bins_of_steps(schedule, [0.0, 0.49, 0.5, 1.0])
    assert [schedule.masking.at(i) for i in bins] == [0.3, 0.3, 0.15, 0.15]
    # Which the learning rate counts in.
    assert schedule.total_steps > 1e12
    recipe = RecipeParser("p", "").read(["--max-hours=1", "--optimizer.schedule=wsd", "--optimizer.final_lr=0"])[0]
    rates = [lr_factor(int(s * schedule.total_steps), schedule.total_steps, recipe.optimizer) for s in (0.5, 0.9, 1)]
    assert rates == [1.0, 1.0, 0.0]


def test_workers_know_bins_ahead_and_a_bin_never_changes_its_part():
    """A pause of the machine between two steps moves later bins only; the time never runs backwards for them."""
    ahead = 4 * PREFETCHED
    schedule, timed = schedule_of("--masking.schedule=cosine", *WARM_UP)
    seen: dict[int, tuple[float, int]] = {}
    next_index = 0
    for share in (0.0, 0.01, 0.3, 0.9, 0.89, 0.9):
        timed.plan_ahead(next_index, share, ahead)
        assert timed.table.known > next_index + ahead
        now = {i: (schedule.masking.at(i), schedule.stages.at(i).batches_per_step) for i in range(timed.table.known)}
        assert now.items() >= seen.items()
        seen = now
        next_index += schedule.stages.at(next_index).batches_per_step
    rates = [rate for rate, _ in seen.values()]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.16


def test_a_table_from_a_checkpoint_gives_every_bin_the_part_it_had():
    schedule, timed = schedule_of("--masking.schedule=linear")
    bins_of_steps(schedule, [0.0, 0.2, 0.5], ahead=20)
    again, resumed = schedule_of("--masking.schedule=linear")
    resumed.table.restore(json.loads(json.dumps(timed.table.to_json())))
    known = range(timed.table.known)
    assert [again.masking.at(i) for i in known] == [schedule.masking.at(i) for i in known]
    for each in (timed, resumed):
        each.plan_ahead(each.table.known, 1.0, 0)
    assert resumed.table.to_json() == timed.table.to_json()
    assert resumed.table.newest == PARTS - 1


def test_a_worker_waits_for_its_bins_and_the_training_process_never_does():
    table = TimeTable()
    table.begin(3, 8)
    assert (table.part_of(0), table.part_of(7)) == (3, 3)
    with pytest.raises(AssertionError, match="bin 8"):
        table.part_of(8)
    reader, writer = os.pipe()

    def work() -> None:
        os.write(writer, b"waiting")
        os.write(writer, b"%d" % table.part_of(8))

    worker = multiprocessing.get_context("fork").Process(target=work)
    worker.start()
    assert os.read(reader, 7) == b"waiting"
    table.begin(5, 8)
    worker.join(60)
    assert worker.exitcode == 0
    assert os.read(reader, 9) == b"5"
