"""Declare settings as fields of dataclasses, check their limits, and convert them to plain containers."""

import dataclasses
import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any, get_type_hints

LIMITS = re.compile(r"([\[(])(\S+), (\S+)([\])])")
COMMAND_OR_ADDRESS = re.compile(r"\s*(pipe|hf|[A-Za-z][\w+.-]*(?=://)):", re.IGNORECASE)


def setting(
    default: Any,
    limits: str | None = None,
    *,
    may_change: bool = False,
    may_branch: bool = False,
    is_output: bool = False,
) -> Any:
    """Declare a field of a dataclass of settings.

    default: its default, or a type such as list that makes it. limits: the interval of a number, such as "[0, 1)",
    which check_limits checks and --help prints. may_change: whether the setting may differ when a run resumes, as
    logging, saving, caching, kernels, data locations and the guard against bad updates may; --help says so.
    may_branch: whether it may differ in a branch (run.branch_from), as the length of a run and its schedules may.
    is_output: whether it names a file or folder that is written, which check_limits checks too.
    """
    metadata = {
        "limits": limits,
        "may_change_at_resume": may_change,
        "may_change_at_branch": may_change or may_branch,
        "is_output": is_output,
    }
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def required(limits: str | None = None, *, is_output: bool = False) -> Any:
    """Declare a field as setting() does, but without a default."""
    return dataclasses.field(metadata={"limits": limits, "may_change_at_resume": False, "is_output": is_output})


def check_limits(settings: Any, prefix: str = "") -> None:
    """Raise ValueError for a number outside the limits of its field, and for an output that is no path.

    None, lists and other strings have no limits.

    prefix: what the message puts before the field's name, such as "model." or "--".
    """
    for field in dataclasses.fields(settings):
        value, limits = getattr(settings, field.name), field.metadata.get("limits")
        if limits and isinstance(value, (int, float)) and not _contains(limits, value):
            raise ValueError(f"{prefix}{field.name} is {shortened(value)}, expected a number in {limits}.")
        if field.metadata.get("is_output"):
            # An option without a default is a positional argument, not a flag.
            is_positional = prefix == "--" and field.default is dataclasses.MISSING
            check_output(field.name if is_positional else f"{prefix}{field.name}", value)


def check_output(name: str, value: str) -> None:
    """Raise ValueError for an output that is a URL or a command, which would become a folder of that name.

    Also for a name that is not UTF-8: torch and safetensors would write there, but cannot read it again.
    """
    if match := COMMAND_OR_ADDRESS.match(value):
        remedy = "Pass such a path, and copy the result"
        if match[1].lower() == "file":
            remedy = f"Leave out {match[1]}://"
        raise ValueError(f"{name} is {value!r}, expected a path on a disk or a mounted file system. {remedy}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} is {value!r}, which is not UTF-8. Choose another name.") from error


def limits_of(settings: type, prefix: str = "") -> dict[str, str]:
    """Return the limits of a dataclass's numbers, and of the dataclasses in its fields, by dotted name."""
    found: dict[str, str] = {}
    types = get_type_hints(settings)
    for field in dataclasses.fields(settings):
        name = f"{prefix}{field.name}"
        if limits := field.metadata.get("limits"):
            found[name] = limits
        if dataclasses.is_dataclass(types[field.name]):
            found |= limits_of(types[field.name], f"{name}.")
    return found


def metadata_of(settings: type, name: str) -> Mapping[str, Any]:
    """Return the metadata of "section.field" in a dataclass of dataclasses, {} for an unknown name."""
    section, _, setting = name.partition(".")
    config = get_type_hints(settings).get(section)
    fields = {} if config is None else {field.name: field.metadata for field in dataclasses.fields(config)}
    return fields.get(setting, {})


def check_once(name: str, values: Iterable[Hashable]) -> None:
    """Raise ValueError, naming the list and the value, if a list has a value twice."""
    seen = set()
    for value in values:
        if value in seen:
            raise ValueError(f"{name}: {shortened(value)} is listed twice.")
        seen.add(value)


def check_range(name: str, value: float, limits: str) -> None:
    """Raise ValueError unless a value lies in an interval such as "[0, 1)"."""
    if not _contains(limits, value):
        raise ValueError(f"{name} is {shortened(value)}, expected a number in {limits}.")


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


def shortened(value: object) -> str:
    """Show a value in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _contains(limits: str, value: float) -> bool:
    match = LIMITS.fullmatch(limits)
    assert match, f"{limits!r} is no interval such as '[0, 1)'"
    low, high = _number(match[2]), _number(match[3])
    above = low <= value if match[1] == "[" else low < value
    below = value <= high if match[4] == "]" else value < high
    return above and below


def _number(text: str) -> float:
    """Read 12, 0.5, 1e6 or 2^63."""
    base, power, exponent = text.partition("^")
    return int(base) ** int(exponent) if power else float(text)
