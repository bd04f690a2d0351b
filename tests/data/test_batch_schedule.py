"""The batch schedule: its stages, and which step and length a bin belongs to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabert.data.batch_schedule import BatchSchedule, Length, Stage, make_schedule


def test_a_run_without_changes_has_one_stage():
    assert make_schedule(100, 8, [Length(128, 1.0)]) == BatchSchedule((Stage(0, 0, 8, 128),))


def test_a_length_change_and_a_batch_warm_up_make_stages():
    """A step has 2, 4, 6, then 8 micro-batches over the first 40 steps; pieces have 512 tokens from step 90 on."""
    schedule = make_schedule(100, 8, [Length(128, 0.9), Length(512, 1.0)], first_batches=2, warmup=0.4)
    assert schedule.stages == (
        Stage(0, 0, 2, 128),
        Stage(10, 20, 4, 128),
        Stage(20, 60, 6, 128),
        Stage(30, 120, 8, 128),
        Stage(90, 600, 8, 512),
    )
    assert schedule.longest == 512
    assert schedule.batches_per_step == [2, 4, 6, 8]
    assert [schedule.at(index).first_step for index in (0, 19, 20, 599, 600, 10**9)] == [0, 0, 10, 30, 90, 90]


def test_a_batch_warm_up_must_start_at_a_divisor_of_the_batch():
    with pytest.raises(ValueError, match="starts at 3 micro-batches, which do not divide the 8"):
        make_schedule(10, 8, [Length(128, 1.0)], first_batches=3, warmup=0.5)


@given(st.integers(1, 500), st.integers(1, 6), st.integers(1, 6), st.floats(0, 1), st.floats(0.01, 0.99))
def test_stages_follow_each_other_without_a_gap(steps, first, levels, warmup, until):
    lengths = [Length(64, until), Length(128, 1.0)]
    schedule = make_schedule(steps, first * levels, lengths, first_batches=first, warmup=warmup)
    assert schedule.stages[0][:2] == (0, 0)
    index = 0
    for step in range(steps):
        stage = schedule.at(index)
        assert (index - stage.first_index) % stage.batches_per_step == 0
        assert step == stage.first_step + (index - stage.first_index) // stage.batches_per_step
        assert stage.max_seq_len == (64 if step < round(until * steps) else 128)
        index += stage.batches_per_step
