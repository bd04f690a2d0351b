"""Noticing at once that a rank is gone, and saying which: every rank keeps a connection open to rank 0.

Gloo and NCCL wait for a dead peer until their timeout, or fail naming an address. Here the kernel tells: it closes the
connections of a process that dies, and its keepalive probes miss a host that does. Rank 0 passes on who it was, and all end.
"""

import contextlib
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed

log = logging.getLogger(__name__)

PEER_LOST = 86  # the exit code of a rank that ended because another one is gone
MEET_S = 120.0  # for all ranks to connect; they have just met in init_distributed
# A host that does not answer is given up after 10 + 4 x 5 s.
PROBES = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4, socket.TCP_USER_TIMEOUT: 30_000}
GOODBYE = "goodbye"
LINE_S = 5.0  # to say or hear one line, once there is something to hear
DIED = "is gone: its process or its machine died"
# Between hearing of another's failure and ending: where all ranks fail for one reason, each says so itself.
PATIENCE_S = 3.0
LONGEST_LINE = 2000


class RollCall:
    """A context around a run: leaves quietly at its end, tells the others why if it fails, ends this process if they do."""

    def __init__(self, rank: int, world_size: int):
        """Connect; every rank calls this, in a process group with its device set. Raises ValueError if ranks stay away."""
        self.rank, self.host = rank, socket.gethostname()
        self.lines: dict[int, _Line] = {}
        self.done = threading.Event()  # nothing that is heard from now on ends this process
        self.heard = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="roll-call", daemon=True)
        if world_size == 1:
            return
        server = _listen(world_size) if rank == 0 else None
        told: list[Any] = [server and (server.getsockname()[1], secrets.token_hex(16), self.host)]
        torch.distributed.broadcast_object_list(told)
        port, token, host = told[0]
        if server is not None:
            with server:
                self._accept(server, token, world_size)
        else:
            address = (os.environ["MASTER_ADDR"], port)
            try:
                connection = socket.create_connection(address, timeout=MEET_S)
            except OSError as mistake:
                raise ValueError(
                    f"rank {rank} on {self.host} cannot reach rank 0 at {address[0]}, port {port}: {mistake}. Let all ports be "
                    "open between the nodes."
                ) from mistake
            self.lines[0] = _Line(connection, host)
            self.lines[0].say(json.dumps({"token": token, "rank": rank, "host": self.host}))
        os.register_at_fork(after_in_child=self._close)  # else a loader worker would hold its dead parent's line open
        self.thread.start()

    def _accept(self, server: socket.socket, token: str, world_size: int) -> None:
        """Hear everyone who connects at once: a stranger who says nothing, as a port scanner, keeps no rank waiting."""
        until = time.monotonic() + MEET_S
        waiting = selectors.DefaultSelector()
        waiting.register(server, selectors.EVENT_READ, None)
        server.settimeout(LINE_S)
        while len(self.lines) < world_size - 1:
            ready = waiting.select(max(0.0, until - time.monotonic()))
            if not ready or time.monotonic() > until:
                missing = sorted(set(range(1, world_size)) - self.lines.keys())
                raise ValueError(
                    f"ranks {missing} did not reach rank 0 on {self.host}, port {server.getsockname()[1]}, within {MEET_S:.0f} s. "
                    "Let all ports be open between the nodes."
                )
            for key, _ in ready:
                if key.data is None:
                    if accepted := _try(server.accept):  # None if it has gone again
                        line = _Line(accepted[0], "")
                        waiting.register(line.connection, selectors.EVENT_READ, line)
                    continue
                line = key.data
                waiting.unregister(line.connection)
                hello = _parse(line.hear())
                if hello.get("token") == token:
                    line.host = hello["host"]
                    self.lines[hello["rank"]] = line
                else:
                    line.close()
        for key in list(waiting.get_map().values()):
            if key.data is not None:
                key.data.close()

    def __enter__(self) -> "RollCall":
        return self

    def __exit__(self, kind: Any, mistake: BaseException | None, trace: Any) -> None:
        if mistake is None:
            self._tell(GOODBYE)
        elif isinstance(mistake, RuntimeError) and self.heard.wait(PATIENCE_S):
            # A collective failed because a peer is gone. The roll call says which, and ends this process.
            self.thread.join()
        else:
            self.done.set()
            said = f"{type(mistake).__name__}: {mistake}".strip().splitlines()[0]
            self._tell(f"rank {self.rank} on {self.host} failed: {said}"[:LONGEST_LINE])
        self.done.set()

    def _tell(self, message: str) -> None:
        for line in self.lines.values():
            line.say(message)
        if self.rank == 0 and message == GOODBYE and self.thread.is_alive():
            self.thread.join(PATIENCE_S)  # the others' goodbyes

    def _watch(self) -> None:
        """Wait for whatever ends this run."""
        selector = selectors.DefaultSelector()
        for rank, line in self.lines.items():
            selector.register(line.connection, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                line = self.lines[key.data]
                said = line.hear()
                selector.unregister(line.connection)
                if said != GOODBYE and not self.done.is_set():
                    self._end(said or f"rank {key.data} on {line.host} {DIED}")

    def _end(self, message: str) -> None:
        """Pass the message on, and end this process, unless it is failing by itself."""
        self.heard.set()
        if self.rank == 0:
            self._tell(message)
        if not message.endswith(DIED):
            time.sleep(PATIENCE_S)
        if not self.done.is_set():
            log.error("%s; ending rank %d on %s", message, self.rank, self.host)
            logging.shutdown()
            os._exit(PEER_LOST)  # the main thread may wait in a collective that nothing can interrupt

    def _close(self) -> None:
        for line in self.lines.values():
            line.close()


def _listen(backlog: int) -> socket.socket:
    """On any port, of IPv6 and IPv4 where the machine has both."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be built in and switched off
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


class _Line:
    """A connection on which each side says one line. host: the other side's."""

    def __init__(self, connection: socket.socket, host: str):
        connection.settimeout(LINE_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in PROBES.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self.connection, self.host = connection, host
        self.received = connection.makefile("rb")

    def say(self, message: str) -> None:
        _try(lambda: self.connection.sendall(message.encode() + b"\n"))

    def hear(self) -> str:
        """The other side's next line, empty where the connection is lost."""
        return (_try(lambda: self.received.readline(LONGEST_LINE)) or b"").decode(errors="replace").strip()

    def close(self) -> None:
        self.received.close()
        self.connection.close()


def _try(action: Callable[[], Any]) -> Any:
    """None where the other side is gone, which its line tells soon enough."""
    try:
        return action()
    except OSError:
        return None


def _parse(hello: str) -> dict[str, Any]:
    try:
        said = json.loads(hello)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
