"""Lock files and folders for a process, and record in a locked file which process holds it."""

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Protocol

from filelock import FileLock, Timeout, lock_descriptor

POLL_S = 0.2
# How a file system says that it has no locks. There, every process gets the lock.
NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


class LockHeldError(Exception):
    """Another process holds the lock.

    host, pid: its machine and process id, as it recorded them; "another process" and "?" if it did not.
    """

    def __init__(self, path: Path, host: str, pid: int | str):
        super().__init__(f"{path}: held by process {pid} on {host}")
        self.path, self.host, self.pid = path, host, pid

    @property
    def is_local(self) -> bool:
        """Whether the holder runs on this machine. On a network file system a lock may outlive a machine that died."""
        return self.host == socket.gethostname()


class Lock(Protocol):
    """A lock that this process holds until it calls release() or ends, however it ends."""

    def release(self) -> None: ...


def acquire(path: Path, timeout_s: float = 0.0) -> Lock:
    """Lock a file for this process alone; the file is created if it is missing, and names the holder.

    timeout_s: how long to wait for another process. Raises LockHeldError if it still holds the lock then, or OSError if
    the file cannot be written.
    """
    lock = FileLock(path, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire(timeout=timeout_s, poll_interval=POLL_S)
    except Timeout as error:
        raise _held(path) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    path.write_text(_owner())
    return lock


def acquire_read_write(path: Path, *, exclusive: bool, timeout_s: float = 0.0) -> Lock:
    """Lock a file for writing (exclusive: this process alone) or for reading (shared with other readers).

    As acquire(), with POSIX locks: filelock's ReadWriteLock keeps an SQLite database, which is unsafe on a network file
    system. The file names the last reader. A process must not lock the same file twice: releasing one releases both.
    """
    file = open(path, "a+")
    deadline = time.monotonic() + timeout_s
    while not _try_posix_lock(file.fileno(), exclusive):
        if time.monotonic() >= deadline:
            file.close()
            raise _held(path)
        time.sleep(POLL_S)
    file.truncate(0)
    file.write(_owner())
    file.flush()
    return _PosixLock(file)


def lock_folder(descriptor: int, *, blocking: bool = True) -> bool:
    """Lock an open folder for this process, until the descriptor is closed; leaves no lock file in it.

    Returns False only if blocking is False and another process holds the lock; True where the file system has no locks.
    """
    try:
        return lock_descriptor(descriptor, blocking=blocking)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return True


class _PosixLock:
    def __init__(self, file: IO[str]):
        self._file = file

    def release(self) -> None:
        self._file.close()


def _try_posix_lock(descriptor: int, exclusive: bool) -> bool:
    try:
        fcntl.lockf(descriptor, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in NO_LOCKS:
            raise
    return True


def _owner() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n"


def _held(path: Path) -> LockHeldError:
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        # The holder has not written its record yet.
        owner = {}
    if not isinstance(owner, dict):
        owner = {}
    return LockHeldError(path, str(owner.get("host", "another process")), owner.get("pid", "?"))
