"""The warm-up and the decay that pretraining and fine-tuning share."""

import pytest

from megabert.optim.lr_schedule import warmup_and_decay


def test_the_warm_up_rises_linearly_and_the_decay_ends_at_the_total():
    assert [warmup_and_decay(step, 10, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [warmup_and_decay(step, 10, 4) for step in (4, 7, 10, 11)] == [1.0, 0.5, 0.0, 0.0]


def test_a_run_may_warm_up_to_its_end_or_not_at_all():
    assert [warmup_and_decay(step, 2, 2) for step in (0, 1, 2)] == [0.5, 1.0, 0.0]
    assert warmup_and_decay(0, 1, 0) == 1.0


def test_the_decay_may_be_shorter_and_end_above_zero():
    curve = [warmup_and_decay(step, 10, 2, schedule="wsd", decay_steps=4, final=0.1) for step in (2, 6, 7, 10)]
    assert curve == pytest.approx([1.0, 1.0, 0.1 + 0.9 * 0.5, 0.1])
