"""Write a file or a folder completely or not at all: under a temporary name beside it, which is then renamed."""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from filelock import lock_descriptor

from megabert.files.disk import FULL
from megabert.files.lock import lock_folder

# From <fcntl.h> and <linux/fs.h>.
AT_FDCWD, RENAME_EXCHANGE = -100, 2
# How the kernel says that the file system cannot exchange two names, as NFS cannot.
CANNOT_EXCHANGE = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV}
# The ending of a folder's name while another one takes its place.
REPLACED = "-old"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content in one step; it is on disk before it is visible under its name.

    For files with one writer: what a killed process leaves behind is overwritten by the next one.
    """
    with _renamed_to(path, path.with_name(f"{path.name}.tmp")) as temporary, open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def new_file(path: Path, temporary: Path | None = None) -> AbstractContextManager[Path]:
    """Yield a temporary name beside `path`, and rename it to `path` if the block succeeds, or else remove it.

    For files that several processes may write, on any machines: each has a temporary name of its own, or the caller
    gives `temporary`, on the same file system. The caller syncs it to disk.
    """
    return _renamed_to(path, temporary or path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp"))


@contextmanager
def _renamed_to(path: Path, temporary: Path) -> Iterator[Path]:
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        # A write that fails does not name its file.
        if error.errno in FULL and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yield a new folder beside `out` to write to. The caller renames it; whatever is left of it at the end is removed.

    Ctrl-C and SIGTERM remove it too. What a kill -9 leaves behind is removed by the next process that writes to `out`.
    An OSError about the folder or a file in it names `out` instead, because the folder's own name is gone by then.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with _sigterm_raises():
        folder, lock = _new_folder(out)
        try:
            yield folder
        except OSError as error:
            _name_final_place(error, folder, out)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _name_final_place(error: OSError, folder: Path, out: Path) -> None:
    """Let an error name `out` where it names the staged folder, the one that it replaces, or a file in either.

    A write to a full disk names no file; here it was one of the folder's.
    """
    if error.errno in FULL and error.filename is None:
        error.filename = str(out)
    temporary = rf"{re.escape(str(folder))}({REPLACED})?(?=/|$)"
    for attribute in ("filename", "filename2"):
        if isinstance(name := getattr(error, attribute), (str, os.PathLike)):
            setattr(error, attribute, re.sub(temporary, lambda _: str(out), os.fspath(name)))


def replace_folder(folder: Path, out: Path, check: Callable[[], object] = lambda: None) -> None:
    """Rename a staged folder to `out`, in place of whatever is there now.

    check: raises if `out` must not be replaced, because another process may have written it since the work began.
    """
    before = folder.with_name(f"{folder.name}{REPLACED}")
    with _locked(out.parent):
        check()
        if not out.exists():
            folder.rename(out)
        elif _exchange(folder, out):
            before = folder
        else:
            # A kill between these two leaves no `out`: restore_folder() renames it back.
            out.rename(before)
            folder.rename(out)
    shutil.rmtree(before, ignore_errors=True)


def restore_folder(out: Path) -> None:
    """Rename back to `out` what a process was about to replace when it was killed, if `out` is missing."""
    if not os.path.lexists(out) and out.parent.is_dir():
        with _locked(out.parent):
            _restore(out, _staged(out))


def _restore(out: Path, staged: list[Path]) -> None:
    replaced = [path for path in staged if path.name.endswith(REPLACED)]
    if replaced and not os.path.lexists(out):
        replaced[0].rename(out)


def _exchange(folder: Path, other: Path) -> bool:
    """Give each of two folders the name of the other, in one step. Returns False where that is not possible."""
    libc = ctypes.CDLL(None, use_errno=True)
    if (rename := getattr(libc, "renameat2", None)) is None:
        return False
    if rename(AT_FDCWD, os.fsencode(folder), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    if (code := ctypes.get_errno()) in CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(folder), None, str(other))


def _staged(out: Path) -> list[Path]:
    """List the staged folders of all processes that write to `out`, and the folders that they replace."""
    name = re.compile(rf"\.tmp-{re.escape(out.name)}-[0-9a-f]{{8}}({REPLACED})?")
    return sorted(path for path in out.parent.iterdir() if name.fullmatch(path.name))


def _new_folder(out: Path) -> tuple[Path, int]:
    """Create a folder, locked while this process lives, and remove abandoned ones. Also returns the descriptor."""
    # Without this lock, a new folder that is not locked yet would look abandoned.
    with _locked(out.parent):
        _restore(out, _staged(out))
        for other in _staged(out):
            _remove_if_abandoned(other)
        folder = out.with_name(f".tmp-{out.name}-{secrets.token_hex(4)}")
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
        lock_folder(lock)
    return folder, lock


def _remove_if_abandoned(folder: Path) -> None:
    """Remove a staged folder whose process has ended."""
    with contextlib.suppress(OSError):
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            # This raises where the file system has no locks, so nothing is removed there.
            if lock_descriptor(lock, blocking=False):
                shutil.rmtree(folder)
        finally:
            os.close(lock)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes of ours out of this section, where the file system has locks."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        lock_folder(lock)
        yield
    finally:
        os.close(lock)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM end the process as Ctrl-C does, through every `finally`, unless the program handles it itself."""
    default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ours = default and threading.current_thread() is threading.main_thread()
    if ours:
        signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
