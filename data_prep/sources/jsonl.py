"""Read JSON Lines files, plain or compressed: one document per line, in one field."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import zstandard

from data_prep.sources.base import InputSplit, ReadOptions, bounded_lines, byte_ranges, no_field, not_text

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

READ_BYTES = 1 << 20
PACKED_BYTES = 1 << 14  # compressed bytes read at once; they decompress to some 100 kB of text, held in memory


def list_input_splits(path: Path) -> list[InputSplit]:
    """List byte ranges of a plain file. A compressed file is one input split, as it is read from its beginning."""
    size = path.stat().st_size
    if path.name.endswith((".gz", ".zst")):
        return [InputSplit("jsonl", (str(path),), 0, size, size)]
    return byte_ranges(str(path), size, "jsonl")


def read(split: InputSplit, options: ReadOptions) -> Iterator[str]:
    path, key = split.paths[0], options.text_key
    for position, line in _lines(split):
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} at {position}: not valid JSON: {error}") from error
        if not isinstance(row, dict) or key not in row:
            raise no_field(f"{path} at {position}", key, list(row) if isinstance(row, dict) else [])
        if not isinstance(row[key], str):
            raise not_text(f"{path} at {position}", key, repr(row[key])[:40])
        yield row[key]


def _lines(split: InputSplit) -> Iterator[tuple[str, bytes]]:
    """Yield (position, line). A line belongs to the byte range in which it begins."""
    path = split.paths[0]
    if path.endswith((".gz", ".zst")):
        yield from _decompressed(path)
        return
    with open(path, "rb") as file:
        offset = split.start
        if split.start:
            file.seek(split.start - 1)
            # Skip the rest of a line that began in an earlier range: that range reads it and checks its length.
            offset += len(file.readline()) - 1
        for line in bounded_lines(file, f"{path} at byte {offset}"):
            if offset >= split.stop:
                return
            yield f"byte {offset}", line
            offset += len(line)


def _decompressed(path: str) -> Iterator[tuple[str, bytes]]:
    try:
        with open(path, "rb") as raw:
            unpacked = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else ZstdFile(raw)
            file = io.BufferedReader(unpacked, READ_BYTES)
            yield from ((f"line {n}", line) for n, line in enumerate(bounded_lines(file, path), 1))
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(
            f"{path}: truncated, or not the format that its name says: {error}. Download it again."
        ) from error


class ZstdFile(io.RawIOBase):
    """Reads all frames of a .zst file. Notices truncation, which the reader of zstandard takes for the end."""

    def __init__(self, raw: IO[bytes]):
        self._raw = raw
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._packed = self._unpacked = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill a buffer as far as possible. Raises EOFError for a truncated file, ZstdError for other damage."""
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
        view = memoryview(buffer).cast("B")
        size = min(len(view), len(self._unpacked))
        view[:size] = self._unpacked[:size]
        self._unpacked = self._unpacked[size:]
        return size
