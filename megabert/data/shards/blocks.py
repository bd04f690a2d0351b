"""Cache blocks of remote shards on a local disk: small reads become requests of 2 MB, which a machine makes once.

A block that cannot be kept costs another request, never the run: without a disk to write to, each read is a request.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from megabert.data.shards import retry
from megabert.data.shards.cache import BLOCK, PART, USED, CacheOptions, ExpectedFile, folder_lock, make_room
from megabert.data.shards.retry import waiting_for_store
from megabert.files.atomic import new_file
from megabert.files.lock import lock_folder

log = logging.getLogger(__name__)

# Eight chunks of 131,072 tokens of two bytes. A stream reads the chunks of a split, at most a shard, in random order:
# it fetches a block for each of its first ones, so larger blocks would let training begin later.
BLOCK_BYTES = 2 << 20
# To make room needs a look at all files, so the cache is emptied to KEPT_SHARE of its limit at once, or on a full disk
# by FREED_BLOCKS blocks.
KEPT_SHARE, FREED_BLOCKS = 0.9, 64
# What the cache leaves free of a disk, which checkpoints and logs may need.
FREE_SHARE = 0.05
# Processes wait for each other's requests at one of LOCKS locks, but no longer than a request usually takes.
LOCKS, POLL_S = 1024, 0.02
# A block is marked as read at most this often.
TOUCH_EVERY_S = 60.0
# A process that has fetched this share of the cache's limit, but read less than half of that, fetches chunks alone.
FETCHED_SHARE = 1 / 8

Fetch = Callable[[int, int], bytes]


# fsspec's "blockcache" does not fit: it has no limit of size, its processes write one index of all blocks over each
# other's, and what a killed process has fetched is lost or, worse, listed before it is written.
class BlockReader:
    """Reads parts of remote files by way of the cache. What it returns is compared with a checksum by its caller."""

    def __init__(self, location: str, cache: CacheOptions):
        """location: the URL that the files come from; equal names of other locations are other files."""
        self._location = hashlib.sha256(location.encode()).hexdigest()[:16]
        self._folder, self._max_bytes = cache.folder.expanduser(), cache.max_bytes
        # Bytes that this process has fetched in blocks, and that its callers have read.
        self._fetched = self._read = 0
        self._stopped = False

    def read(self, name: str, offset: int, size: int, fetch: Fetch, expected: ExpectedFile) -> bytes:
        """Return bytes [offset, offset + size) of a file, fewer where it ends.

        fetch: returns the bytes of a file from (offset, size), fewer where it ends; what it raises is raised.
        """
        if size > BLOCK_BYTES:
            return fetch(offset, size)
        self._read += size
        parts = list(self._parts(name, offset, size, expected))
        found = [part.kept() for part in parts]
        if self._stopped and None in found:
            return fetch(offset, size)
        return b"".join(
            self._fetch(part, fetch) if data is None else data for part, data in zip(parts, found, strict=True)
        )

    def discard(self, name: str, expected: ExpectedFile) -> bool:
        """Remove the blocks of a file. Returns whether there were any."""
        prefix, found = f"{self._prefix(name, expected)}.", False
        with contextlib.suppress(OSError):
            for entry in os.scandir(self._folder):
                if entry.name.startswith(prefix) and entry.name.endswith(BLOCK):
                    found = True
                    Path(entry.path).unlink(missing_ok=True)
        return found

    def _parts(self, name: str, offset: int, size: int, expected: ExpectedFile) -> Iterator["Part"]:
        stop = min(offset + size, expected.bytes)
        for number in range(offset // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            begin, end = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, expected.bytes)
            path = self._folder / f"{self._prefix(name, expected)}.{number:06d}{BLOCK}"
            yield Part(path, begin, end - begin, max(offset, begin) - begin, min(stop, end) - begin)

    def _prefix(self, name: str, expected: ExpectedFile) -> str:
        """Name by location and content, so that a rewritten shard is another file."""
        return f"{self._location}-{expected.sha256[:16]}-{name}"

    def _fetch(self, part: "Part", fetch: Fetch) -> bytes:
        with self._one_at_a_time(part.path) as is_first:
            # Another process or thread may have fetched it meanwhile.
            data = part.kept()
            if data is not None:
                return data
            if not is_first:
                # That request hangs or is repeated. This one may not.
                return fetch(part.begin + part.low, part.high - part.low)
            block = fetch(part.begin, part.size)
            if len(block) == part.size:
                self._keep(part.path, block)
            return block[part.low : part.high]

    @contextlib.contextmanager
    def _one_at_a_time(self, path: Path) -> Iterator[bool]:
        """Let one process or thread at a time fetch a block. Yields False if that one takes longer than SLOW_S."""
        descriptor, is_first = None, True
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            number = int(hashlib.sha256(path.name.encode()).hexdigest(), 16) % LOCKS
            descriptor = os.open(self._folder / f"blocks-{number:03x}.lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            until = time.monotonic() + retry.SLOW_S
            while descriptor is not None and not (is_first := lock_folder(descriptor, blocking=False)):
                if time.monotonic() > until:
                    break
                waiting_for_store()
                time.sleep(POLL_S)
            yield is_first
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def _keep(self, path: Path, block: bytes) -> None:
        """Write a block, or log once why none are written any more."""
        self._fetched += len(block)
        if self._fetched > max(FETCHED_SHARE * self._max_bytes, 2 * self._read):
            self._stop("most of what it fetches is not read: data.cache_gb is too small, or so is the corpus")
            return
        name = f"{path.name}.{secrets.token_hex(4)}{PART}"
        try:
            if self._reserve(len(block)):
                with new_file(path, path.with_name(name)) as temporary:
                    temporary.write_bytes(block)
        except OSError as error:
            self._stop(f"{error.strerror}. Name another folder with data.cache_dir, or keep less with data.cache_gb")

    def _stop(self, reason: str) -> None:
        if not self._stopped:
            self._stopped = True
            log.warning("%s: keeps no more blocks of shards, so each chunk is a request: %s", self._folder, reason)

    def _reserve(self, size: int) -> bool:
        """Count a block before it is written, and make room for it. Returns False if there is none.

        The count is in a file, because the processes of a machine share it. A kill can lose it, then it is made anew,
        or make it too large. Nothing makes it too small.
        """
        with folder_lock(self._folder):
            path, lacking = self._folder / USED, self._lacking(size)
            used = _number_in(path)
            if used is None or used + size > self._max_bytes or lacking > 0:
                freed = lacking + FREED_BLOCKS * size if lacking > 0 else 0
                used = make_room(self._folder, int(KEPT_SHARE * self._max_bytes) - size, freed)
                if used + size > self._max_bytes or self._lacking(size) > 0:
                    path.write_text(str(used))
                    return False
            path.write_text(str(used + size))
            return True

    def _lacking(self, size: int) -> int:
        """Return how many bytes must be freed on the disk to write `size` of them."""
        disk = os.statvfs(self._folder)
        return int(FREE_SHARE * disk.f_blocks * disk.f_frsize) + size - disk.f_bavail * disk.f_frsize


class Part(NamedTuple):
    """Bytes [low, high) of a block. path: of the block in the cache; begin, size: of the block in its shard."""

    path: Path
    begin: int
    size: int
    low: int
    high: int

    def kept(self) -> bytes | None:
        """Read from the cache. Returns None if the block is not there, or cut."""
        try:
            with open(self.path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                if status.st_size != self.size:
                    return None
                if time.time() - status.st_mtime > TOUCH_EVERY_S:
                    # The blocks that were read least recently are removed first.
                    os.utime(self.path)
                return os.pread(file.fileno(), self.high - self.low, self.low)
        except OSError:
            return None


def _number_in(path: Path) -> int | None:
    """Return the number that a file holds, None if there is none."""
    try:
        return int(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
