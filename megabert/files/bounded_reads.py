"""Read and copy files up to a limit, because a file from elsewhere may have no end."""

import io
import os
import stat
from collections.abc import Callable
from pathlib import Path


def open_file(path: Path) -> io.BufferedReader:
    """Open a file for reading. Raises ValueError for a named pipe, at which open() would wait for ever."""
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
    if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError(f"{path}: is a named pipe, expected a file. Remove it, and copy the file there.")
    return file


def has_file(path: Path) -> bool:
    """Tell whether there is a file that may be missing.

    Raises ValueError for a link to nothing: a copy of the hub's cache has them, and the file would count as missing.
    """
    if path.is_symlink() and not path.exists():
        raise ValueError(
            f"{path}: is a link to {os.readlink(path)}, where no file is. Copy the folder again with "
            "the files that its links mean (cp -rL), or remove the link."
        )
    return path.is_file()


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """Read a file. Raises ValueError if it has more bytes, which may never end."""
    with open_file(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise too_long(str(path), max_bytes)
    return data


def too_long(where: str, max_bytes: int) -> ValueError:
    return ValueError(f"{where}: has more than {max_bytes:,} bytes, the most that are expected. Is it the right file?")


class TooLongError(Exception):
    """More bytes arrived than were expected; there may be no end of them."""


class LimitedWriter(io.RawIOBase):
    """A file that passes on at most max_bytes. Raises TooLongError for more."""

    def __init__(self, write: Callable[[bytes], object], max_bytes: int):
        super().__init__()
        self._write, self._left = write, max_bytes

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self._left -= len(data)
        if self._left < 0:
            raise TooLongError
        self._write(data)
        return len(data)
