"""Start and end child processes, and find the last line that they print."""

import contextlib
import ctypes
import multiprocessing.util
import os
import signal
import stat
import tempfile
import threading

import psutil

# A socket's path has at most 107 bytes. multiprocessing's are $TMPDIR/pymp-12345678/listener-12345678.
LONGEST_SOCKET_FOLDER = 107 - len("/pymp-12345678/listener-12345678")
# Opened here, because a process between fork and exec must not open libraries.
LIBC = ctypes.CDLL(None)
# The value is from <linux/prctl.h>.
PR_SET_PDEATHSIG = 1
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def use_short_socket_paths() -> None:
    """Keep multiprocessing's sockets elsewhere if $TMPDIR is too long for them; call it before children are started.

    The error would otherwise stay in a thread of the child, and the parent would wait for ever. Raises ValueError if
    there is no other folder.
    """
    before = tempfile.gettempdir()
    if len(os.fsencode(before)) <= LONGEST_SOCKET_FOLDER:
        return
    writable = [folder for folder in SHORT_FOLDERS if os.access(folder, os.W_OK | os.X_OK)]
    if not writable:
        raise ValueError(
            f"TMPDIR is {before}, which is too long for sockets, and {', '.join(SHORT_FOLDERS)} cannot be written. Set "
            f"TMPDIR to a folder with at most {LONGEST_SOCKET_FOLDER} bytes in its path."
        )
    tempfile.tempdir = writable[0]
    try:
        # This makes the folder once, and child processes inherit it.
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before


def exit_with_parent() -> None:
    """End this process at once when its parent ends, however that ends. Call it in the child, at its start.

    The parent is the one that started this process through multiprocessing (also by way of a fork server), or through
    subprocess with stdin=PIPE, to which it never writes: the pipe is closed when the parent ends. Does nothing in a
    process that was started in another way.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait = parent.join
    elif stat.S_ISFIFO(os.fstat(0).st_mode):
        wait = _wait_for_end_of_stdin
    else:
        return

    def exit_after() -> None:
        wait()
        os._exit(1)

    threading.Thread(target=exit_after, name="exit-with-parent", daemon=True).start()


def end_with_parent() -> None:
    """Let the kernel send this process SIGTERM when the thread that started it ends; the preexec_fn of a command."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def kill_with_children(pid: int) -> None:
    """Kill a process, such as a shell, and all that it has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in (*process.children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _wait_for_end_of_stdin() -> None:
    # Not sys.stdin.read(): Python aborts at its end while a thread holds the lock of that object.
    while os.read(0, 1):
        pass


def last_line(text: str) -> str:
    """Return the last line that is not blank, stripped; an empty string if there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def why_ended(code: int | None, output: str) -> str:
    """Say in one line why a process failed. code: as subprocess and multiprocessing give it, negative for a signal.

    What a killed process wrote last may have nothing to do with its end, so the signal comes first.
    """
    line = last_line(output)
    if code is None or code >= 0:
        return line or f"exit code {code}, without output"
    # Most real-time signals have no name.
    names = {each.value: each.name for each in signal.Signals}
    return f"killed by {names.get(-code, f'signal {-code}')}" + (f", after {line!r}" if line else "")
