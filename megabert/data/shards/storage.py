"""Where the bytes of a corpus come from: a local folder, an object store or web server, or a command.

    data/tokens                                           local: read by position
    https://host/c4   s3://bucket/c4                      remote: byte ranges through fsspec
    pipe:aws s3 cp s3://bucket/c4/train-{000..999}.tar -  a command that prints a file: whole shards into a local cache

A storage hands out bytes by file name and knows nothing of what they mean. Network trouble is waited out, then fails with
the URL; what does not depend on the network, such as a file that is not there, fails at once.
"""

import importlib.util
import logging
import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import braceexpand
import fsspec

from megabert.data.shards.cache import NOT_THE_NETWORK, CacheOptions, Expected, Fetched

log = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds between tries: half a minute in all, longer than a load balancer or a restarted server needs.
BACK_OFF = (1.0, 2.0, 4.0, 8.0, 16.0)
PIPE_BUFFER = 1 << 20
STALLED_S = 60.0  # without a byte from a server
URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
TAR_NAME = re.compile(r"[^/\s'\"=]+\.tar\b")


class Storage(Protocol):
    """read: bytes [offset, offset + size) of a file, fewer where it ends; read_whole: a small file.

    read_ahead: how many reads are worth having under way at once. forget: drop a copy that turned out to be damaged; whether
    there was one, so that reading again makes sense.
    """

    @property
    def read_ahead(self) -> int: ...
    def read(self, name: str, offset: int, size: int, expected: Expected) -> bytes: ...
    def read_whole(self, name: str) -> bytes: ...
    def size(self, name: str) -> int | None: ...
    def prefetch(self, name: str, expected: Expected) -> None: ...
    def forget(self, name: str, expected: Expected) -> bool: ...
    def url(self, name: str) -> str: ...


@dataclass(frozen=True)
class Local:
    """A folder on this machine, or on a file system that it mounts."""

    folder: str
    read_ahead = 0

    def read(self, name: str, offset: int, size: int, expected: Expected) -> bytes:
        descriptor = os.open(self.url(name), os.O_RDONLY)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def read_whole(self, name: str) -> bytes:
        return Path(self.url(name)).read_bytes()

    def size(self, name: str) -> int | None:
        """Bytes of a file. Raises FileNotFoundError."""
        return os.stat(self.url(name)).st_size

    def prefetch(self, name: str, expected: Expected) -> None:
        """Nothing to do: the kernel reads ahead."""

    def forget(self, name: str, expected: Expected) -> bool:
        """These are the files themselves."""
        return False

    def url(self, name: str) -> str:
        return os.path.join(self.folder, name)


class Remote:
    """A folder behind a URL that fsspec knows. A web server that ignores byte ranges is read in whole shards."""

    read_ahead = 2  # chunks under way while one is used: a store answers in about the time that a chunk trains

    def __init__(self, folder: str, cache: CacheOptions):
        self.folder = folder.rstrip("/")
        self._fetched = Fetched(self.folder, cache)
        self._knows_ranges = True
        self._system: tuple[int, Any] = (0, None)

    def read(self, name: str, offset: int, size: int, expected: Expected) -> bytes:
        if self._knows_ranges:
            data = retrying(
                lambda: self._open().cat_file(self.url(name), start=offset, end=offset + size), self.url(name)
            )
            if len(data) <= size:
                return data
            log.warning("%s: the server ignores byte ranges; shards are fetched whole", self.folder)
            self._knows_ranges = False
        return self._fetched.read(name, offset, size, lambda path: self._fetch(name, path), expected)

    def read_whole(self, name: str) -> bytes:
        return retrying(lambda: self._open().cat_file(self.url(name)), self.url(name))

    def size(self, name: str) -> int | None:
        """Unknown: asking costs a request per shard and rank, and a chunk that is not there is named when it is read."""
        return None

    def prefetch(self, name: str, expected: Expected) -> None:
        if not self._knows_ranges:
            self._fetched.prefetch(name, lambda path: self._fetch(name, path), expected)

    def forget(self, name: str, expected: Expected) -> bool:
        return self._fetched.forget(name, expected)

    def url(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def _fetch(self, name: str, path: Path) -> None:
        retrying(lambda: self._open().get_file(self.url(name), str(path)), self.url(name))

    def _open(self) -> Any:
        """The file system of this process: connections do not survive a fork."""
        if self._system[0] != os.getpid():
            self._system = (os.getpid(), file_system(self.folder))
        return self._system[1]


class Piped:
    """Files that a command prints: `command` with a shard's name in place of {name}."""

    read_ahead = 0

    def __init__(self, command: str, cache: CacheOptions):
        self.command = command
        self._fetched = Fetched(command, cache)

    def read(self, name: str, offset: int, size: int, expected: Expected) -> bytes:
        return self._fetched.read(name, offset, size, lambda path: self._fetch(name, path), expected)

    def read_whole(self, name: str) -> bytes:
        def collect() -> bytes:
            with open_pipe(self.url(name)) as pipe:
                return pipe.read()

        return retrying(collect, self.url(name))

    def size(self, name: str) -> int | None:
        """Unknown without running the command."""
        return None

    def prefetch(self, name: str, expected: Expected) -> None:
        self._fetched.prefetch(name, lambda path: self._fetch(name, path), expected)

    def forget(self, name: str, expected: Expected) -> bool:
        return self._fetched.forget(name, expected)

    def url(self, name: str) -> str:
        return self.command.replace("{name}", name)

    def _fetch(self, name: str, path: Path) -> None:
        def copy() -> None:
            with open_pipe(self.url(name)) as pipe, open(path, "wb") as file:
                while data := pipe.read(PIPE_BUFFER):
                    file.write(data)

        retrying(copy, self.url(name))


def retrying(action: Callable[[], T], url: str) -> T:
    """Run an action that needs the network, again after a pause where it fails. Raises OSError with the URL at last.

    What another try cannot mend (no such file, no permission, a full disk, not installed) is raised at once.
    """
    began = time.monotonic()
    for pause in (*BACK_OFF, None):
        try:
            return action()
        except FileNotFoundError:
            raise
        except network_errors() as mistake:
            if getattr(mistake, "errno", None) in NOT_THE_NETWORK:
                raise
            status = getattr(mistake, "status", 0)
            said = f"HTTP {status} {getattr(mistake, 'message', '')}" if status else repr(mistake)
            if 400 <= status < 500 and status not in (408, 429):  # not a timeout, not too many requests
                raise OSError(f"{url}: {said}") from mistake
            if pause is None:
                seconds = time.monotonic() - began
                raise OSError(f"{url}: failed {len(BACK_OFF) + 1} times over {seconds:.0f} s: {said}") from mistake
            log.warning("%s: %s; trying again in %.0f s", url, said, pause)
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def open_pipe(url: str) -> Any:
    """webdataset's opener for pipe:COMMAND; its close() raises OSError where the command failed."""
    import webdataset  # here, because it brings torch, which nothing else in this file needs

    return webdataset.gopen(url)


def network_errors() -> tuple[type[BaseException], ...]:
    """What a broken connection looks like in the libraries that are installed."""
    found: list[type[BaseException]] = [OSError, EOFError, TimeoutError, subprocess.SubprocessError]
    if importlib.util.find_spec("aiohttp"):
        import aiohttp

        found.append(aiohttp.ClientError)
    if importlib.util.find_spec("botocore"):
        from botocore.exceptions import BotoCoreError  # pyrefly: ignore[missing-import] # comes with s3fs

        found.append(BotoCoreError)
    return tuple(found)


def file_system(url: str) -> Any:
    """fsspec's file system for a URL. Raises ValueError naming the package that is missing for it."""
    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # A long download is no error; a silent server is.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED_S, sock_read=STALLED_S)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        return fsspec.core.url_to_fs(url, skip_instance_cache=True, **options)[0]
    except (ImportError, ValueError) as mistake:
        raise ValueError(f"{url}: fsspec cannot open it: {mistake}") from mistake


def open_storage(location: str, cache: CacheOptions) -> tuple[Storage, list[str] | None]:
    """Read a location as a recipe gives it. Returns its storage, and the shards it names: None for all of the folder.

    Raises ValueError for a location that names shards of several folders, or a pipe that names none.
    """
    if scheme := URL.match(location):
        location = scheme[0].lower() + location[scheme.end() :]
    if location.startswith("pipe:"):
        return _open_pipe(location, cache)
    names = None
    folder = location
    if location.endswith(".tar"):
        paths = list(braceexpand.braceexpand(location))
        folders = sorted({path.rpartition("/")[0] for path in paths})
        if len(folders) != 1:
            raise ValueError(f"{location}: spans the folders {', '.join(folders)}, expected one with one manifest.")
        folder, names = folders[0] or ".", [path.rpartition("/")[2] for path in paths]
    if location.startswith("file://"):
        folder = folder.removeprefix("file://")
    elif URL.match(location):
        return Remote(folder, cache), names
    return Local(os.path.expanduser(folder)), names


def _open_pipe(location: str, cache: CacheOptions) -> tuple[Storage, list[str]]:
    names, commands = [], set()
    for command in braceexpand.braceexpand(location):
        found = TAR_NAME.findall(command)
        if not found:
            raise ValueError(
                f"{location}: names no shard; expected a command that prints one, such as "
                "'pipe:aws s3 cp s3://bucket/corpus/train-{00000..00099}.tar -'."
            )
        names.append(found[-1])
        commands.add(command.replace(found[-1], "{name}"))
    if len(commands) != 1:
        raise ValueError(f"{location}: spans several folders, expected one with one manifest.")
    return Piped(commands.pop(), cache), names
