"""Whole shards on the local disk: for what cannot be read in part.

One folder serves all processes of a machine, goes by content, and holds no more than it may, whoever else fills it; while more
arrive at once than there is room for, as much more.
"""

import errno
import fcntl
import functools
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

THREADS = 16  # of a process, for all that it reads ahead: a store answers no faster to more
MOST_EVICTIONS = 100  # in a row, between fetching a shard and opening it: a cache that is too small by far
# A disk that is full or closed to us does not mend itself while we wait.
NOT_THE_NETWORK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class CacheOptions(NamedTuple):
    """folder: for shards that cannot be read in part; max_bytes: what it may hold, oldest out first."""

    folder: Path = Path("~/.cache/megabert/shards")
    max_bytes: int = 64 << 30


class Expected(NamedTuple):
    """What the manifest says of a shard."""

    bytes: int
    sha256: str


class WrongContentError(Exception):
    """A file arrived, but it is not the one that the manifest describes."""


class Fetched:
    """Files that arrive whole: each is kept in the cache, and read there."""

    def __init__(self, key: str, cache: CacheOptions):
        self._key = hashlib.sha256(key.encode()).hexdigest()[:16]
        self._cache = ShardCache(cache.folder.expanduser(), cache.max_bytes)

    def read(self, name: str, offset: int, size: int, fetch: Callable[[Path], None], expected: Expected) -> bytes:
        for _ in range(MOST_EVICTIONS):
            path = self._cache.get(self._key_of(name, expected), fetch, expected)
            try:
                with open(path, "rb") as file:
                    return os.pread(file.fileno(), size, offset)
            except FileNotFoundError:  # another process made room between the two
                continue
        raise ValueError(f"{self._cache.folder}: too small for the shards that are read at once. Raise data.cache_gb.")

    def prefetch(self, name: str, fetch: Callable[[Path], None], expected: Expected) -> None:
        """Fetch a file in the background. An error is not lost: read() meets it again."""
        threads(os.getpid()).submit(self._cache.get, self._key_of(name, expected), fetch, expected)

    def forget(self, name: str, expected: Expected) -> bool:
        path = self._cache.folder / self._key_of(name, expected)
        there = path.exists()
        path.unlink(missing_ok=True)
        return there

    def _key_of(self, name: str, expected: Expected) -> str:
        """Of the source and the content: shards written anew are other files."""
        return f"{self._key}-{expected.sha256[:16]}-{name}"


@functools.cache
def threads(process: int) -> ThreadPoolExecutor:
    """The threads of one process that read ahead: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")


class ShardCache:
    """Whole shards on the local disk, shared by the processes of a machine; the least recently read go first."""

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes

    def get(self, name: str, fetch: Callable[[Path], None], expected: Expected) -> Path:
        """Find a file, fetching it if it is not here.

        Raises WrongContentError if what arrives is not as expected, ValueError if the cache cannot be written.
        """
        path = self.folder / name
        if self._is_here(path, expected.bytes):
            return path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / f"{name}.lock"):
                if not self._is_here(path, expected.bytes):  # else another process was faster
                    self._fetch(path, fetch, expected)
        except OSError as mistake:
            if mistake.errno in NOT_THE_NETWORK or not self.folder.is_dir():
                raise ValueError(
                    f"{self.folder}: cannot keep shards there: {mistake.strerror}. Name another folder with data.cache_dir, or "
                    "keep less with data.cache_gb."
                ) from mistake
            raise
        return path

    def _fetch(self, path: Path, fetch: Callable[[Path], None], expected: Expected) -> None:
        arriving = path.with_name(f"{path.name}.part")
        try:
            with _locked(self.folder / "room.lock"):  # one process at a time counts, and takes its place
                self._make_room(expected.bytes)
                with open(arriving, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(1, expected.bytes))
            fetch(arriving)
            _check_arrived(arriving, expected)
            os.replace(arriving, path)
        finally:
            arriving.unlink(missing_ok=True)
        with _locked(self.folder / "room.lock"):
            self._make_room(0, (".tar",))  # where more arrived at once than there is room for

    @staticmethod
    def _is_here(path: Path, size: int) -> bool:
        try:
            here = path.stat().st_size == size
            if here:
                os.utime(path)  # read just now
            return here
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _make_room(self, needed: int, counted: tuple[str, ...] = (".tar", ".part")) -> None:
        held = sorted((entry for entry in os.scandir(self.folder) if entry.name.endswith(counted)), key=_read_at)
        total = sum(_size(entry) for entry in held)
        for entry in (entry for entry in held if entry.name.endswith(".tar")):
            if total + needed <= self.max_bytes:
                return
            total -= _size(entry)
            Path(entry.path).unlink(missing_ok=True)


def _read_at(entry: os.DirEntry) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(entry: os.DirEntry) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # another process made room too
        return 0


def _check_arrived(path: Path, expected: Expected) -> None:
    with open(path, "rb") as file:
        found = Expected(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())
    if found != expected:
        raise WrongContentError(
            f"{found.bytes} bytes arrived with another hash than the manifest's, for {expected.bytes}"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process, however it ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
