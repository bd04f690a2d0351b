"""Child processes: ending together with the parent, and the last line of what they printed."""

import multiprocessing
import os
import stat
import threading


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


def _wait_for_end_of_stdin() -> None:
    # Not sys.stdin.read(): Python aborts at its end while a thread holds the lock of that object.
    while os.read(0, 1):
        pass


def last_line(text: str) -> str:
    """Return the last line that is not blank, stripped; an empty string if there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
