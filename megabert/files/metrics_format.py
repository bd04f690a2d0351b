"""Read metrics.jsonl, which has one JSON record per line, each with its step.

It has no format version: readers take the numbers whose names they know.
"""

import contextlib
from pathlib import Path
from typing import Any

from megabert.files.json_file import parse_json

METRICS = "metrics.jsonl"
# The limit of a number: JSON has integers that no float can hold.
LARGEST = 10**300


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, without lines that are not records: a crash may have cut them short."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError, RecursionError):
            record = parse_json(line)
            if isinstance(record, dict) and type(record.get("step")) is int and all(map(_is_number, record.values())):
                records.append(record)
    return records


def _is_number(value: object) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < LARGEST)
