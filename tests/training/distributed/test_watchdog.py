"""A rank that dies ends the whole job, which says who it was; nothing is left behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from megabert.training.distributed import watchdog
from megabert.training.distributed.watchdog import DIED, PEER_LOST, RollCall
from tests.conftest import REPOSITORY, Corpus, free_port, pretrain_command
from tests.training.distributed.test_signals import start, wait_for_step

HOST = socket.gethostname()


def start_ranks(folder: Path, *does: str) -> list[subprocess.Popen]:
    """One process per rank, each doing as it is told, all past the roll call; each writes to a file of its own."""
    shared = {"WORLD_SIZE": str(len(does)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank, what in enumerate(does):
        with open(folder / f"{rank}.log", "w") as file:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "tests/training/distributed/watchdog_rank.py", what],
                    cwd=REPOSITORY,
                    env=os.environ | shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    until = time.monotonic() + 60
    while not all("here" in (folder / f"{rank}.log").read_text() for rank in range(len(does))):
        assert time.monotonic() < until
        time.sleep(0.05)
    return ranks


def ends(folder: Path, ranks: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit code, output after "here") of every rank; none may take long."""
    try:
        codes = [process.wait(30) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(code, (folder / f"{rank}.log").read_text().removeprefix("here\n")) for rank, code in enumerate(codes)]


def test_all_leave_quietly(tmp_path):
    assert ends(tmp_path, start_ranks(tmp_path, "leave", "leave", "leave")) == [(0, "")] * 3


@pytest.mark.parametrize(("dead", "others"), [(1, "wait"), (0, "wait"), (2, "collect")])
def test_a_rank_that_dies_is_named_and_ends_the_others(tmp_path, dead, others):
    """Wherever they are: in Python, or in a collective that waits for it."""
    ranks = start_ranks(tmp_path, *["wait" if rank == dead else others for rank in range(3)])
    ranks[dead].kill()
    for rank, (code, output) in enumerate(ends(tmp_path, ranks)):
        if rank != dead:
            assert code == PEER_LOST
            assert output.splitlines()[-1] == (f"rank {dead} on {HOST} {DIED}; ending rank {rank} on {HOST}")


def test_a_rank_that_fails_alone_tells_the_others_why(tmp_path):
    ended = ends(tmp_path, start_ranks(tmp_path, "wait", "fail"))
    assert ended[0] == (
        PEER_LOST,
        f"rank 1 on {HOST} failed: ValueError: rank 1 has a bad shard; ending rank 0 on {HOST}\n",
    )
    assert ended[1][0] == 1
    assert "ValueError: rank 1 has a bad shard" in ended[1][1]


def test_ranks_that_fail_together_each_say_so_themselves(tmp_path):
    for rank, (code, output) in enumerate(ends(tmp_path, start_ranks(tmp_path, "fail", "fail"))):
        assert code == 1
        assert f"rank {rank} has a bad shard" in output
        assert "ending rank" not in output


def test_strangers_keep_no_rank_waiting(monkeypatch):
    """A hundred who say nothing, or nonsense, connect before the ranks do; each alone may take a minute."""
    monkeypatch.setattr(watchdog, "LINE_S", 60.0)
    call, server = RollCall(0, 1), watchdog._listen(128)
    port = server.getsockname()[1]
    strangers = [socket.create_connection(("127.0.0.1", port)) for _ in range(97)]
    for stranger, said in zip(
        strangers, (b"[" * 1900 + b"\n", b"9" * 1900 + b"\n", b"x" * 5000, b"\xff\n", b"{}\n"), strict=False
    ):
        stranger.sendall(said)
    strangers.pop().close()
    ranks = [socket.create_connection(("localhost", port)) for _ in range(2)]
    for rank, connection in enumerate(ranks, start=1):
        connection.sendall(json.dumps({"token": "secret", "rank": rank, "host": f"node{rank}"}).encode() + b"\n")
    waiting = threading.Thread(target=call._accept, args=(server, "secret", 3), daemon=True)
    waiting.start()
    waiting.join(30)
    assert {rank: line.host for rank, line in call.lines.items()} == {1: "node1", 2: "node2"}
    for connection in (*strangers, *ranks, server):
        connection.close()
    call._close()


def test_ranks_that_stay_away_are_named(monkeypatch):
    monkeypatch.setattr(watchdog, "MEET_S", 0.2)
    with watchdog._listen(4) as server, pytest.raises(ValueError, match=r"ranks \[1, 2\] did not reach rank 0"):
        RollCall(0, 1)._accept(server, "secret", 3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_rank_ends_the_job_and_frees_its_port(corpus: Corpus, tmp_path: Path, workers):
    """Loader workers are copies of their rank: they must not keep its connection alive."""
    command = pretrain_command(corpus, tmp_path, "--run.max_steps=100000", f"--data.num_workers={workers}", ranks=2)
    port = int(command[command.index("--master_port") + 1])
    process = start(command)
    wait_for_step(process, tmp_path, 3)
    launchers = {child.pid for child in psutil.Process(process.pid).children()}
    everyone = psutil.Process(process.pid).children(recursive=True)
    victim = next(child for child in everyone if "--local_rank=1" in child.cmdline() and child.ppid() in launchers)
    began = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode not in (0, 1, 85)
    _, alive = psutil.wait_procs(everyone, timeout=60 - (time.monotonic() - began))
    assert not alive
    assert f"rank 1 on {HOST} {DIED}" in output
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))
