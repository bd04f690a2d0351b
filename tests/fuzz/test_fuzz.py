"""No hostile input gives a traceback, hangs, is taken for something else, or gets an error that names nothing."""

import pytest

from tests.fuzz.fuzz import FULL_CASES, KINDS, fuzz
from tests.fuzz.outcome import ACCEPTED, CLEAR, HANG, SILENT, TRACEBACK, UNNAMED, Case, classify


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_inputs_of_each_kind(kind):
    tally = fuzz(kind, cases=25, seed=1)
    assert not tally.bad


@pytest.mark.nightly
@pytest.mark.parametrize("kind", KINDS)
def test_many_inputs_of_each_kind(kind):
    tally = fuzz(kind, cases=FULL_CASES, seed=2)
    assert not tally.bad, tally.figures


def _raise(error: BaseException) -> None:
    raise error


def test_outcomes_are_what_a_user_would_see(monkeypatch):
    monkeypatch.setattr("tests.fuzz.outcome.HANG_S", 1)

    def outcome(run, right: bool = True) -> str:
        return classify(Case("", run, lambda _: right, ("a.yaml",)))[0]

    assert outcome(lambda: 1) == ACCEPTED
    assert outcome(lambda: 1, right=False) == SILENT
    assert outcome(lambda: _raise(ValueError("a.yaml: is empty."))) == CLEAR
    assert outcome(lambda: _raise(ValueError("is empty."))) == UNNAMED
    assert outcome(lambda: _raise(OSError("a.yaml\nhas two lines"))) == TRACEBACK
    assert outcome(lambda: _raise(KeyError("a.yaml"))) == TRACEBACK
    assert outcome(lambda: [None for _ in iter(int, 1)]) == HANG
