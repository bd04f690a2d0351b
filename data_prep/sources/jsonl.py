""".jsonl, .jsonl.gz and .jsonl.zst: a document a line, in one field."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from data_prep.sources.base import InputSplit, ReadOptions, bounded_lines, byte_ranges, no_field, not_text

READ_BYTES = 1 << 20
PACKED_BYTES = 1 << 14  # what it unpacks to is held in memory: of text some 100 kB


def list_input_splits(path: Path) -> list[InputSplit]:
    """Byte ranges of a plain file. A compressed one can only be read from its beginning: one unit."""
    size = path.stat().st_size
    if path.name.endswith((".gz", ".zst")):
        return [InputSplit("jsonl", (str(path),), 0, size, size)]
    return byte_ranges(str(path), size, "jsonl")


def read(unit: InputSplit, options: ReadOptions) -> Iterator[str]:
    path, key = unit.paths[0], options.text_key
    for place, line in _lines(unit):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} at {place}: not valid JSON: {error}") from error
        if not isinstance(row, dict) or key not in row:
            raise no_field(f"{path} at {place}", key, list(row) if isinstance(row, dict) else [])
        if not isinstance(row[key], str):
            raise not_text(f"{path} at {place}", key, repr(row[key])[:40])
        yield row[key]


def _lines(unit: InputSplit) -> Iterator[tuple[str, bytes]]:
    """Yield (place, line). A line belongs to the byte range in which it begins."""
    path = unit.paths[0]
    if path.endswith((".gz", ".zst")):
        yield from _decompressed(path)
        return
    with open(path, "rb") as file:
        place = unit.start
        if unit.start:
            file.seek(unit.start - 1)
            # The rest of a line that began before: its own range has it, and finds it too long if it is.
            place += len(file.readline()) - 1
        for line in bounded_lines(file, f"{path} at byte {place}"):
            if place >= unit.stop:
                return
            yield f"byte {place}", line
            place += len(line)


def _decompressed(path: str) -> Iterator[tuple[str, bytes]]:
    try:
        with open(path, "rb") as raw:
            unpacked: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else ZstdFile(raw)
            file = io.BufferedReader(unpacked, READ_BYTES)
            yield from ((f"line {n}", line) for n, line in enumerate(bounded_lines(file, path), 1))
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: cut short or not what its name says: {error}. Fetch it again.") from error


class ZstdFile(io.RawIOBase):
    """Reads all frames of a .zst. zstandard's own reader takes a file that is cut short for one that ends."""

    def __init__(self, raw: IO[bytes]):
        self._raw = raw
        self._frame: Any = None
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as possible. Raises EOFError within a frame, ZstdError for what is not one."""
        while not self._unpacked:
            self._packed = self._packed or self._raw.read(PACKED_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._unpacked = self._frame.decompress(self._packed)
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        size = min(len(buffer), len(self._unpacked))
        buffer[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size
