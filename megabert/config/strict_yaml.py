"""Read YAML files into plain data and strictly typed dataclasses."""

import dataclasses
import functools
import json
import re
import types
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from megabert.config.cli import nearest
from megabert.config.settings import shortened
from megabert.files.bounded_reads import read_bounded
from megabert.process.error_text import one_line

T = TypeVar("T")

# A string that a file may also give as an integer: labels: [0, 1] are the names "0" and "1".
Name = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]

# Bounds for files of settings, far above any real one.
MAX_FILE_BYTES = 1_000_000
MAX_VALUES = 100_000
# Deeper files than this are refused. pydantic reads 200 levels.
MAX_DEPTH = 100

TAG = "tag:yaml.org,2002:"
PLAIN = {TAG + name for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
# PyYAML follows YAML 1.1, where 5e-5 is a string, 010 is eight and 1:30 is ninety. Here 5e-5 is a number, and the other
# two are strings.
INT = re.compile(r"[-+]?(0|[1-9][0-9_]{0,99})$")
FLOAT = re.compile(
    r"([-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"
)
# pydantic's error type -> what was expected, in words and with the name of the limit.
LIMIT_ERRORS = {
    "greater_than": ("more than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
# First word of pydantic's error type -> what was expected.
EXPECTED = {
    "int": "an integer",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "a string",
    "tuple": "a list",
    "list": "a list",
    "dict": "keys and values",
    "dataclass": "keys and values",
}


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of keys and values into dicts, lists, strings, numbers, booleans and None.

    An empty file gives {}. Raises ValueError, in one line with the file's name, for invalid YAML and for valid YAML
    that is mostly a slip: duplicate keys, keys that are not strings, aliases inside their own anchor, dates, explicit
    tags, a file without keys, and a file of more than MAX_FILE_BYTES or, with its aliases replaced, MAX_VALUES or
    MAX_DEPTH levels.
    """
    try:
        data = _load(read_small_file(path))
    except _RefusedError as error:
        raise ValueError(f"{path}, line {error.line}: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {one_line(error)}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"{path}: is {shortened(data)}, expected keys and values.")
    return data


def read_small_file(path: Path) -> bytes:
    """Read a file of settings. Raises ValueError if it has more than MAX_FILE_BYTES."""
    return read_bounded(path, MAX_FILE_BYTES)


def parse_value(text: str) -> Any:
    """Read the value of a flag as read_yaml reads values; a text that is not valid YAML is a string."""
    try:
        return _load(text.encode())
    except (_RefusedError, yaml.YAMLError, RecursionError):
        return text


def read_dataclass(kind: type[T], path: Path) -> T:
    """Read a YAML file into a dataclass. Raises ValueError as read_yaml and build do."""
    return build(kind, read_yaml(path), path)


def build(kind: type[T], data: dict[str, Any], path: str | Path, key: str = "") -> T:
    """Build a dataclass, and the dataclasses nested in it, from data that read_yaml returned, without converting types.

    key: dotted key of `data` in the file, for error messages. A ValueError that a __post_init__ raises must begin with
    the name of a field: the message puts the file and the key in front. Raises ValueError, in one line, naming file and
    key, for an unknown key (with the nearest known one), a missing key, and a value of another type.
    """
    try:
        # pydantic's strict mode takes a list for a tuple only in JSON.
        return _adapter(kind).validate_json(json.dumps(data), strict=True, extra="forbid")
    except ValidationError as error:
        errors = error.errors()
    _refuse_first(errors, kind, path, key)


def check_value(kind: Any, value: object, path: str | Path, key: str) -> None:
    """Raise ValueError, in one line that names file and key, unless a value has a type such as list[Part] | int.

    value: as read_yaml returns it. path: "" if it comes from a flag, which is then the key. Dataclasses inside are
    checked as build does; nothing is imported by name.
    """
    if isinstance(value, list):
        kind = next((part for part in _alternatives(kind) if get_origin(part) is list), kind)
    try:
        _adapter(kind).validate_json(json.dumps(value), strict=True, extra="forbid")
    except ValidationError as error:
        errors = error.errors()
    else:
        return
    _refuse_first(errors, kind, path, key)


def is_valid(kind: Any, value: object) -> bool:
    """Return whether a value has a type, as check_value checks it."""
    try:
        check_value(kind, value, "", "")
    except ValueError:
        return False
    return True


def _refuse_first(errors: list[Any], kind: Any, path: str | Path, key: str) -> NoReturn:
    """Raise ValueError for the first of pydantic's errors, or for an unknown key: a misspelt key is also missing."""
    first = min(errors, key=lambda found: found["type"] != "unexpected_keyword_argument")
    loc = _without_tags(kind, first["loc"])
    if first["type"] == "missing" and isinstance(loc[-1], int):
        # A list that is too short, such as one number of two, lacks its last items, each with an error.
        loc, wanted = loc[:-1], 1 + max(error["loc"][-1] for error in errors if error["loc"][:-1] == first["loc"][:-1])
        first = first | {"type": "too_short", "ctx": {"min_length": wanted}}
        errors = [first | {"loc": first["loc"][:-1]}]
    place = ".".join([*([key] if key else []), *map(str, loc)])
    if first["type"] == "unexpected_keyword_argument":
        *above, name = loc
        check_keys(path, [str(name)], _known_keys(kind, above), place.rpartition(".")[0])
    if first["type"] == "json_invalid":
        # pydantic's reader refuses two things that Python's writes.
        deep = "recursion" in first["ctx"]["error"]
        fault = "is nested too deep." if deep else "holds half of a surrogate pair, such as \\ud800, expected text."
        raise ValueError(f"{_where(path)}{place}{' ' if place else ''}{fault}")
    if first["type"] == "missing":
        raise ValueError(f"{_where(path)}lacks {place}.")
    if first["type"] == "value_error":
        raise ValueError(f"{_where(path)}{place}{'.' if place else ''}{first['ctx']['error']}")
    # A union has one error for each of its types.
    at_place = [error for error in errors if _without_tags(kind, error["loc"]) == loc]
    expected, value = " or ".join(dict.fromkeys(map(_expected, at_place))), first["input"]
    raise ValueError(f"{_where(path)}{place} is {shortened(value)}, expected {expected}.{_remedy(value, expected)}")


def _where(path: str | Path) -> str:
    return f"{path}: " if path else ""


def _expected(error: ErrorDetails) -> str:
    """Say in words what one of pydantic's errors expected."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "literal_error":
        return context["expected"].replace("'", "")
    if kind in LIMIT_ERRORS:
        words, name = LIMIT_ERRORS[kind]
        return f"{words} {context[name]}"
    if kind in ("too_short", "too_long"):
        return f"{context.get('min_length') or context['max_length']} values"
    if kind == "string_pattern_mismatch":
        return f"a name such as {context['pattern']}"
    return EXPECTED[kind.partition("_")[0]]


def _alternatives(kind: Any) -> list[Any]:
    """Return the types that a union allows besides None, or the type itself."""
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    parts = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return [part for part in parts if part is not type(None)]


def _without_tags(kind: Any, loc: Sequence[int | str]) -> list[int | str]:
    """Remove from pydantic's location the items that name a type of a union."""
    if not loc:
        return []
    parts = _alternatives(kind)
    if len(parts) > 1:
        containers = [part for part in parts if get_args(part) and get_origin(part) is not Literal]
        return _without_tags(containers[0], loc[1:]) if containers else []
    if dataclasses.is_dataclass(parts[0]):
        hints = get_type_hints(parts[0], include_extras=True)
        return [loc[0], *(_without_tags(hints[loc[0]], loc[1:]) if loc[0] in hints else loc[1:])]
    elements = [part for part in get_args(parts[0]) if part is not Ellipsis]
    return [loc[0], *_without_tags(elements[-1], loc[1:])] if elements else list(loc)


def check_keys(path: str | Path, keys: Iterable[str], known: Iterable[str], key: str = "") -> None:
    """Raise ValueError for a key that is not among the known ones, naming the nearest. key: the dotted key above."""
    known, above = sorted(known), f"{key}." if key else ""
    for name in keys:
        if name not in known:
            expected = f" Expected some of {', '.join(known)}."
            raise ValueError(f"{_where(path)}unknown key {above}{name}.{nearest(name, known, above, expected)}")


@functools.cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    return TypeAdapter(kind)


def _known_keys(kind: Any, place: list[Any]) -> list[str]:
    """Return the keys of the dataclass at a place inside another: field names, keys of dicts and indices of lists."""
    while get_origin(kind) in (Annotated, Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if not place:
        return [field.name for field in dataclasses.fields(kind) if field.init]
    if dataclasses.is_dataclass(kind):
        return _known_keys(get_type_hints(kind)[place[0]], place[1:])
    element = [part for part in get_args(kind) if part is not Ellipsis][-1]
    return _known_keys(element, place[1:])


def _remedy(value: object, expected: str) -> str:
    """Return a sentence about quotes, where they explain a value of a wrong type."""
    if expected == "a string" and isinstance(value, bool):
        return " YAML reads a bare yes, no, on, off, true or false as a boolean: quote it."
    if expected == "a string" and isinstance(value, (int, float)):
        return " Quote it."
    if expected in ("a number", "an integer") and isinstance(value, str) and (FLOAT.match(value) or INT.match(value)):
        return " Remove the quotes."
    return ""


class _RefusedError(Exception):
    """Valid YAML that is refused. line: from 1."""

    def __init__(self, message: str, line: int):
        super().__init__(message)
        self.line = line


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, stricter as read_yaml documents."""

    def __init__(self, stream: bytes):
        super().__init__(stream)
        # The anchors of the nodes that are being read.
        self.open_anchors: list[str | None] = []

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self.open_anchors:
                _refuse(event, f"alias *{event.anchor} is inside its own anchor.")
            return super().compose_node(parent, index)
        if event.tag is not None:
            _refuse(event, f"tag {event.tag}: explicit tags are not supported.")
        self.open_anchors.append(event.anchor)
        node = super().compose_node(parent, index)
        assert node is not None, f"YAML made no node of the event {event}"
        self.open_anchors.pop()
        if node.tag not in PLAIN:
            _refuse(node, f"YAML reads {node.value} as a {str(node.tag).removeprefix(TAG)}: quote it.")
        if isinstance(node, yaml.MappingNode):
            _check_mapping(node)
        return node


def _load(data: bytes) -> Any:
    """Load YAML with the strict loader. Raises yaml.YAMLError, RecursionError and _RefusedError."""
    loader = _StrictLoader(data)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        values, depth = _measure(node, {})
        if values > MAX_VALUES:
            _refuse(node, f"aliases make more than {MAX_VALUES:,} values.")
        if depth > MAX_DEPTH:
            _refuse(node, f"is nested {depth} levels deep, expected at most {MAX_DEPTH}.")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Count the values below a node and its levels, those of an alias each time that it is used. known: by node."""
    if id(node) not in known:
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        else:
            parts = node.value if isinstance(node, yaml.SequenceNode) else []
        found = [_measure(part, known) for part in parts]
        known[id(node)] = 1 + sum(count for count, _ in found), 1 + max((depth for _, depth in found), default=0)
    return known[id(node)]


def _check_mapping(node: yaml.MappingNode) -> None:
    """Raise _RefusedError for a key that is not a string, and for a duplicate key."""
    found: set[str] = set()
    for key, _ in node.value:
        if key.tag == f"{TAG}merge":
            continue
        if key.tag != f"{TAG}str":
            shown = key.value if isinstance(key, yaml.ScalarNode) else "[...] or {...}"
            _refuse(key, f"key {shown} is not a string: quote it.")
        if key.value in found:
            _refuse(key, f"duplicate key {key.value}.")
        found.add(key.value)


def _refuse(at: yaml.Node | yaml.Event, message: str) -> NoReturn:
    raise _RefusedError(message, at.start_mark.line + 1)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag not in (f"{TAG}int", f"{TAG}float")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(f"{TAG}float", FLOAT, list("-+0123456789."))
_StrictLoader.add_implicit_resolver(f"{TAG}int", INT, list("-+0123456789"))
