"""Read JSON that may be damaged, or that gives a key twice, and write it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megabert.files.bounded_reads import open_file

# The largest JSON file of a checkpoint has a hundredth of this.
MAX_BYTES = 1 << 28


def parse_json(data: bytes | str, parse_constant: Callable[[str], Any] | None = None) -> Any:
    """Parse JSON. Raises ValueError for a key that appears twice: Python would take the last, and others the first."""
    if isinstance(data, str) and parse_constant is None:
        return _DECODER.decode(data)
    return json.loads(data, object_pairs_hook=_unique, parse_constant=parse_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} appears twice")
    return found


# Made once, which matters for a corpus of many lines.
_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError, naming the file, for anything else, and OSError if it cannot be read."""
    with open_file(path) as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: damaged: it has more than {MAX_BYTES >> 20} MiB.")
    try:
        value = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: it is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged: it holds a {type(value).__name__}, expected an object.")
    return value


def check_format_version(
    path: Path | str, content: dict[str, Any], newest: int, remedy: str, key: str = "format_version"
) -> int:
    """Return the version of a file's format, 1 if it names none under this key. Raises ValueError if it is unknown."""
    version = content.get(key, 1)
    if version not in range(1, newest + 1):
        known = "version 1" if newest == 1 else f"versions 1 to {newest}"
        raise ValueError(f"{path}: has {key} {version!r}, this MegaBERT reads {known}. {remedy}")
    return version


def write_json(path: Path, value: object) -> None:
    """Write a JSON file for people to read too. Where it may be read meanwhile, use write_atomically."""
    path.write_text(json.dumps(value, indent=1) + "\n")
