"""A lock ends with its process, names its holder, and is not in the way where a file system has no locks."""

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megabert.files import lock
from megabert.files.lock import LockHeldError, acquire, acquire_read_write, lock_folder


@contextmanager
def held(path: Path, call: str, forks: bool = False) -> Iterator[subprocess.Popen]:
    """Another process that holds a lock; with `forks` it has a child that outlives it."""
    program = "import os, sys, time; from pathlib import Path; from megabert.files.lock import *\n"
    program += f"path = Path(sys.argv[1]); taken = {call}\n"
    if forks:
        program += "if not os.fork(): time.sleep(20); os._exit(0)\n"
    program += "print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("forks", [False, True])
def test_a_lock_names_its_holder_and_ends_when_the_holder_is_killed(tmp_path, forks):
    path = tmp_path / "lock"
    with held(path, "acquire(path)", forks) as process:
        with pytest.raises(LockHeldError, match=f"held by process {process.pid} on {socket.gethostname()}") as caught:
            acquire(path, timeout_s=0.3)
        assert caught.value.is_local
        process.kill()
        process.wait()
        acquire(path, timeout_s=5).release()
    acquire(path).release()


def test_a_waiting_process_gets_the_lock_when_it_is_released(tmp_path):
    first = acquire(tmp_path / "lock")
    with pytest.raises(LockHeldError, match=f"process {os.getpid()} "):
        acquire(tmp_path / "lock")
    first.release()
    acquire(tmp_path / "lock", timeout_s=1).release()


def test_readers_share_and_a_writer_is_alone(tmp_path):
    path = tmp_path / "lock"
    with held(path, "acquire_read_write(path, exclusive=False)") as process:
        acquire_read_write(path, exclusive=False).release()
        with pytest.raises(LockHeldError):
            acquire_read_write(path, exclusive=True)
        process.kill()
        process.wait()
        acquire_read_write(path, exclusive=True, timeout_s=5).release()
    with held(path, "acquire_read_write(path, exclusive=True)"), pytest.raises(LockHeldError):
        acquire_read_write(path, exclusive=False)


def test_a_folder_is_locked_without_a_file_in_it(tmp_path):
    with held(tmp_path, "lock_folder(os.open(path, os.O_RDONLY))"):
        descriptor = os.open(tmp_path, os.O_RDONLY)
        assert not lock_folder(descriptor, blocking=False)
        os.close(descriptor)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", sorted(lock.NO_LOCKS))
def test_without_locks_in_the_file_system_everyone_goes_on(tmp_path, monkeypatch, code):
    def fail(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", fail)
    monkeypatch.setattr("fcntl.lockf", fail)
    for _ in range(2):
        acquire(tmp_path / "lock")
        acquire_read_write(tmp_path / "shared", exclusive=True)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    assert lock_folder(descriptor)
    os.close(descriptor)


def test_a_lock_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as caught:
        acquire(tmp_path / "file" / "lock")
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)


def test_a_damaged_record_still_says_that_the_lock_is_held(tmp_path):
    path = tmp_path / "lock"
    taken = acquire(path)
    for content in ("", "[1]", "{"):
        path.write_text(content)
        with pytest.raises(LockHeldError, match=r"held by process \? on another process"):
            acquire(path)
    taken.release()
