"""Cache whole shards on a local disk, by content hash, for all processes of a machine, up to a number of bytes.

blocks.py keeps parts of shards in the same folder, under the same limit.
"""

import errno
import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from megabert.files.atomic import new_file
from megabert.files.disk import as_user_error
from megabert.files.hashing import file_sha256
from megabert.files.lock import acquire, lock_folder

# Threads of one process for all its reads. More do not make an object store faster.
READ_AHEAD_THREADS = 16
# A shard may be evicted between fetching and opening it. This many times in a row mean that the cache is too small.
MAX_EVICTIONS = 100
# The suffixes of files in the folder: whole shards, parts of shards, and what is being written.
SHARD, BLOCK, PART = ".tar", ".block", ".part"
# The bytes of all of them, as far as blocks.py has counted.
USED = "blocks.used"
# A block is written at once, so a process that began one this many seconds ago was killed.
ABANDONED_S = 600.0
# Errors that waiting does not help against: a full disk, or one that we may not write to.
PERMANENT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


class CacheOptions(NamedTuple):
    """folder: for shards, and parts of them. max_bytes: its size limit; what was read least recently goes first.

    patience_s: how long to try again where shards come from a store that fails.
    """

    folder: Path = Path("~/.cache/megabert/shards")
    max_bytes: int = 64 << 30
    patience_s: float = 900.0


class ExpectedFile(NamedTuple):
    """The size and hash that the manifest gives for a shard."""

    bytes: int
    sha256: str


class WrongContentError(Exception):
    """A file arrived whose size or hash differs from the manifest's."""


class WholeFileReader:
    """Reads parts of files that can only be fetched whole, by way of the cache."""

    def __init__(self, location: str, cache: CacheOptions):
        """location: the URL or command that the files come from; equal names of other locations are other files."""
        self._location = hashlib.sha256(location.encode()).hexdigest()[:16]
        self._cache = ShardCache(cache.folder.expanduser(), cache.max_bytes)

    def read(self, name: str, offset: int, size: int, fetch: Callable[[Path], None], expected: ExpectedFile) -> bytes:
        """Read bytes [offset, offset + size) of a file. fetch: downloads the file to a path.

        Raises what ShardCache.get raises, and ValueError if other processes evict the file again and again.
        """
        for _ in range(MAX_EVICTIONS):
            path = self._cache.get(self._cache_name(name, expected), fetch, expected)
            try:
                with open(path, "rb") as file:
                    return os.pread(file.fileno(), size, offset)
            except FileNotFoundError:
                # Another process has evicted the file since it was fetched.
                continue
        raise ValueError(f"{self._cache.folder}: too small for the shards that are read at once. Raise data.cache_gb.")

    def prefetch(self, name: str, fetch: Callable[[Path], None], expected: ExpectedFile) -> None:
        """Fetch a file in the background. Errors are ignored here, because read() runs into them again."""
        read_ahead_pool(os.getpid()).submit(self._cache.get, self._cache_name(name, expected), fetch, expected)

    def discard(self, name: str, expected: ExpectedFile) -> bool:
        """Remove a file from the cache. Returns whether it was there."""
        path = self._cache.folder / self._cache_name(name, expected)
        was_cached = path.exists()
        path.unlink(missing_ok=True)
        return was_cached

    def _cache_name(self, name: str, expected: ExpectedFile) -> str:
        """Name a cached file by location and content, so that a rewritten shard is another file.

        The content is hashed on arrival, so files in the cache need no format version either.
        """
        return f"{self._location}-{expected.sha256[:16]}-{name}"


@functools.cache
def read_ahead_pool(process: int) -> ThreadPoolExecutor:
    """Return the read-ahead threads of a process. The parent's threads do not survive a fork, so each has its own."""
    return ThreadPoolExecutor(READ_AHEAD_THREADS, thread_name_prefix="read-ahead")


# The caches of webdataset and fsspec do not fit: both name a file by its URL, check no hash, and let every process
# download its own copy; webdataset enforces its size limit at most every 30 seconds, and fsspec has no limit.
class ShardCache:
    """A folder of whole shards that the processes of a machine share.

    It holds at most max_bytes, and more only while the downloads in flight need more. The least recently read shards
    are evicted first.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes

    def get(self, name: str, fetch: Callable[[Path], None], expected: ExpectedFile) -> Path:
        """Return the path of a cached file, after fetching it if necessary; one process at a time fetches a file.

        Raises WrongContentError if the fetched file is not the expected one, ValueError if the cache cannot be written,
        DiskError if its disk is full.
        """
        path = self.folder / name
        if self._is_cached(path, expected.bytes):
            return path
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _file_lock(self.folder / f"{name}.lock"):
                # While this process waited for the lock, another one may have fetched the file.
                if not self._is_cached(path, expected.bytes):
                    self._fetch(path, fetch, expected)
        except OSError as error:
            if error.errno in PERMANENT_ERRORS or not self.folder.is_dir():
                message = (
                    f"{self.folder}: cannot keep shards there: {error.strerror}. Name another folder with "
                    "data.cache_dir, or keep less with data.cache_gb."
                )
                raise as_user_error(error, message) from error
            raise
        return path

    def _fetch(self, path: Path, fetch: Callable[[Path], None], expected: ExpectedFile) -> None:
        with new_file(path, path.with_name(f"{path.name}{PART}")) as partial:
            # One process at a time measures the cache and reserves space in it.
            with folder_lock(self.folder):
                (self.folder / USED).unlink(missing_ok=True)
                make_room(self.folder, self.max_bytes - expected.bytes)
                with open(partial, "wb") as file:
                    os.posix_fallocate(file.fileno(), 0, max(1, expected.bytes))
            fetch(partial)
            _check_content(partial, expected)
        # If the downloads in flight alone exceeded the limit, the cache is too full now.
        with folder_lock(self.folder):
            (self.folder / USED).unlink(missing_ok=True)
            make_room(self.folder, self.max_bytes, counted=(SHARD, BLOCK))

    @staticmethod
    def _is_cached(path: Path, size: int) -> bool:
        try:
            found = path.stat().st_size == size
            if found:
                # The cache evicts files in the order in which they were last read, so the time of this read is kept.
                os.utime(path)
            return found
        except (FileNotFoundError, NotADirectoryError):
            return False


def make_room(folder: Path, max_bytes: int, freed: int = 0, counted: tuple[str, ...] = (SHARD, BLOCK, PART)) -> int:
    """Remove shards and blocks until at most max_bytes are left, and `freed` bytes are gone. Returns the bytes left.

    counted: suffixes of the files that use space. The caller holds folder_lock().
    """
    files = sorted((entry for entry in os.scandir(folder) if entry.name.endswith(counted)), key=_read_time)
    sizes = [_size(entry) for entry in files]
    total = sum(sizes)
    limit = min(max_bytes, total - freed)
    abandoned = time.time() - ABANDONED_S
    for entry, size in zip(files, sizes, strict=True):
        removable = entry.name.endswith((SHARD, BLOCK)) and total > limit
        if removable or (f"{BLOCK}." in entry.name and _read_time(entry) < abandoned):
            total -= size
            Path(entry.path).unlink(missing_ok=True)
    return total


def _read_time(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        # Another process has evicted the file.
        return 0


def _check_content(path: Path, expected: ExpectedFile) -> None:
    found = ExpectedFile(path.stat().st_size, file_sha256(path))
    if found != expected:
        raise WrongContentError(
            f"{found.bytes} bytes arrived whose hash differs from the manifest's, which expects {expected.bytes} bytes"
        )


@contextmanager
def _file_lock(path: Path) -> Iterator[None]:
    """Let one process or thread at a time in, however long that takes."""
    lock = acquire(path, timeout_s=math.inf)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Let one process or thread at a time in, without polling: the lock is held for a moment, but for every shard."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        lock_folder(descriptor)
        yield
    finally:
        os.close(descriptor)
