"""Fixtures of the tests of data_prep."""

import json

import pytest

from data_prep.writing import length_statistics

_drawn: dict[str, bytes] = {}
_plot = length_statistics.plot


def draw_once(statistics: dict) -> bytes:
    key = json.dumps(statistics)
    if key not in _drawn:
        _drawn[key] = _plot(statistics)
    return _drawn[key]


@pytest.fixture(autouse=True)
def plots_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the image of equal statistics: matplotlib takes half of the time of writing a small corpus."""
    monkeypatch.setattr(length_statistics, "plot", draw_once)
