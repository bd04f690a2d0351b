"""The format of metrics.jsonl: one JSON record per line, each with its step."""

import contextlib
import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl, without lines that a crash or a power failure cut short."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records
