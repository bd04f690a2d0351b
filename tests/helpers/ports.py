"""TCP ports that no other process takes between the choice and the use."""

import itertools
import os
import socket
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

# Below the range from which Linux gives ports to clients (net.ipv4.ip_local_port_range begins at 32768).
FIRST, LAST = 20_000, 31_999
LOCKS = Path(tempfile.gettempdir()) / "megabert-test-ports"
_START = FIRST + os.getpid() % 1000 * 12
_next = itertools.cycle([*range(_START, LAST + 1), *range(FIRST, _START)])
_held: list[FileLock] = []


def free_port() -> int:
    """Return a port on which nothing listens. No other test process gets it before this one ends."""
    LOCKS.mkdir(exist_ok=True)
    for port in itertools.islice(_next, LAST - FIRST):
        lock = FileLock(LOCKS / str(port), thread_local=False)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        if _is_free(port):
            _held.append(lock)
            return port
        lock.release()
    raise AssertionError(f"no port between {FIRST} and {LAST} is free")


def _is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
