"""The file with a probe's score, which fine-tuning writes and pretraining reads."""

import json
from pathlib import Path
from typing import Any

from megabert.files.atomic import write_atomically

FORMAT_VERSION = 1


def write_probe_score(path: Path, facts: dict[str, Any]) -> None:
    """Write the score file. facts: at least "score", 0 to 1, and "tokens", those that the checkpoint was trained on."""
    write_atomically(path, json.dumps({"format_version": FORMAT_VERSION, **facts}, indent=1).encode())


def read_probe_score(path: Path) -> dict[str, Any]:
    """Read a score file; one without a format version has version 1. Raises ValueError for a newer version."""
    facts = json.loads(path.read_text())
    if (version := facts.get("format_version", 1)) > FORMAT_VERSION:
        raise ValueError(
            f"{path}: has format version {version}, this MegaBERT reads up to {FORMAT_VERSION}. Update MegaBERT, or "
            "delete the file to leave its score out."
        )
    return facts
