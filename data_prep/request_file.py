"""Record a command's options in the file `request`, so that finished work is not repeated; lock its output folder."""

import json
from collections.abc import Iterable
from pathlib import Path

from megabert.files.atomic import write_atomically
from megabert.files.hashing import file_sha256, json_sha256
from megabert.files.lock import Lock, LockHeldError, acquire

REQUEST = "request"
LOCK = "writing.lock"
NOTE_FORMAT = 1


def request_hash(**parts: object) -> str:
    """Hash everything that determines the results of a command. parts: plain values."""
    return json_sha256(parts)


def write_request(folder: Path, version: int, request: str, files: Iterable[str] = ()) -> None:
    """Record the request of a folder. version: the version of its files' format; files: those to compare later."""
    write_atomically(folder / REQUEST, _content(version, request, {name: file_sha256(folder / name) for name in files}))


def belongs_to_request(folder: Path, version: int, request: str) -> bool:
    """Return whether the files of a folder belong to this request and version, and are unchanged."""
    try:
        data = (folder / REQUEST).read_bytes()
        files = json.loads(data)["files"]
        found = {name: file_sha256(folder / name) for name in files}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # The request is missing, or another version wrote it.
        return False
    return data == _content(version, request, found)


def lock_output(out: Path, lock: str, command: str) -> Lock:
    """Lock a file below a folder that a command writes to. Raises ValueError if another command holds the lock."""
    (out / lock).parent.mkdir(parents=True, exist_ok=True)
    try:
        return acquire(out / lock)
    except LockHeldError as error:
        raise ValueError(
            f"{out}: another {command} is writing there, process {error.pid} on {error.host}. Wait for it to end, or "
            "choose another --out."
        ) from error


def note_request(out: Path, request_hash: str) -> None:
    """Record beside the shards what they are written for, so that it is known without a manifest too."""
    write_request(out, NOTE_FORMAT, request_hash)


def was_written_for(out: Path, request_hash: str) -> bool:
    return belongs_to_request(out, NOTE_FORMAT, request_hash)


def remove_request(folder: Path) -> None:
    """Mark the files of a folder as unfinished or unknown."""
    (folder / REQUEST).unlink(missing_ok=True)


def _content(version: int, request: str, files: dict[str, str]) -> bytes:
    return json.dumps({"format": version, "request": request, "files": files}).encode()
