"""Helpers for dataclasses of settings: value checks, metadata, and conversion to plain containers."""

from collections.abc import Iterable
from typing import Any

# Field metadata of the settings that may change when a run resumes: they say what is reported, kept and cached, and
# where data is read from, or they guard a run against bad updates. Settings without it must stay the same.
MAY_CHANGE = {"may_change_at_resume": True}


def check_range(
    name: str, value: float, low: float, high: float, *, closed_below: bool = False, closed_above: bool = False
) -> None:
    """Raise ValueError unless a value lies between two limits."""
    above = value >= low if closed_below else value > low
    below = value <= high if closed_above else value < high
    if not (above and below):
        interval = f"{'[' if closed_below else '('}{low}, {high}{']' if closed_above else ')'}"
        raise ValueError(f"{name} is {value}, expected a number in {interval}.")


def check_at_least(section: str, settings: object, names: Iterable[str], low: float) -> None:
    """Raise ValueError if one of these settings is set and smaller than low."""
    for name in names:
        if (value := getattr(settings, name)) is not None and value < low:
            raise ValueError(f"{section}.{name} is {value}, expected at least {low}.")


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Give nested settings dotted names. {"model": {"hidden_size": 64}} -> {"model.hidden_size": 64}"""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def with_lists(value: Any) -> Any:
    """Replace every tuple in nested containers by a list."""
    if isinstance(value, dict):
        return {key: with_lists(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [with_lists(item) for item in value]
    return value
