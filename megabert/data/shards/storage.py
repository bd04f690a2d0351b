"""Read the bytes of a corpus from a local folder, a URL or a command.

    data/tokens                                           local: read by position
    https://host/c4   s3://bucket/c4                      remote: byte ranges through fsspec, in a local cache
    pipe:aws s3 cp s3://bucket/c4/train-{000..999}.tar -  a command that prints a file: whole shards in a local cache

A storage returns bytes by file name and does not interpret them. Network errors are retried for data.store_patience_s,
then raised with the URL; other errors, such as a missing file, are raised at once.
"""

import io
import logging
import os
import re
import select
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import braceexpand
import fsspec

from megabert.data.shards.blocks import BlockReader
from megabert.data.shards.cache import CacheOptions, ExpectedFile, WholeFileReader, WrongContentError
from megabert.data.shards.manifest import MANIFEST
from megabert.data.shards.retry import HedgedRequest, retrying, waiting_for_store
from megabert.files.bounded_reads import LimitedWriter, TooLongError, read_bounded, too_long
from megabert.files.disk import DiskError
from megabert.process.subprocesses import kill_with_children

if TYPE_CHECKING:
    from webdataset.gopen import Pipe

log = logging.getLogger(__name__)

COMMAND_PATIENCE_S = 30.0
PIPE_BUFFER = 1 << 20
# A command that prints nothing for this long, to start or to unpack something, is ended.
SILENT_S = 120.0
# A connection counts as broken after a server has sent nothing for this long.
STALLED_S = 30.0
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
INNERMOST_BRACES = re.compile(r"\{([^{}]*)\}")
NUMBER_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
MAX_SHARDS = 100_000
TAR_NAME = re.compile(r"[^/\s'\"=]+\.tar\b")


class Storage(Protocol):
    """Where the files of a corpus are.

    read_ahead: least number of reads to have in flight; 0: read when needed. patience_s: how long a read is tried
    again. read: bytes [offset, offset + size) of a file, fewer where it ends.
    read_whole: a small file; ValueError if it has more than max_bytes. size: bytes of a file, None where that is not
    cheap to know. prefetch: start to fetch a file that will be read soon. discard: remove a cached copy that is
    damaged; True if there was one, so that reading the file again makes sense. url: the name of a file in messages.
    """

    @property
    def read_ahead(self) -> int: ...
    @property
    def patience_s(self) -> float: ...
    def read(self, name: str, offset: int, size: int, expected: ExpectedFile) -> bytes: ...
    def read_whole(self, name: str, max_bytes: int) -> bytes: ...
    def size(self, name: str) -> int | None: ...
    def prefetch(self, name: str, expected: ExpectedFile) -> None: ...
    def discard(self, name: str, expected: ExpectedFile) -> bool: ...
    def url(self, name: str) -> str: ...


@dataclass(frozen=True)
class LocalFolder:
    """A folder of this machine or of a mounted file system."""

    folder: str
    read_ahead = 0
    patience_s = 0.0

    def read(self, name: str, offset: int, size: int, expected: ExpectedFile) -> bytes:
        try:
            descriptor = os.open(self.url(name), os.O_RDONLY)
        except FileNotFoundError as missing:
            # Then the file system is away. Each shard would count as missing, and might be skipped.
            if not os.path.exists(self.url(MANIFEST)):
                raise DiskError(
                    f"{self.folder}: is gone since the run began, with all shards. Mount it again."
                ) from missing
            raise
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def read_whole(self, name: str, max_bytes: int) -> bytes:
        return read_bounded(Path(self.url(name)), max_bytes)

    def size(self, name: str) -> int | None:
        """Return the bytes of a file. Raises FileNotFoundError."""
        return os.stat(self.url(name)).st_size

    def prefetch(self, name: str, expected: ExpectedFile) -> None:
        """Do nothing: the kernel reads ahead."""

    def discard(self, name: str, expected: ExpectedFile) -> bool:
        """Keep the file, which is the original and not a copy."""
        return False

    def url(self, name: str) -> str:
        return os.path.join(self.folder, name)


class RemoteFolder:
    """A folder at a URL that fsspec can open. From a web server without byte ranges, whole shards are fetched."""

    # An object store answers in about the time that training on a chunk takes.
    read_ahead = 2

    def __init__(self, folder: str, cache: CacheOptions):
        self.folder, self.patience_s = folder.rstrip("/"), cache.patience_s
        self._request = HedgedRequest()
        self._whole_files = WholeFileReader(self.folder, cache)
        self._blocks = BlockReader(self.folder, cache)
        self._has_ranges = True
        self._systems: dict[int, fsspec.AbstractFileSystem] = {}

    def read(self, name: str, offset: int, size: int, expected: ExpectedFile) -> bytes:
        if self._has_ranges:
            try:
                return self._blocks.read(name, offset, size, lambda at, n: self._download(name, n, at), expected)
            except TooLongError:
                log.warning("%s: the server ignores byte ranges; shards are fetched whole", self.folder)
                self._has_ranges = False
        return self._whole_files.read(name, offset, size, lambda path: self._fetch(name, path, expected), expected)

    def read_whole(self, name: str, max_bytes: int) -> bytes:
        try:
            return self._download(name, max_bytes)
        except TooLongError as error:
            raise too_long(self.url(name), max_bytes) from error

    def size(self, name: str) -> int | None:
        """Return None: a size costs one request per shard and rank, and reading reports a missing chunk anyway."""
        return None

    def prefetch(self, name: str, expected: ExpectedFile) -> None:
        if not self._has_ranges:
            self._whole_files.prefetch(name, lambda path: self._fetch(name, path, expected), expected)

    def discard(self, name: str, expected: ExpectedFile) -> bool:
        kept = [self._whole_files.discard(name, expected), self._blocks.discard(name, expected)]
        return any(kept)

    def url(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def _download(self, name: str, max_bytes: int, offset: int | None = None) -> bytes:
        """Return a file, or max_bytes of it from offset on. Raises TooLongError as soon as more than that arrives."""

        def copy() -> bytes:
            buffer = io.BytesIO()
            self._copy(name, buffer.write, max_bytes, offset)
            return buffer.getvalue()

        return retrying(lambda: self._request(copy, self.url(name)), self.url(name), self.patience_s)

    def _fetch(self, name: str, path: Path, expected: ExpectedFile) -> None:
        def copy() -> None:
            with open(path, "wb") as file:
                self._copy(name, _reporting(file.write), expected.bytes)

        with _wrong_content(expected):
            retrying(copy, self.url(name), self.patience_s)

    def _copy(self, name: str, write: Callable[[bytes], object], max_bytes: int, offset: int | None = None) -> None:
        system, url = self._open(), self.url(name)
        # Object stores answer with exactly the bytes that were asked for. Web servers may not.
        if not url.startswith(("http://", "https://")):
            end = (offset or 0) + max_bytes + (offset is None)
            data = system.cat_file(url, start=offset or 0, end=end)
            assert isinstance(data, bytes), f"{url}: gave {type(data).__name__}, expected bytes"
            LimitedWriter(write, max_bytes).write(data)
            return
        headers = {} if offset is None else {"headers": {"Range": f"bytes={offset}-{offset + max_bytes - 1}"}}
        system.get_file(url, LimitedWriter(write, max_bytes), **headers)

    def _open(self) -> fsspec.AbstractFileSystem:
        """Return the file system of this process. Connections do not survive a fork, so each process opens its own."""
        if os.getpid() not in self._systems:
            self._systems = {os.getpid(): file_system(self.folder)}
        return self._systems[os.getpid()]


class CommandStorage:
    """Files that a shell command prints. command: has {name} in place of a file's name."""

    read_ahead = 0

    def __init__(self, command: str, cache: CacheOptions):
        self.command, self.patience_s = command, cache.patience_s
        self._whole_files = WholeFileReader(command, cache)

    def read(self, name: str, offset: int, size: int, expected: ExpectedFile) -> bytes:
        return self._whole_files.read(name, offset, size, lambda path: self._fetch(name, path, expected), expected)

    def read_whole(self, name: str, max_bytes: int) -> bytes:
        def collect() -> bytes:
            buffer = io.BytesIO()
            copy_pipe(self.url(name), LimitedWriter(buffer.write, max_bytes))
            return buffer.getvalue()

        try:
            # A command that fails does not say whether it is wrong; the small files are read first.
            return retrying(collect, self.url(name), min(self.patience_s, COMMAND_PATIENCE_S))
        except TooLongError as error:
            raise too_long(self.url(name), max_bytes) from error

    def size(self, name: str) -> int | None:
        """Return None: the size is unknown without running the command."""
        return None

    def prefetch(self, name: str, expected: ExpectedFile) -> None:
        self._whole_files.prefetch(name, lambda path: self._fetch(name, path, expected), expected)

    def discard(self, name: str, expected: ExpectedFile) -> bool:
        return self._whole_files.discard(name, expected)

    def url(self, name: str) -> str:
        return self.command.replace("{name}", name)

    def _fetch(self, name: str, path: Path, expected: ExpectedFile) -> None:
        def copy() -> None:
            with open(path, "wb") as file:
                copy_pipe(self.url(name), LimitedWriter(_reporting(file.write), expected.bytes))

        with _wrong_content(expected):
            retrying(copy, self.url(name), self.patience_s)


@contextmanager
def _wrong_content(expected: ExpectedFile) -> Iterator[None]:
    try:
        yield
    except TooLongError as error:
        raise WrongContentError(f"more bytes arrived than the {expected.bytes} of the manifest") from error


def _reporting(write: Callable[[bytes], object]) -> Callable[[bytes], object]:
    """Let every part of a download that arrives count as waiting for a store, which is no hang."""

    def reporting_write(data: bytes) -> object:
        waiting_for_store()
        return write(data)

    return reporting_write


def copy_pipe(url: str, file: LimitedWriter) -> None:
    """Copy what pipe:COMMAND prints.

    Kills a command that prints too much. Raises OSError if it prints nothing for SILENT_S, fails, or does not end.
    """
    with open_pipe(url) as pipe:
        assert isinstance(pipe.stream, io.BufferedReader), (
            f"{url}: gave {type(pipe.stream).__name__}, expected a buffered stream of bytes"
        )
        pipe.timeout = SILENT_S
        try:
            while data := _read_some(pipe.stream, url):
                file.write(data)
            pipe.proc.wait(SILENT_S)
        except (TooLongError, TimeoutError, subprocess.TimeoutExpired) as error:
            # Otherwise the exit code of the killed command would hide the reason.
            pipe.ignore_errors = True
            kill_with_children(pipe.proc.pid)
            if isinstance(error, subprocess.TimeoutExpired):
                raise TimeoutError(f"{url}: printed all, but did not end for {SILENT_S:.0f} s") from error
            raise
        pipe.check_status()


def _read_some(stream: io.BufferedReader, url: str) -> bytes:
    """Read what a command has printed, b"" at its end. Raises TimeoutError if it prints nothing for SILENT_S."""
    until = time.monotonic() + SILENT_S
    while not select.select([stream], [], [], min(1.0, SILENT_S))[0]:
        waiting_for_store()
        if time.monotonic() > until:
            raise TimeoutError(f"{url}: printed nothing for {SILENT_S:.0f} s")
    # All that is buffered, so that the next select() looks at the pipe alone.
    return stream.read1(PIPE_BUFFER)


def open_pipe(url: str) -> "Pipe":
    """Open pipe:COMMAND with webdataset's opener, whose read() and close() raise OSError if the command failed."""
    # webdataset imports torch, which nothing else in this file needs.
    import webdataset

    return webdataset.gopen(url)  # pyrefly: ignore[bad-return] # a pipe, because of its scheme


def file_system(url: str) -> fsspec.AbstractFileSystem:
    """Return fsspec's file system for a URL. Raises ValueError that names the package that is missing for it."""
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # A download may take long, but the server must not stay silent.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED_S, sock_read=STALLED_S)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)[0]
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: fsspec cannot open it: {error}") from error


def open_storage(location: str, cache: CacheOptions) -> tuple[Storage, list[str] | None]:
    """Open a location of a recipe. Returns its storage and the names of its shards, None for all shards of the folder.

    Raises ValueError for shards of several folders, and for a command that contains no shard name.
    """
    if scheme := URL.match(location):
        location = scheme[0].lower() + location[scheme.end() :]
    if location.startswith("pipe:"):
        return _open_pipe(location, cache)
    names = None
    folder = location
    if location.endswith(".tar"):
        # A name that is there means itself, not what its braces and backslashes would name.
        paths = [location] if os.path.isfile(location) else expand_braces(location)
        folders = sorted({path.rpartition("/")[0] for path in paths})
        if len(folders) != 1:
            raise ValueError(
                f"{location}: spans the folders {', '.join(folders)}, expected one folder with one manifest."
            )
        folder, names = folders[0] or ".", [path.rpartition("/")[2] for path in paths]
    if location.startswith("file://"):
        folder = folder.removeprefix("file://")
    elif URL.match(location):
        return RemoteFolder(folder, cache), names
    return LocalFolder(os.path.expanduser(folder)), names


def _names_too_many(location: str) -> bool:
    """Return whether braces name more than MAX_SHARDS shards: the product over the pairs, the innermost first."""
    # A brace after a backslash is part of a name.
    count, rest = 1, re.sub(r"\\.", "", location)
    while count <= MAX_SHARDS and (braces := INNERMOST_BRACES.search(rest)):
        if numbers := NUMBER_RANGE.fullmatch(braces[1]):
            count *= abs(int(numbers[2]) - int(numbers[1])) // max(1, int(numbers[3] or 1)) + 1
        else:
            count *= braces[1].count(",") + 1
        rest = rest[: braces.start()] + rest[braces.end() :]
    return count > MAX_SHARDS


def expand_braces(location: str) -> list[str]:
    """Expand {000..099} and {a,b}. Raises ValueError for unbalanced braces, and for more than MAX_SHARDS names."""
    try:
        # Ranges and nested braces are expanded at once, so the names are counted before.
        found = list(islice(braceexpand.braceexpand(location), MAX_SHARDS + 1)) if not _names_too_many(location) else []
    except ValueError as error:
        raise ValueError(f"{location}: {error}. Expected such as train-{{00000..00099}}.tar.") from error
    if not 0 < len(found) <= MAX_SHARDS:
        raise ValueError(f"{location}: names more than {MAX_SHARDS:,} shards. Name a folder, which means all in it.")
    return found


def _open_pipe(location: str, cache: CacheOptions) -> tuple[Storage, list[str]]:
    names, commands = [], set()
    for command in expand_braces(location):
        found = TAR_NAME.findall(command)
        if not found:
            raise ValueError(
                f"{location}: contains no shard name; expected a command that prints a shard, such as "
                "'pipe:aws s3 cp s3://bucket/corpus/train-{00000..00099}.tar -'."
            )
        names.append(found[-1])
        commands.add(command.replace(found[-1], "{name}"))
    if len(commands) != 1:
        raise ValueError(f"{location}: spans several folders, expected one folder with one manifest.")
    return CommandStorage(commands.pop(), cache), names
