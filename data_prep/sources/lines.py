"""Read the lines of text files in byte ranges, or from the beginning where a file is compressed or in UTF-16."""

from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from data_prep.sources import base
from data_prep.sources.base import DamagedError, InputSplit, Kind, LeftOut, ReadOptions, too_long, until_damaged
from data_prep.sources.remote import RemotePath, size_of
from data_prep.sources.text_encoding import (
    COMPRESSED,
    DAMAGED_ARCHIVE,
    READ_BYTES,
    UTF_8,
    Encoding,
    UndecodableError,
    decode,
    encoding_of,
    in_utf8,
    open_bytes,
)

REMOTE_FACTOR = 16
# The end of a byte range that covers a whole file: no file is as long.
WHOLE_FILE = 1 << 62


class Line(NamedTuple):
    """A line with its end. where: file and position; offset: in the file, decompressed; encoding: that of `data`."""

    where: str
    offset: int
    data: bytes
    encoding: Encoding

    def text(self) -> str:
        """Decode the line. Raises UndecodableError."""
        return decode(self.data, self.encoding, self.where, self.offset)


def list_line_splits(path: Path | RemotePath, kind: Kind, options: ReadOptions) -> list[InputSplit]:
    """Cut a file into byte ranges of equal size. A file that must be read from its beginning is one input split."""
    size = size_of(path)
    # A request of an object store costs as much time as some MB.
    split_bytes = base.INPUT_SPLIT_BYTES * (REMOTE_FACTOR if isinstance(path, RemotePath) else 1)
    if is_compressed(str(path)) or not encoding_of(str(path), options.encoding).has_plain_line_ends:
        return [InputSplit(kind, (str(path),), 0, WHOLE_FILE, size)]
    splits = []
    for start in range(0, size, split_bytes):
        stop = min(start + split_bytes, size)
        splits.append(InputSplit(kind, (str(path),), start, stop, stop - start))
    return splits


def is_compressed(path: str) -> bool:
    return path.lower().endswith(COMPRESSED)


def read_lines(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[Line]:
    """Yield the lines of a file from the first one that begins in the input split, to the end of the file."""
    return until_unreadable(_read_lines(split, options, left_out), split.paths[0], left_out)


def until_unreadable(items: Iterator[base.T], path: str, left_out: LeftOut) -> Iterator[base.T]:
    """Yield what is read from a file until its archive or its encoding is damaged."""

    def explain(error: Exception) -> DamagedError:
        if isinstance(error, UndecodableError):
            return error
        return DamagedError(f"{path}: truncated, or not the format that its name says: {error}. Download it again.")

    return until_damaged(items, (*DAMAGED_ARCHIVE, UndecodableError), explain, left_out)


def _read_lines(split: InputSplit, options: ReadOptions, left_out: LeftOut) -> Iterator[Line]:
    path = split.paths[0]
    encoding = encoding_of(path, options.encoding)
    with open_bytes(path) as file:
        if not encoding.has_plain_line_ends:
            yield from _bounded_lines(in_utf8(file, encoding, path), path, UTF_8, None, left_out)
        elif is_compressed(path):
            yield from _bounded_lines(file, path, encoding, None, left_out)
        else:
            offset = _skip_partial_line(file, split) if split.start else len(file.read(encoding.mark))
            if offset < split.stop:
                yield from _bounded_lines(file, path, encoding, offset, left_out)


def _bounded_lines(
    file: IO[bytes], path: str, encoding: Encoding, start: int | None, left_out: LeftOut
) -> Iterator[Line]:
    """Yield lines. One that is too long to be held in memory counts as damaged.

    start: where in the file the first line begins; None at the beginning of a stream whose lines are numbered.
    """
    offset = len(file.read(encoding.mark)) if start is None else start
    number = 0
    while data := file.readline(base.MAX_DOCUMENT_BYTES + 1):
        number += 1
        if number == 1 and start in (None, encoding.mark) and not data.endswith(b"\n") and b"\r" in data[:-1]:
            # One line, and so one document, would be all that the file has.
            left_out.damaged(
                DamagedError(f"{path}: lines end with a carriage return alone. Convert them: tr '\\r' '\\n'.")
            )
            return
        where = f"{path} at line {number}" if start is None else f"{path} at byte {offset}"
        if len(data) <= base.MAX_DOCUMENT_BYTES:
            yield Line(where, offset, data, encoding)
            offset += len(data)
            continue
        left_out.damaged(too_long(where, "Cut the line into documents."))
        offset += len(data)
        while data and not data.endswith(b"\n"):
            data = file.readline(READ_BYTES)
            offset += len(data)


def _skip_partial_line(file: IO[bytes], split: InputSplit) -> int:
    """Skip the rest of a line that began in an earlier byte range. Returns the offset of the next line.

    A line that continues beyond the byte range is not read to its end, since no line begins in this range.
    """
    offset = split.start - 1
    file.seek(offset)
    while offset < split.stop and (data := file.readline(READ_BYTES)):
        offset += len(data)
        if data.endswith(b"\n"):
            break
    return offset
