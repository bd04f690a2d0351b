"""A file that one process at a time has, or several that share it, until they end: who writes to a folder that others could write to."""

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import TextIO


class LockHeldError(Exception):
    """Another process has the file. host: its machine, pid: its number there, as it said; another process and ? if it did not."""

    def __init__(self, path: Path, host: str, pid: int | str):
        super().__init__(f"{path}: process {pid} on {host} has it")
        self.path, self.host, self.pid = path, host, pid

    @property
    def is_here(self) -> bool:
        """On this machine: it runs. On a network file system a dead machine's claim may outlive it."""
        return self.host == socket.gethostname()


def acquire(path: Path, wait_s: float = 0.0, shared: bool = False) -> TextIO:
    """Have a file until what is returned is closed, or the process ends, however it does; made if it is not there.

    shared: beside others that share it. Raises LockHeldError if another process still has it after wait_s seconds, and OSError if it
    cannot be written. Where the file system has no locks, everyone has it.
    """
    file = open(path, "a+")
    until = time.monotonic() + wait_s
    while not _lock(file, shared):
        if time.monotonic() >= until:
            file.seek(0)
            said = file.read()
            file.close()
            holder = _read(said)
            raise LockHeldError(path, str(holder.get("host", "another process")), holder.get("pid", "?"))
        time.sleep(0.2)
    file.truncate(0)  # of those that share it the last one is named
    file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
    file.flush()
    return file


def _read(said: str) -> dict[str, str | int]:
    try:
        holder = json.loads(said)
    except json.JSONDecodeError:  # it is only just writing
        return {}
    return holder if isinstance(holder, dict) else {}


def _lock(file: TextIO, shared: bool) -> bool:
    """Whether the file is this process's now. True, too, where the file system has no locks."""
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return True
    return True
