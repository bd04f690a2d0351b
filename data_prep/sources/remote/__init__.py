"""List and read files at the URLs that fsspec can open: s3://, gs://, hf://, https:// and others."""

import functools
import io
import os
import posixpath
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import fsspec

from data_prep.sources.base import HIDDEN, LeftOut, is_hidden
from megabert.data.shards.retry import network_errors, retrying
from megabert.data.shards.storage import URL, file_system

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

T = TypeVar("T")

# The first request of a file is small, because often only its head is wanted; each one that follows is twice as large.
FIRST_BYTES, LAST_BYTES = 1 << 16, 4 << 20
# What in fsspec's description of a file changes with its content.
VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "last_commit", "updated", "created", "sha256")
HTTP = ("http://", "https://")
PATIENCE_S = 30.0

# Sizes of the files that this process has asked for, so that opening one again takes no request.
_SIZES: dict[str, int | None] = {}


class UnreachableError(ValueError):
    """A file that cannot be fetched now. It is no damage, so it is never left out."""


@dataclass(frozen=True)
class RemotePath:
    """A file at a URL. size: bytes; version: changes with its content, as far as the server says."""

    url: str
    size: int
    version: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return posixpath.basename(self.url)

    def is_dir(self) -> bool:
        return False


def is_remote(path: str) -> bool:
    return bool(URL.match(path)) and not path.lower().startswith("file://")


def size_of(path: Path | RemotePath) -> int:
    return path.size if isinstance(path, RemotePath) else path.stat().st_size


def remote_files(url: str, left_out: LeftOut) -> Iterator[RemotePath]:
    """Yield the files below a URL in the order of their paths; hidden ones are left out, as in a folder.

    On a web server, a URL that ends with a slash is a page of links. Raises ValueError for a URL that cannot be read.
    """
    system = _system(url)
    stack = [url]
    while stack:
        path = stack.pop()
        is_web = path.startswith(HTTP)
        info = {"type": "directory"} if is_web and path.endswith("/") else _fresh_info(path)
        if info["type"] != "directory":
            yield RemotePath(path, _size(path, info), _version(info))
            continue
        entries = _fetched(path, functools.partial(system.ls, path, detail=False))
        names = sorted({entry if is_web else system.unstrip_protocol(entry) for entry in entries} - {path})
        for name in reversed(names):
            if is_hidden(posixpath.basename(name.rstrip("/"))):
                left_out.add(HIDDEN, name)
            elif not (is_web and "?" in name):
                # A web page's link with a question mark only sorts the page.
                stack.append(name)


def describe(url: str) -> RemotePath:
    """Return the file at a URL as it is now."""
    info = _fresh_info(url)
    return RemotePath(url, _size(url, info), _version(info))


def open_file(path: str) -> io.BufferedReader:
    """Open a file, local or at a URL, to read it in any order."""
    if not is_remote(path):
        return open(path, "rb")
    return io.BufferedReader(_Ranges(path), LAST_BYTES)


class _Ranges(io.RawIOBase):
    """A file that is fetched in ranges of bytes; as a whole, to a temporary file, from a server that has no ranges."""

    def __init__(self, url: str):
        self._url = url
        if url not in _SIZES:
            _fresh_info(url)
        size = _SIZES[url]
        self._at, self._next_bytes = 0, FIRST_BYTES
        self._whole: IO[bytes] | None = _download(url) if size is None else None
        if self._whole is not None:
            size = self._whole.seek(0, os.SEEK_END)
        assert size is not None, f"{url}: has no size, though it was fetched whole"
        self._size = size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        offset += {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer).cast("B")
        data = self._read(len(view))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, size: int) -> bytes:
        if self._whole is None:
            size = min(size, self._next_bytes, max(0, self._size - self._at))
            self._next_bytes = min(2 * self._next_bytes, LAST_BYTES)
            fetch = functools.partial(_system(self._url).cat_file, self._url, start=self._at, end=self._at + size)
            data = _fetched(self._url, fetch) if size else b""
            assert isinstance(data, bytes), f"{self._url}: gave {type(data).__name__}, expected bytes"
            if len(data) == size:
                return data
            if len(data) < size:
                raise UnreachableError(
                    f"{self._url}: has fewer bytes than the {self._size} that the server says. Run the same command "
                    "again."
                )
            # The server ignores ranges, so the whole file is downloaded.
            self._whole = _download(self._url)
        self._whole.seek(self._at)
        return self._whole.read(size)

    def close(self) -> None:
        if self._whole is not None:
            self._whole.close()
        super().close()


def _download(url: str) -> IO[bytes]:
    file = tempfile.TemporaryFile()

    def copy() -> None:
        file.seek(0)
        file.truncate()
        _system(url).get_file(url, file)

    _fetched(url, copy)
    return file


@functools.lru_cache(maxsize=16)
def _system_of(root: str, process: int) -> fsspec.AbstractFileSystem:
    return file_system(root)


def _system(url: str) -> fsspec.AbstractFileSystem:
    """Return the file system of this process; connections do not survive a fork."""
    scheme, _, rest = url.partition("://")
    return _system_of(f"{scheme}://{rest.partition('/')[0]}", os.getpid())


def _fresh_info(url: str) -> dict[str, Any]:
    system = _system(url)
    system.invalidate_cache()
    info = _fetched(url, functools.partial(system.info, url))
    size = info.get("size")
    _SIZES[url] = None if size is None else int(size)
    return {"size": None, "type": "file"} | info


def _size(url: str, info: dict[str, Any]) -> int:
    if info["size"] is not None:
        return int(info["size"])
    with _download(url) as file:
        return file.seek(0, os.SEEK_END)


def _version(info: dict[str, Any]) -> str:
    return " ".join(f"{key}={info[key]}" for key in VERSION_KEYS if info.get(key) is not None)


def _fetched(url: str, action: Callable[[], T]) -> T:
    """Run an action that needs the network, repeated for half a minute. Raises UnreachableError."""
    try:
        return retrying(action, url, PATIENCE_S, remedy="")
    except FileNotFoundError as error:
        raise UnreachableError(
            f"{url}: no such file or folder. A folder of a web server must end with a slash, and its page must have "
            "links to the files."
        ) from error
    except network_errors() as error:
        reason = str(error).removeprefix(f"{url}: ") or type(error).__name__
        raise UnreachableError(
            f"{url}: cannot be read: {reason}. Check the address, the network and your access rights, and run the same "
            "command again: what is done is kept."
        ) from error
