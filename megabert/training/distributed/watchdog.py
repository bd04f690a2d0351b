"""End all ranks as soon as one of them dies or hangs, and name that rank in the log."""

import contextlib
import hmac
import ipaddress
import json
import logging
import os
import re
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch.distributed

from megabert.config.cli import exit_code
from megabert.data.shards.retry import waited_for_store_at
from megabert.process.exit_codes import EXIT_HANG, EXIT_PEER_LOST
from megabert.training.distributed import flight_recorder
from megabert.training.distributed.hang_detector import HangDetector
from megabert.training.distributed.heartbeat import BEAT_S, Beat, progress
from megabert.training.distributed.rank_env import LOOPBACK, are_ranks_on_one_machine, host_name
from megabert.training.distributed.signals import PEER_REASON, StopSignals

T = TypeVar("T")

log = logging.getLogger(__name__)

# All ranks must connect to rank 0 within this time. They have just met in init_distributed.
CONNECT_TIMEOUT_S = 120.0
# A host that does not answer is given up after 10 + 4 x 5 s.
KEEPALIVE = {socket.TCP_KEEPIDLE: 10, socket.TCP_KEEPINTVL: 5, socket.TCP_KEEPCNT: 4, socket.TCP_USER_TIMEOUT: 30_000}
GOODBYE = "goodbye"
# More messages may follow STOP and a beat; every other message is the last one.
STOP = "stop"
# Messages about beats and hangs begin with these words.
BEAT, HANG = "beat ", "hang: "
# This message gives the exit code for all ranks.
FAILED = re.compile(r"exit (\d+): (.*)")
# Time to send one message, and for a new connection to introduce itself.
MESSAGE_TIMEOUT_S = 5.0
PEER_DIED = "is gone: its process or its machine died"
# Time between learning that another rank failed and ending: if all ranks fail for the same reason, each can log it.
END_DELAY_S = 3.0
MAX_MESSAGE_BYTES = 2000
# A new connection is pending until it turns out to be a stranger or a rank.
PENDING, STRANGER, RANK = "pending", "stranger", "rank"


class RankLostError(OSError):
    """A rank or a loader worker that is gone or out of reach, which is no error of the user."""

    exit_code = EXIT_PEER_LOST


class PeerWatchdog:
    """A context manager around a run: ends this process if another rank fails, and the other ranks if this one does.

    Gloo and NCCL wait for a dead peer until their timeout, or fail with nothing but an address. Here every rank keeps
    a TCP connection to rank 0. The kernel closes the connections of a process that dies, and keepalive probes detect
    a dead host. Rank 0 tells the other ranks which one failed. A request to stop travels the same way, and every few
    seconds so does the progress of each rank (heartbeat.py): rank 0 names a rank that hangs, and the others notice if
    rank 0 hangs.
    """

    def __init__(self, rank: int, world_size: int, signals: StopSignals | None = None, hang_timeout_s: float = 0.0):
        """Connect; every rank calls this in a process group with its device set. Raises RankLostError if one cannot.

        signals: those of this rank. A request to stop that one rank receives is forwarded to the signals of all ranks.
        hang_timeout_s: run.hang_timeout_s; 0 does not look for hangs.
        """
        self.rank, self.host, self.signals = rank, host_name(), signals
        self.hang_timeout_s, self.detector = hang_timeout_s, HangDetector(hang_timeout_s, {}, 0.0)
        progress.restart(hang_timeout_s, waited_for_store_at)
        self.peers: dict[int, _Peer] = {}
        # Once this is set, no message ends this process any more.
        self.closing = threading.Event()
        self.peer_failed = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="peer-watchdog", daemon=True)
        if world_size == 1:
            return
        server = _listen(world_size) if rank == 0 else None
        # Only ranks know the token: it travels through the process group.
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
        hosts = {number: peer.host for number, peer in self.peers.items()} | ({0: self.host} if rank == 0 else {})
        self.detector = HangDetector(hang_timeout_s, hosts, time.monotonic())
        self.thread.start()
        if signals is not None:
            signals.tell_peers = lambda: self._send_all(STOP)

    def _connect(self, port: int, token: str, rank0_host: str) -> None:
        """Connect to rank 0 and introduce this rank."""
        address = LOOPBACK if are_ranks_on_one_machine() else os.environ["MASTER_ADDR"]
        try:
            connection = socket.create_connection((address, port), timeout=CONNECT_TIMEOUT_S)
        except OSError as error:
            raise RankLostError(
                f"rank {self.rank} on {self.host} cannot connect to rank 0 at {address}, port {port}: {error}. "
                "Open all ports between the nodes."
            ) from error
        self.peers[0] = _Peer(connection, rank0_host)
        self.peers[0].send(json.dumps({"token": token, "rank": self.rank, "host": self.host}))

    def _accept(self, server: socket.socket, token: str, world_size: int) -> None:
        """Accept a connection from every other rank, and close those of strangers.

        All connections are read concurrently, each as its bytes arrive: a stranger delays no rank, however slowly it
        sends. Whoever has not introduced itself after MESSAGE_TIMEOUT_S is disconnected.
        """
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        server.settimeout(MESSAGE_TIMEOUT_S)
        strangers: dict[_Peer, float] = {}
        with selectors.DefaultSelector() as selector:
            selector.register(server, selectors.EVENT_READ, None)
            while len(self.peers) < world_size - 1:
                ready, now = selector.select(min(1.0, max(0.0, deadline - time.monotonic()))), time.monotonic()
                if now > deadline:
                    raise _not_connected(set(range(1, world_size)) - self.peers.keys(), self.host, server)
                for key, _ in ready:
                    if key.data is None:
                        if accepted := _none_if_lost(server.accept):
                            peer = _Peer(accepted[0], "")
                            strangers[peer] = now + MESSAGE_TIMEOUT_S
                            selector.register(peer.connection, selectors.EVENT_READ, peer)
                    elif self._greet(key.data, token) != PENDING:
                        selector.unregister(key.fileobj)
                        del strangers[key.data]
                for peer in [peer for peer, until in strangers.items() if now > until]:
                    selector.unregister(peer.connection)
                    del strangers[peer]
                    peer.close()
        for peer in strangers:
            peer.close()

    def _greet(self, peer: "_Peer", token: str) -> str:
        """Read what a new connection has sent. Returns whether it is a rank's, a stranger's, or still unknown."""
        lines = peer.receive()
        if lines == []:
            return PENDING
        hello = _parse_json(lines[0]) if lines else {}
        if not hmac.compare_digest(str(hello.get("token")).encode(), token.encode()):
            peer.close()
            return STRANGER
        peer.host, peer.unread = hello["host"], (lines or [])[1:]
        self.peers[hello["rank"]] = peer
        return RANK

    def __enter__(self) -> "PeerWatchdog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._send_all(GOODBYE)
        elif isinstance(error, RuntimeError) and self.peer_failed.wait(END_DELAY_S):
            # A collective failed because a peer is gone. The watchdog's thread names the peer and ends this process.
            self.thread.join()
        else:
            self.closing.set()
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            message = f"rank {self.rank} on {self.host} failed: {reason}"
            # Exit code 1, a crash, is not forwarded: the other ranks exit with EXIT_PEER_LOST.
            if error is not None and (code := exit_code(error)) != 1:
                message = f"exit {code}: {message}"
            self._send_all(message[: MAX_MESSAGE_BYTES - 1])
        self.closing.set()

    def _send_all(self, message: str) -> None:
        for peer in self.peers.values():
            peer.send(message)
        if self.rank == 0 and message == GOODBYE and self.thread.is_alive():
            # Wait until the other ranks have sent their goodbye too.
            self.thread.join(END_DELAY_S)

    def _watch(self) -> None:
        """Read each peer's messages; end this process at any other than a goodbye or a request to stop."""
        selector = selectors.DefaultSelector()
        for rank, peer in self.peers.items():
            if not peer.unread or self._stays(rank, peer.unread):
                selector.register(peer.connection, selectors.EVENT_READ, rank)
        # The period is short enough that a hang is named soon after its limit.
        period_s = min(BEAT_S, self.hang_timeout_s / 4) if self.hang_timeout_s else None
        beaten_at = time.monotonic()
        while selector.get_map():
            for key, _ in selector.select(period_s):
                if not self._stays(key.data, self.peers[key.data].receive()):
                    selector.unregister(key.fileobj)
                    self.detector.forget(key.data)
            if period_s is not None and (now := time.monotonic()) >= beaten_at + period_s:
                self._beat(now, was_stopped=now > beaten_at + 2 * period_s + MESSAGE_TIMEOUT_S)
                beaten_at = now

    def _beat(self, now: float, was_stopped: bool) -> None:
        """Send this rank's progress to the peers, and end if one hangs.

        was_stopped: whether this process was suspended until now. All time limits then start again.
        """
        if was_stopped:
            progress.advance()
            self.detector.restart(now)
        beat = progress.beat()
        self._send_all(BEAT + beat.to_line())
        if self.rank == 0:
            self.detector.update(0, beat, now)
        if (hang := self.detector.find_hang(now)) and not self.closing.is_set():
            self._end(HANG + hang)

    def _stays(self, rank: int, lines: list[str] | None) -> bool:
        """Act on what a peer has sent, None for a lost connection. Returns False if nothing more comes from it."""
        if lines and STOP in lines:
            self._stop()
        for line in lines or []:
            if line.startswith(BEAT):
                self.detector.update(rank, Beat.from_line(line.removeprefix(BEAT)), time.monotonic())
        rest = [line for line in lines or [] if line != STOP and not line.startswith(BEAT)]
        if lines is not None and not rest:
            return True
        message = rest[0] if rest else ""
        if message != GOODBYE and not self.closing.is_set():
            self._end(message or f"rank {rank} on {self.peers[rank].host} {PEER_DIED}")
        return False

    def _stop(self) -> None:
        """Ask this rank to stop, since another one was asked to, and on rank 0 all others."""
        if self.rank == 0:
            self._send_all(STOP)
        if self.signals is not None:
            self.signals.request(PEER_REASON)

    def _end(self, message: str) -> None:
        """Forward the message, and end this process unless it is already failing on its own."""
        self.peer_failed.set()
        if self.rank == 0:
            self._send_all(message)
        if not message.endswith(PEER_DIED):
            time.sleep(END_DELAY_S)
        if not self.closing.is_set():
            code = EXIT_PEER_LOST
            if failed := FAILED.fullmatch(message):
                code, message = int(failed[1]), failed[2]
            if message.startswith(HANG):
                code, message = EXIT_HANG, message.removeprefix(HANG)
                log.error("%s", flight_recorder.dump_collectives(self.rank))
            log.error("%s; ending rank %d on %s", message, self.rank, self.host)
            logging.shutdown()
            # The main thread may be in a collective, which nothing can interrupt.
            os._exit(code)

    def _close(self) -> None:
        for peer in self.peers.values():
            peer.close()


def _listen(backlog: int) -> socket.socket:
    """Listen on a free port, only where ranks can come from.

    That is the loopback interface if all are on this machine; else the one of MASTER_ADDR. If MASTER_ADDR is not an
    address of this machine's network, for example because the host's name resolves to 127.0.1.1, it is every interface.
    """
    if are_ranks_on_one_machine():
        return socket.create_server((LOOPBACK, 0), backlog=backlog)
    with contextlib.suppress(OSError):
        for family, _, _, _, address in socket.getaddrinfo(os.environ["MASTER_ADDR"], 0, type=socket.SOCK_STREAM):
            if not ipaddress.ip_address(address[0]).is_loopback:
                return socket.create_server(address[:2], family=family, backlog=backlog)
    if socket.has_dualstack_ipv6():
        # IPv6 may be built in but disabled.
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)


def _not_connected(missing: set[int], host: str, server: socket.socket) -> RankLostError:
    return RankLostError(
        f"ranks {sorted(missing)} did not connect to rank 0 on {host}, port {server.getsockname()[1]}, within "
        f"{CONNECT_TIMEOUT_S:.0f} s. Open all ports between the nodes."
    )


class _Peer:
    """A connection on which each side sends lines. host: the other side's machine."""

    def __init__(self, connection: socket.socket, host: str):
        connection.settimeout(MESSAGE_TIMEOUT_S)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEPALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self.connection, self.host = connection, host
        # Bytes of a line that is not complete.
        self.received = b""
        # Lines that came together with the introduction.
        self.unread: list[str] = []

    def send(self, message: str) -> None:
        _none_if_lost(lambda: self.connection.sendall(message.encode() + b"\n"))

    def receive(self) -> list[str] | None:
        """Return the lines that the arrived bytes complete; None if the connection is lost. Does not wait for more."""
        arrived = _none_if_lost(lambda: self.connection.recv(MAX_MESSAGE_BYTES))
        *lines, self.received = (self.received + (arrived or b"")).split(b"\n")
        if not lines and (not arrived or len(self.received) > MAX_MESSAGE_BYTES):
            return None
        return [line.decode(errors="replace").strip() for line in lines]

    def close(self) -> None:
        self.connection.close()


def _none_if_lost(action: Callable[[], T]) -> T | None:
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
