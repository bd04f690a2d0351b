"""A rank that dies ends all other ranks, which name it in their logs; no process is left."""

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import psutil
import pytest

from megabert.process.exit_codes import EXIT_PEER_LOST, EXIT_USER_ERROR
from megabert.training.distributed import watchdog
from megabert.training.distributed.signals import PEER_REASON, StopSignals
from megabert.training.distributed.watchdog import GOODBYE, PEER_DIED, STOP, PeerWatchdog, RankLostError
from tests.helpers.ports import free_port
from tests.helpers.processes import start, wait_for_step
from tests.helpers.runs import Corpus, finish_ranks, pretrain_command
from tests.helpers.runs import start_ranks as warm_ranks
from tests.training.helpers.watched_ranks import results_of, start_ranks

HOST = socket.gethostname()
OWN_ADDRESSES = [
    address.address
    for addresses in psutil.net_if_addrs().values()
    for address in addresses
    if address.family == socket.AF_INET and not address.address.startswith("127.")
]


def test_ranks_that_return_log_nothing(tmp_path):
    assert results_of(tmp_path, start_ranks(tmp_path, "return", "return", "return")) == [(0, "")] * 3


@pytest.mark.parametrize(("dead", "others"), [(1, "wait"), (0, "wait"), (2, "all_reduce")])
def test_a_rank_that_dies_is_named_and_ends_the_others(tmp_path, dead, others):
    """Both in Python code and in a collective that waits for the dead rank."""
    ranks = start_ranks(tmp_path, *["wait" if rank == dead else others for rank in range(3)])
    ranks[dead].kill()
    for rank, (code, output) in enumerate(results_of(tmp_path, ranks)):
        if rank != dead:
            assert code == EXIT_PEER_LOST
            assert output.splitlines()[-1] == (f"rank {dead} on {HOST} {PEER_DIED}; ending rank {rank} on {HOST}")


def test_a_rank_that_fails_alone_sends_the_others_its_error(tmp_path):
    results = results_of(tmp_path, start_ranks(tmp_path, "wait", "raise"))
    assert results[0] == (
        EXIT_USER_ERROR,
        f"rank 1 on {HOST} failed: ValueError: rank 1 has a bad shard; ending rank 0 on {HOST}\n",
    )
    assert results[1][0] == 1
    assert "ValueError: rank 1 has a bad shard" in results[1][1]


def test_ranks_that_fail_together_each_log_their_own_error(tmp_path):
    for rank, (code, output) in enumerate(results_of(tmp_path, start_ranks(tmp_path, "raise", "raise"))):
        assert code == 1
        assert f"rank {rank} has a bad shard" in output
        assert "ending rank" not in output


@pytest.mark.parametrize("last", [GOODBYE, "rank 1 on node1 failed: ValueError: a bad shard", ""])
def test_what_a_rank_sends_together_with_its_introduction_is_read(monkeypatch, last):
    """A rank that ends at once has sent all it has to say before rank 0 reads anything."""
    rank0, server, ends = PeerWatchdog(0, 1), watchdog._listen(1), []
    monkeypatch.setattr(rank0, "_end", ends.append)
    with socket.create_connection(("127.0.0.1", server.getsockname()[1])) as connection:
        hello = json.dumps({"token": "secret", "rank": 1, "host": "node1"})
        connection.sendall("".join(f"{line}\n" for line in (hello, STOP, last) if line).encode())
    with server:
        rank0._accept(server, "secret", 2)
    rank0.thread.start()
    rank0.thread.join(30)
    assert not rank0.thread.is_alive()
    assert ends == {GOODBYE: [], "": [f"rank 1 on node1 {PEER_DIED}"]}.get(last, [last])


def test_strangers_delay_no_rank(monkeypatch):
    """97 connections that send nothing, or nonsense, come before the ranks; each alone may block for a minute."""
    monkeypatch.setattr(watchdog, "MESSAGE_TIMEOUT_S", 60.0)
    rank0, server = PeerWatchdog(0, 1), watchdog._listen(128)
    port = server.getsockname()[1]
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(97)]
    nonsense = (b"[" * 1900 + b"\n", b"9" * 1900 + b"\n", b"x" * 5000, b"\xff\n", b"{}\n")
    for stranger, line in zip(strangers, nonsense, strict=False):
        stranger.sendall(line)
    strangers.pop().close()
    ranks = [socket.create_connection(("localhost", port)) for _ in range(2)]
    for rank, connection in enumerate(ranks, start=1):
        connection.sendall(json.dumps({"token": "secret", "rank": rank, "host": f"node{rank}"}).encode() + b"\n")
    accepting = threading.Thread(target=rank0._accept, args=(server, "secret", 3), daemon=True)
    accepting.start()
    accepting.join(30)
    assert {rank: peer.host for rank, peer in rank0.peers.items()} == {1: "node1", 2: "node2"}
    for connection in (*strangers, *ranks, server):
        connection.close()
    rank0._close()


def test_a_greeting_that_drips_holds_no_rank(monkeypatch):
    """A connection that sends a byte now and then is closed after MESSAGE_TIMEOUT_S."""
    monkeypatch.setattr(watchdog, "MESSAGE_TIMEOUT_S", 0.5)
    rank0, server = PeerWatchdog(0, 1), watchdog._listen(4)
    stranger = socket.create_connection(server.getsockname())
    accepting = threading.Thread(target=rank0._accept, args=(server, "secret", 2), daemon=True)
    accepting.start()
    began = time.monotonic()
    with contextlib.suppress(ConnectionError):
        while time.monotonic() < began + 20:
            stranger.sendall(b"{")
            time.sleep(0.1)
    assert 0.4 < time.monotonic() - began < 10
    assert accepting.is_alive()
    # A rank of a busy machine has time enough.
    monkeypatch.setattr(watchdog, "MESSAGE_TIMEOUT_S", 30.0)
    rank = socket.create_connection(server.getsockname())
    rank.sendall(b'{"token": "secret", ')
    # A greeting may arrive in parts.
    time.sleep(0.1)
    rank.sendall(b'"rank": 1, "host": "node1"}\n')
    accepting.join(30)
    assert {number: peer.host for number, peer in rank0.peers.items()} == {1: "node1"}
    for connection in (stranger, rank, server):
        connection.close()
    rank0._close()


@pytest.mark.parametrize(
    ("variables", "address"),
    [
        ({}, "127.0.0.1"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "127.0.0.1"),
        ({"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "node0"}, "127.0.0.1"),
        # Not an address of this machine.
        ({"WORLD_SIZE": "2", "LOCAL_SIZE": "1", "MASTER_ADDR": "10.255.0.77"}, "::"),
        *[({"WORLD_SIZE": "2", "LOCAL_SIZE": "1", "MASTER_ADDR": own}, own) for own in OWN_ADDRESSES],
    ],
)
def test_rank_0_listens_only_where_ranks_are(monkeypatch, variables, address):
    for name in ("WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if address == "::" and not socket.has_dualstack_ipv6():
        address = "0.0.0.0"
    with watchdog._listen(1) as server:
        assert server.getsockname()[0] == address


def listening_addresses(pid: int) -> set[str]:
    connections = psutil.Process(pid).net_connections("inet")
    return {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_on_one_machine_listens_on_the_loopback_interface_only(corpus: Corpus, tmp_path, ranks):
    """The store, gloo and the watchdog."""
    processes = warm_ranks(pretrain_command(corpus, tmp_path, "--run.max_steps=100000"), ranks)
    wait_for_step(processes[0], tmp_path, 3)
    found = [listening_addresses(process.pid) for process in processes]
    for process in processes:
        process.terminate()
    finish_ranks(processes, timeout_s=60)
    assert set().union(*found) <= {"127.0.0.1"}
    assert ranks == 1 or found[0] == {"127.0.0.1"}


def test_a_stop_is_passed_on_to_all_ranks_once():
    """Rank 1 is asked to stop; rank 0 passes it on to rank 2, which is not confused by hearing it twice."""
    pairs = {rank: socket.socketpair() for rank in (1, 2)}
    rank0, asked = PeerWatchdog(0, 1), []
    rank0.signals = StopSignals(embedded=True)
    rank0.signals.request = asked.append  # type: ignore[method-assign]
    rank0.peers = {rank: watchdog._Peer.__new__(watchdog._Peer) for rank in pairs}
    for rank, peer in rank0.peers.items():
        peer.connection, peer.host, peer.received, peer.unread = pairs[rank][0], f"node{rank}", b"", []
        pairs[rank][1].settimeout(30)
    rank0.thread.start()
    pairs[1][1].sendall(b"stop\nstop\n")
    assert pairs[2][1].recv(100) == b"stop\n"
    pairs[1][1].sendall(b"goodbye\n")
    pairs[2][1].sendall(b"goodbye\n")
    rank0.thread.join(10)
    assert not rank0.thread.is_alive()
    assert asked == [PEER_REASON]


def test_ranks_that_do_not_connect_are_named(monkeypatch):
    monkeypatch.setattr(watchdog, "CONNECT_TIMEOUT_S", 0.2)
    with watchdog._listen(4) as server, pytest.raises(RankLostError, match=r"ranks \[1, 2\] did not connect to rank 0"):
        PeerWatchdog(0, 1)._accept(server, "secret", 3)


def assert_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


def test_a_killed_rank_ends_the_others_and_frees_their_port(corpus: Corpus, tmp_path: Path):
    """With loader workers: forks of their rank, which must not keep its connection open."""
    port = free_port()
    command = pretrain_command(corpus, tmp_path, "--run.max_steps=100000", "--data.num_workers=2")
    ranks = warm_ranks(command, 2, MASTER_PORT=str(port))
    wait_for_step(ranks[0], tmp_path, 3)
    workers = [child for rank in ranks for child in psutil.Process(rank.pid).children(recursive=True)]
    assert len(workers) >= 4
    ranks[1].kill()
    done = finish_ranks(ranks, timeout_s=60)
    assert ranks[0].returncode == EXIT_PEER_LOST
    assert f"rank 1 on {HOST} {PEER_DIED}" in done.output
    assert not psutil.wait_procs(workers, timeout=300)[1]
    assert_free(port)


@pytest.mark.nightly
def test_a_killed_rank_ends_the_job_and_frees_its_port(corpus: Corpus, tmp_path: Path):
    """The same with the launcher."""
    command = pretrain_command(corpus, tmp_path, "--run.max_steps=100000", "--data.num_workers=2", ranks=2)
    port = int(command[command.index("--master_port") + 1])
    process = start(command)
    wait_for_step(process, tmp_path, 3)
    launchers = {child.pid for child in psutil.Process(process.pid).children()}
    descendants = psutil.Process(process.pid).children(recursive=True)
    victim = next(child for child in descendants if "--local_rank=1" in child.cmdline() and child.ppid() in launchers)
    killed_at = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, 1, 85)
    _, alive = psutil.wait_procs(descendants, timeout=60 - (time.monotonic() - killed_at))
    assert not alive
    assert f"rank 1 on {HOST} {PEER_DIED}" in output
    assert_free(port)
