"""Read JSON files that may be damaged."""

import json
from pathlib import Path
from typing import Any

MAX_BYTES = 1 << 28  # a hundred times what a checkpoint's largest JSON file has


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError, naming the file, for anything else, and OSError if it cannot be read."""
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path}: damaged: it has more than {MAX_BYTES >> 20} MiB.")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: it is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: damaged: it holds a {type(value).__name__}, expected an object.")
    return value
