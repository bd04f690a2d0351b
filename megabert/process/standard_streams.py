"""Keep a command running when a standard stream is closed, its reader has ended, or its disk is full."""

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any

# Errors of a stream whose other end is closed. No message can reach a reader then.
GONE = {errno.EPIPE, errno.EBADF, errno.EIO}
# What a stream does with characters that it cannot encode.
LOSSY = "backslashreplace"


class _LossyFile(io.FileIO):
    """A file that drops what cannot be written. report: called with the first error that is not one of GONE."""

    def __init__(self, number: int, report: Callable[[OSError], None]):
        super().__init__(number, "w", closefd=False)
        self.report: Callable[[OSError], None] | None = report

    def write(self, data: Any) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if self.report is not None and error.errno not in GONE:
                self.report(error)
                self.report = None
            return len(data)


def keep_streams_writable() -> None:
    """Open /dev/null for each standard stream that is closed (`>&-`), and make stdout and stderr ignore write errors.

    Characters that their encoding lacks, and names of files that are not UTF-8, are printed as "\\xf6" and the like.

    A command's results are files, so an error of its messages must not end it. A stream that a program has replaced
    stays as it is.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # It gets the lowest free number. Otherwise the next file would get it, and print() would write there.
            os.set_inheritable(number := os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False, errors=LOSSY))
            setattr(sys, f"__{name}__", getattr(sys, name))
    for name in ("stdout", "stderr"):
        usual = getattr(sys, name)
        if usual is getattr(sys, f"__{name}__") and isinstance(usual, io.TextIOWrapper):
            raw = _LossyFile(usual.fileno(), _report_on_stderr if name == "stdout" else _ignore)
            lossy = io.TextIOWrapper(
                raw if usual.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type]
                encoding=usual.encoding,
                errors=LOSSY if usual.errors == "strict" else usual.errors,
                line_buffering=usual.line_buffering,
                write_through=usual.write_through,
            )
            setattr(sys, name, lossy)


def _report_on_stderr(error: OSError) -> None:
    sys.stderr.write(f"stdout: {error.strerror}: what was printed is incomplete\n")


def _ignore(_: OSError) -> None:
    """Report nothing: stderr itself cannot be written."""
