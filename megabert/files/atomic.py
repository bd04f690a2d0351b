"""Write a file or a folder completely or not at all: under a temporary name beside it, then renamed."""

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file in one step, on disk before it is visible."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """A new folder beside `out` to write to, for the caller to rename; what is still there at the end is removed.

    Ctrl-C and SIGTERM remove it too. What a kill -9 left there is removed by the next that writes to `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _sigterm_raises():
        folder, lock = _new_folder(out)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def replace_folder(folder: Path, out: Path) -> None:
    """Rename a staged folder to `out`, whatever is there now."""
    before = folder.with_name(f"{folder.name}-old")
    with _only_one(out.parent):
        if out.exists():
            out.rename(before)
        folder.rename(out)
    shutil.rmtree(before, ignore_errors=True)


def _new_folder(out: Path) -> tuple[Path, int]:
    """A folder that is locked as long as this process lives, and the lock's descriptor. What others left is removed."""
    ours = re.compile(rf"\.tmp-{re.escape(out.name)}-[0-9a-f]{{8}}(-old)?")
    with _only_one(out.parent):  # so that nobody takes for left behind what is not locked yet
        for left in [path for path in out.parent.iterdir() if ours.fullmatch(path.name)]:
            _remove_unless_owned(left)
        folder = out.with_name(f".tmp-{out.name}-{secrets.token_hex(4)}")
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # a file system without locks, where nothing is removed either
            fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def _remove_unless_owned(folder: Path) -> None:
    """Remove a staged folder whose process is gone."""
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        finally:
            os.close(lock)


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Keep other processes of ours out of this folder for a moment, where the file system has locks."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Meanwhile SIGTERM ends the process as Ctrl-C does, through every `finally`; unless somebody else listens to it."""
    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
