"""Write and read run.json and result.json, which describe a run and its final figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megabert.files.atomic import write_atomically
from megabert.files.json_file import check_format_version, read_json

RUN = "run.json"
RESULT = "result.json"
# Files without a format_version have the keys of version 1.
FORMAT_VERSION = 1


def write_run_file(path: Path, content: Mapping[str, object]) -> None:
    write_atomically(path, json.dumps({"format_version": FORMAT_VERSION, **content}, indent=1).encode())


def read_run_file(path: Path) -> dict[str, Any]:
    """Read run.json or result.json. Raises ValueError if it is damaged or newer than this MegaBERT."""
    content = read_json(path)
    check_format_version(path, content, FORMAT_VERSION, "Update MegaBERT.")
    return content
