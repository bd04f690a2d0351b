"""Records of the race: one JSON object per line, appended and synced to disk when a measurement has ended.

They have no format version: readers look for records with the kind and the settings that they need.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMITTED = Path(__file__).parent / "records"


def hash_of(value: Any) -> str:
    """Return a short hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class Records:
    """The records of an output folder, and those of the project."""

    def __init__(self, path: Path, committed: Path | None = COMMITTED):
        """path: the file to append to. committed: folder of the project's records; None: without them."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        # Each file once: path may be in that folder.
        for file in dict.fromkeys([*(sorted(committed.glob("*.jsonl")) if committed else ()), path]):
            self.rows += read_records(file)

    def find(self, **fields: Any) -> Iterator[dict[str, Any]]:
        """Yield the records that have these values, the oldest first."""
        return (row for row in self.rows if all(row.get(name) == value for name, value in fields.items()))

    def last(self, **fields: Any) -> dict[str, Any] | None:
        """Return the newest record with these values."""
        return next(iter(list(self.find(**fields))[::-1]), None)

    def append(self, row: dict[str, Any]) -> dict[str, Any]:
        """Add a record. When this returns, a crash cannot lose it."""
        line = json.dumps(row).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            if file.tell() and not ends_with_newline(self.path):
                # A killed command left half a line.
                line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        return row


def ends_with_newline(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete records of a file; half a line, which a killed command leaves, is none."""
    if not path.is_file():
        return
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row
