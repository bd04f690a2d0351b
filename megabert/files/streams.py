"""Standard streams that end no command: one that is closed, whose reader has left, or whose disk is full."""

import errno
import io
import os
import sys
from collections.abc import Callable
from typing import Any

# What a stream says whose other end is gone. There is nobody left to be told.
GONE = {errno.EPIPE, errno.EBADF, errno.EIO}


class _LossyFile(io.FileIO):
    """A file that drops what cannot be written. report: called at the first loss that somebody can still be told of."""

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
    """Open /dev/null for a standard stream that is closed (`>&-`), and let stdout and stderr drop what they must.

    What a command is for lies in its files: its messages must not end it. A stream that a program has replaced stays.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # The lowest number that is free: else the next file to be opened would get it, and print() wrote into it.
            os.set_inheritable(number := os.open(os.devnull, os.O_RDWR), True)
            setattr(sys, name, open(number, "r" if name == "stdin" else "w", closefd=False))
            setattr(sys, f"__{name}__", getattr(sys, name))
    for name in ("stdout", "stderr"):
        usual = getattr(sys, name)
        if usual is getattr(sys, f"__{name}__") and isinstance(usual, io.TextIOWrapper):
            raw = _LossyFile(usual.fileno(), _tell_stderr if name == "stdout" else _tell_nobody)
            lossy = io.TextIOWrapper(
                raw if usual.write_through else io.BufferedWriter(raw),  # type: ignore[arg-type]
                encoding=usual.encoding,
                errors=usual.errors,
                line_buffering=usual.line_buffering,
                write_through=usual.write_through,
            )
            setattr(sys, name, lossy)


def _tell_stderr(error: OSError) -> None:
    sys.stderr.write(f"stdout: {error.strerror}: what was printed is incomplete\n")


def _tell_nobody(_: OSError) -> None:
    """Where stderr cannot be written, no message can be."""
