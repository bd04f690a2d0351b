"""Write and read JSON files of results with a version and a hash of their content, which reveals a change by hand."""

import json
from pathlib import Path
from typing import Any

from megabert.config.strict_yaml import read_small_file
from megabert.files.atomic import write_atomically
from megabert.files.hashing import json_sha256

VERSION, HASH = "format_version", "content_sha256"


def write_record(path: Path, record: dict[str, Any], version: int) -> None:
    """Write a record with its version and hash."""
    record = {VERSION: version, **record}
    text = json.dumps(record | {HASH: json_sha256(record)}, indent=1, allow_nan=False)
    write_atomically(path, text.encode())


def read_record(path: Path, version: int) -> dict[str, Any]:
    """Read a record that write_record wrote.

    Raises FileNotFoundError, and ValueError naming the file and what is wrong, for anything but an unchanged record of
    this version.
    """
    try:
        record = json.loads(read_small_file(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is damaged, not valid JSON") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}: is damaged, not a JSON object")
    if (found := record.get(VERSION, 1)) != version:
        raise ValueError(f"{path}: has {VERSION} {str(found)[:20]}, expected {version}")
    if record.pop(HASH, None) != json_sha256(record):
        raise ValueError(f"{path}: was changed since it was written: its content has another hash")
    return record
