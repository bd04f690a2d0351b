"""Write and read JSON files of results with a version and a hash of their content, which reveals a change by hand."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megabert.files.atomic import write_atomically
from megabert.files.hashing import json_sha256
from megabert.files.json_file import read_json

VERSION, HASH = "format_version", "content_sha256"


def write_record(path: Path, record: Mapping[str, object], version: int) -> None:
    """Write a record with its version and hash."""
    content = {VERSION: version, **record}
    text = json.dumps(content | {HASH: json_sha256(content)}, indent=1, allow_nan=False)
    write_atomically(path, text.encode())


def read_record(path: Path, version: int) -> dict[str, Any]:
    """Read a record that write_record wrote.

    Raises FileNotFoundError, and ValueError naming the file and what is wrong, for anything but an unchanged record of
    this version.
    """
    record = read_json(path)
    if (found := record.get(VERSION, 1)) != version:
        raise ValueError(f"{path}: has {VERSION} {str(found)[:20]}, expected {version}.")
    if record.pop(HASH, None) != json_sha256(record):
        raise ValueError(f"{path}: was changed since it was written: its content has another hash.")
    return record
