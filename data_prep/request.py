"""Record the request of a command, so that the same command finds and reuses its results."""

import hashlib
import json
from pathlib import Path

from megabert.files.atomic import write_atomically

REQUEST = "request"


def request_hash(**parts: object) -> str:
    """Hash everything that determines the results of a command. parts: plain values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_request(folder: Path, version: int, request: str) -> None:
    """Record the request that the files of a folder belong to. version: of the format of these files."""
    write_atomically(folder / REQUEST, _content(version, request))


def belongs_to_request(folder: Path, version: int, request: str) -> bool:
    """Whether the files of a folder belong to this request and have this format version."""
    path = folder / REQUEST
    return path.is_file() and path.read_bytes() == _content(version, request)


def remove_request(folder: Path) -> None:
    """Mark the files of a folder as unfinished or unknown."""
    (folder / REQUEST).unlink(missing_ok=True)


def _content(version: int, request: str) -> bytes:
    return json.dumps({"format": version, "request": request}).encode()
