"""When a process of this rank last waited for a store, visible to the rank and to its loader workers."""

import functools
import mmap
import struct
import time

_TIME = struct.Struct("d")


@functools.cache
def _shared() -> mmap.mmap:
    """Return memory that this process shares with the workers that it forks from now on."""
    return mmap.mmap(-1, _TIME.size)


def waited_for_store_at() -> float:
    """Return when this rank last waited for a store, as of time.monotonic(); 0 if never. Call it before a fork."""
    return _TIME.unpack(_shared()[:])[0]


def waiting_for_store() -> None:
    """Say that this process waits for a store at this moment, and has not lost its patience."""
    _shared()[:] = _TIME.pack(time.monotonic())
