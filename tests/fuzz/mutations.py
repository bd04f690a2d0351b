"""Make hostile variants of bytes, of nested values and of files."""

import copy
import json
import math
from pathlib import Path
from random import Random
from typing import Any

NUMBERS = [0, -1, 1, 2, 3, 7, 10**6, 10**12, 10**21, -(10**21), 0.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf]
STRINGS = [
    "",
    " ",
    "x",
    "null",
    "auto",
    "none",
    "/nonexistent",
    "é\u0300",
    "a\nb",
    "../..",
    "x" * 5000,
    "0",
    "1e3",
    "9" * 400,
]
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
    """Mutate a JSON file as a value, as a text, or its bytes."""
    choice = random.random()
    if choice < 0.3:
        return mutate_bytes(data, random)
    if choice < 0.4:
        return hostile_json(data, random)
    return json.dumps(mutate_tree(json.loads(data), random)).encode()


def hostile_json(data: bytes, random: Random) -> bytes:
    """Write the same JSON with a key twice, in another encoding, nested too deep, or around what json.dumps avoids."""
    text = data.decode()
    value = json.loads(text)
    if isinstance(value, dict) and value and random.random() < 0.5:
        key = random.choice(list(value))
        first = json.dumps({key: hostile_value(random)})[1:-1]
        return ("{" + first + "," + text.lstrip().removeprefix("{")).encode()
    depth = random.choice([200, 900, 100_000])
    return random.choice(
        [
            text.encode("utf-16"),
            b"\xef\xbb\xbf" + data,
            ("[" * depth + text + "]" * depth).encode(),
            ('{"x": ' * depth + text + "}" * depth).encode(),
            data + data,
            b"1" * 5000,
            b'"\\ud800"',
            data.replace(b"1", b"1" * 400, 1),
        ]
    )


def hostile_yaml(data: bytes, random: Random) -> tuple[bytes, str]:
    """Write a YAML file with one construct that its reader must refuse; returns it and what was done."""
    lines = data.decode().splitlines()
    at = random.choice([index for index, line in enumerate(lines) if not line.endswith(":") and ": " in line])
    key, _, value = lines[at].partition(": ")
    refused = {
        "a key twice": [lines[at], lines[at]],
        "a date": [f"{key}: 2026-01-31"],
        "a tag": [f"{key}: !!binary aGVsbG8="],
        "a Python tag": [f"{key}: !!python/object/apply:os.system [true]"],
        "an alias of itself": [f"{key}: &a [*a]"],
        "an unknown alias": [f"{key}: *nowhere"],
        "900 nested maps": [f"{key}: {'{x: ' * 900}1{'}' * 900}"],
        "a bomb": [f"{key}: [&a [x, x, x, x, x, x, x, x], &b [{'*a, ' * 99}1], &c [{'*b, ' * 99}1], [{'*c, ' * 99}1]]"],
        "a second document": [lines[at], "---"],
        "a key that is a number": [f"{key}:", f"{' ' * 8}1: 2"],
        "not a number": [f"{key}: .nan"],
        "infinity": [f"{key}: -.inf"],
        "a list of itself": [f"{key}: [{value}, [{value}]]"],
    }
    what = random.choice(list(refused))
    return "\n".join([*lines[:at], *refused[what], *lines[at + 1 :], ""]).encode(), what


def damage_file(path: Path, random: Random) -> str:
    """Damage a file, or put nothing, a folder, a link, zeros or another file in its place; returns what was done."""
    data = path.read_bytes()
    siblings = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    choice = random.randrange(16)
    path.unlink()
    if choice == 0:
        return "removed"
    if choice == 1:
        path.mkdir()
        return "a folder"
    if choice == 2:
        target = random.choice([path.name, "nowhere", "."])
        path.symlink_to(target)
        return f"a link to {target}"
    if choice == 3 and siblings:
        sibling = random.choice(siblings)
        path.write_bytes(sibling.read_bytes())
        return f"the bytes of {sibling.name}"
    if choice in (4, 5):
        # What a crash of the machine leaves of a file that was not flushed.
        path.write_bytes(b"" if choice == 4 else bytes(len(data)))
        return "empty" if choice == 4 else "zeros"
    if path.suffix == ".json" and choice < 13:
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
