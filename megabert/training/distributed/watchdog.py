"""A watchdog that ends all ranks as soon as one of them dies, and names that rank in the log."""

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

EXIT_PEER_LOST = 86  # exit code of a rank that ended because another one is gone
CONNECT_TIMEOUT_S = 120.0  # for all ranks to connect to rank 0; they have just met in init_distributed
# A host that does not answer is given up after 10 + 4 x 5 s.
KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4, socket.TCP_USER_TIMEOUT: 30_000}
GOODBYE = "goodbye"
MESSAGE_TIMEOUT_S = 5.0  # to send one message, or to receive one whose first byte has arrived
PEER_DIED = "is gone: its process or its machine died"
# Time between learning that another rank failed and ending: if all ranks fail for the same reason, each can log it.
END_DELAY_S = 3.0
MAX_MESSAGE_BYTES = 2000


class PeerWatchdog:
    """A context manager around a run: ends this process if another rank fails, and the other ranks if this one does.

    Gloo and NCCL wait for a dead peer until their timeout, or fail with nothing but an address. Here every rank keeps
    a TCP connection to rank 0. The kernel closes the connections of a process that dies, and keepalive probes detect
    a dead host. Rank 0 forwards which rank it was.
    """

    def __init__(self, rank: int, world_size: int):
        """Connect; every rank calls this in a process group with its device set. Raises ValueError if one cannot."""
        self.rank, self.host = rank, socket.gethostname()
        self.peers: dict[int, _Peer] = {}
        self.closing = threading.Event()  # once set, no message ends this process any more
        self.peer_failed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="peer-watchdog", daemon=True)
        if world_size == 1:
            return
        server = _listen(world_size) if rank == 0 else None
        address: list[Any] = [server and (server.getsockname()[1], secrets.token_hex(16), self.host)]
        torch.distributed.broadcast_object_list(address)
        port, token, rank0_host = address[0]
        if server is not None:
            with server:
                self._accept(server, token, world_size)
        else:
            self._connect(port, token, rank0_host)
        # Without this, a loader worker would keep its dead parent's connection open.
        os.register_at_fork(after_in_child=self._close)
        self.thread.start()

    def _connect(self, port: int, token: str, rank0_host: str) -> None:
        """Connect to rank 0 and introduce this rank."""
        address = os.environ["MASTER_ADDR"]
        try:
            connection = socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S)
        except OSError as error:
            raise ValueError(
                f"rank {self.rank} on {self.host} cannot connect to rank 0 at {address}, port {port}: {error}. "
                "Open all ports between the nodes."
            ) from error
        self.peers[0] = _Peer(connection, rank0_host)
        self.peers[0].send(json.dumps({"token": token, "rank": self.rank, "host": self.host}))

    def _accept(self, server: socket.socket, token: str, world_size: int) -> None:
        """Accept a connection from every other rank.

        All connections are read concurrently: a stranger that sends nothing, such as a port scanner, delays no rank.
        """
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        selector = selectors.DefaultSelector()
        selector.register(server, selectors.EVENT_READ, None)
        server.settimeout(MESSAGE_TIMEOUT_S)
        while len(self.peers) < world_size - 1:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready or time.monotonic() > deadline:
                missing = sorted(set(range(1, world_size)) - self.peers.keys())
                raise ValueError(
                    f"ranks {missing} did not connect to rank 0 on {self.host}, port {server.getsockname()[1]}, within "
                    f"{CONNECT_TIMEOUT_S:.0f} s. Open all ports between the nodes."
                )
            for key, _ in ready:
                if key.data is None:
                    if accepted := _none_if_lost(server.accept):
                        peer = _Peer(accepted[0], "")
                        selector.register(peer.connection, selectors.EVENT_READ, peer)
                    continue
                peer = key.data
                selector.unregister(peer.connection)
                hello = _parse_json(peer.receive())
                if hello.get("token") == token:
                    peer.host = hello["host"]
                    self.peers[hello["rank"]] = peer
                else:
                    peer.close()
        for key in list(selector.get_map().values()):
            if key.data is not None:
                key.data.close()

    def __enter__(self) -> "PeerWatchdog":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self._send_all(GOODBYE)
        elif isinstance(error, RuntimeError) and self.peer_failed.wait(END_DELAY_S):
            # A collective failed because a peer is gone. The watchdog's thread names the peer and ends this process.
            self.thread.join()
        else:
            self.closing.set()
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            self._send_all(f"rank {self.rank} on {self.host} failed: {reason}"[:MAX_MESSAGE_BYTES])
        self.closing.set()

    def _send_all(self, message: str) -> None:
        for peer in self.peers.values():
            peer.send(message)
        if self.rank == 0 and message == GOODBYE and self.thread.is_alive():
            self.thread.join(END_DELAY_S)  # until the other ranks have said goodbye too

    def _watch(self) -> None:
        """Read each peer's one message; end this process unless it is a goodbye."""
        selector = selectors.DefaultSelector()
        for rank, peer in self.peers.items():
            selector.register(peer.connection, selectors.EVENT_READ, rank)
        while selector.get_map():
            for key, _ in selector.select():
                peer = self.peers[key.data]
                message = peer.receive()
                selector.unregister(peer.connection)
                if message != GOODBYE and not self.closing.is_set():
                    self._end(message or f"rank {key.data} on {peer.host} {PEER_DIED}")

    def _end(self, message: str) -> None:
        """Forward the message, and end this process unless it is already failing on its own."""
        self.peer_failed.set()
        if self.rank == 0:
            self._send_all(message)
        if not message.endswith(PEER_DIED):
            time.sleep(END_DELAY_S)
        if not self.closing.is_set():
            log.error("%s; ending rank %d on %s", message, self.rank, self.host)
            logging.shutdown()
            os._exit(EXIT_PEER_LOST)  # the main thread may be in a collective, which nothing can interrupt

    def _close(self) -> None:
        for peer in self.peers.values():
            peer.close()


def _listen(backlog: int) -> socket.socket:
    """Listen on a free port, on IPv6 and IPv4 if the machine has both."""
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # IPv6 may be built in but disabled
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


class _Peer:
    """A connection on which each side sends one line. host: the other side's machine."""

    def __init__(self, connection: socket.socket, host: str):
        connection.settimeout(MESSAGE_TIMEOUT_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self.connection, self.host = connection, host
        self.reader = connection.makefile("rb")

    def send(self, message: str) -> None:
        _none_if_lost(lambda: self.connection.sendall(message.encode() + b"\n"))

    def receive(self) -> str:
        """Return the next line; empty if the connection is lost."""
        return (_none_if_lost(lambda: self.reader.readline(MAX_MESSAGE_BYTES)) or b"").decode(errors="replace").strip()

    def close(self) -> None:
        self.reader.close()
        self.connection.close()


def _none_if_lost(action: Callable[[], Any]) -> Any:
    """Return action(), or None if the connection is lost: `_watch` notices that by itself."""
    try:
        return action()
    except OSError:
        return None


def _parse_json(line: str) -> dict[str, Any]:
    """Parse a JSON object; anything else is an empty dict."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
