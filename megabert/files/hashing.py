"""Hash files and values, and wait until files and folders are safely on disk."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from megabert.files.bounded_reads import open_file


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hexadecimal digits."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def texts_sha256(texts: Iterable[str]) -> str:
    """Return the SHA-256 of some texts in this order, as hexadecimal digits."""
    # The name of a file may be no UTF-8.
    return hashlib.sha256("\n".join(texts).encode(errors="surrogatepass")).hexdigest()


def json_sha256(value: object) -> str:
    """Return the SHA-256 of a value as JSON, whatever the order of its keys, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_and_sync(path: Path) -> tuple[int, str]:
    """Return the bytes and the SHA-256 of a file, which is on disk by then."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size, digest


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on disk: after this a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
