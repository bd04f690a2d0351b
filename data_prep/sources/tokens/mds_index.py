"""Read the index of a folder of MDS shards, which MDSWriter of mosaicml-streaming writes."""

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from data_prep.sources.base import DamagedError
from megabert.config.strict_yaml import build
from megabert.files.bounded_reads import read_bounded
from megabert.files.json_file import parse_json

INDEX = "index.json"
AGAIN = "Copy the folder again, or write it again."
# An entry has some 500 bytes, and a shard 64 MB by default.
MAX_INDEX_BYTES = 1 << 28
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class File:
    """A file of a shard: its path below the folder, its size, and its hashes by algorithm."""

    basename: str
    bytes: Count
    hashes: dict[str, str] | None = None


@dataclass(frozen=True)
class Shard:
    """An entry of the index. column_sizes: bytes of each column of a sample, None where they differ."""

    samples: Count
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[Count | None]
    raw_data: File
    zip_data: File | None = None
    compression: str | None = None

    def __post_init__(self):
        if not len(self.column_names) == len(self.column_encodings) == len(self.column_sizes):
            raise ValueError("column_names, column_encodings and column_sizes have different lengths.")


def is_mds(folder: Path) -> bool:
    """Return whether MDSWriter wrote this folder. A damaged index counts as one if shards are beside it."""
    path = folder / INDEX
    if not path.is_file():
        return False
    if any(folder.glob("*.mds")) or any(folder.glob("*.mds.*")):
        return True
    try:
        entries = _entries(path)
    except DamagedError:
        return False
    return bool(entries) and all(isinstance(entry, dict) and entry.get("format") == "mds" for entry in entries)


def read_shards(folder: Path) -> list[Shard]:
    """Return the shards of a folder. Raises DamagedError naming what is wrong in the index."""
    state = (folder / INDEX).stat()
    return _read_shards(folder / INDEX, state.st_mtime_ns, state.st_size)


# Cached, because every input split asks for them.
@functools.lru_cache(maxsize=4)
def _read_shards(path: Path, _mtime_ns: int, _size: int) -> list[Shard]:
    try:
        return [build(Shard, _known(entry), path, f"shards.{number}") for number, entry in enumerate(_entries(path))]
    except DamagedError:
        raise
    except ValueError as error:
        raise DamagedError(f"{error} {AGAIN}") from error


def _known(entry: Any) -> dict[str, Any]:
    """Leave out what other versions of the format have besides."""
    if not isinstance(entry, dict):
        return {}
    found = {field.name: entry[field.name] for field in fields(Shard) if field.name in entry}
    for name in ("raw_data", "zip_data"):
        if isinstance(file := found.get(name), dict):
            found[name] = {field.name: file[field.name] for field in fields(File) if field.name in file}
    return found


def _entries(path: Path) -> list[Any]:
    """Return the entries of an index. Raises DamagedError if it is not one."""
    try:
        index = parse_json(read_bounded(path, MAX_INDEX_BYTES))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path}: damaged: {error}. {AGAIN}") from error
    entries = index.get("shards") if isinstance(index, dict) else None
    if not isinstance(entries, list):
        raise DamagedError(f"{path}: damaged: it has no list of shards. {AGAIN}")
    return entries
