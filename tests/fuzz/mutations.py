"""Make hostile variants of bytes, of nested values and of files."""

import copy
import json
import math
from pathlib import Path
from random import Random
from typing import Any

NUMBERS = [0, -1, 1, 2, 3, 7, 10**6, 10**12, 10**21, -(10**21), 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf]
STRINGS = ["", " ", "x", "null", "auto", "none", "/nonexistent", "é\u0300", "a\nb", "../..", "x" * 5000, "0", "1e3"]
OTHERS: list[Any] = [None, True, False, [], {}, [[]], [None], {"x": None}, {"class_path": "a.B"}, ["a.B"]]
PIECES = [
    b"",
    b"\x00",
    b"\xff",
    b"\n",
    b"{",
    b"}",
    b"[",
    b'"',
    b":",
    b"&a ",
    b"*a",
    b"!!binary ",
    b"\xef\xbb\xbf",
    b"\t",
]


def hostile_value(random: Random) -> Any:
    """A value that hardly fits where it is put."""
    return copy.deepcopy(random.choice(random.choice([NUMBERS, STRINGS, OTHERS])))


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Flip, cut, repeat, swap or insert bytes, once to three times."""
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(data) + 1)
        to = min(len(data), at + random.choice([1, 1, 2, 8, 100]))
        choice = random.randrange(6)
        if choice == 0 and data:
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
        elif choice == 1:
            data = data[:at]
        elif choice == 2:
            data = data[:at] + data[to:]
        elif choice == 3:
            data = data[:to] + data[at:to] + data[to:]
        elif choice == 4:
            data = data[:at] + random.choice(PIECES) + data[at:]
        else:
            data = data[:at] + random.randbytes(random.choice([1, 4, 64])) + data[to:]
    return data


def mutate_tree(value: Any, random: Random) -> Any:
    """Replace, remove, rename, repeat or add one part of nested dicts and lists; returns a new value."""
    value = copy.deepcopy(value)
    places = [(container, key) for container, key in _places(value)]
    if not places:
        return hostile_value(random)
    container, key = random.choice(places)
    choice = random.randrange(5)
    if choice <= 1:
        container[key] = hostile_value(random)
    elif choice == 2 and isinstance(container, dict):
        container[random.choice([f"{key}s", str(key).upper(), "class_path", "unknown"])] = container.pop(key)
    elif choice == 3:
        del container[key]
    elif isinstance(container[key], (int, float)) and not isinstance(container[key], bool):
        container[key] = container[key] * random.choice([-1, 0, 2, 0.5, 1e9])
    else:
        container[key] = [container[key], container[key]]
    return value


def mutate_json(data: bytes, random: Random) -> bytes:
    """Mutate a JSON file as a value, or its bytes."""
    if random.random() < 0.3:
        return mutate_bytes(data, random)
    return json.dumps(mutate_tree(json.loads(data), random)).encode()


def damage_file(path: Path, random: Random) -> str:
    """Damage a file, or remove it, or put a folder or an empty file in its place; returns what was done."""
    data = path.read_bytes()
    choice = random.randrange(8)
    path.unlink()
    if choice == 0:
        return "removed"
    if choice == 1:
        path.mkdir()
        return "a folder"
    if choice == 2:
        path.write_bytes(b"")
        return "empty"
    if path.suffix == ".json" and choice < 6:
        path.write_bytes(mutate_json(data, random))
        return "other JSON"
    path.write_bytes(mutate_bytes(data, random))
    return "other bytes"


def leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """The values at the ends of nested dicts, by dotted name; lists are values."""
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {name: leaf for key, part in value.items() for name, leaf in leaves(part, f"{prefix}{key}.").items()}


def _places(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, dict):
        keys: list[Any] = list(value)
    elif isinstance(value, list):
        keys = list(range(len(value)))
    else:
        return []
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key])]
