"""Start ranks that only watch each other, and wait for their ends."""

import os
import sys
import time
from pathlib import Path

from tests.helpers import warm
from tests.helpers.ports import free_port


def start_ranks(folder: Path, *actions: str, **environment: str) -> list[warm.Process]:
    """Start one process per action, each with a log file of its own, and wait until the watchdog connects them."""
    shared = {"WORLD_SIZE": str(len(actions)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank, action in enumerate(actions):
        command = [sys.executable, "tests/training/helpers/watchdog_rank.py", action]
        env = os.environ | shared | environment | {"RANK": str(rank), "OMP_NUM_THREADS": "1"}
        ranks.append(warm.popen(command, env, folder / f"{rank}.log"))
    deadline = time.monotonic() + 300
    while not all("connected" in (folder / f"{rank}.log").read_text() for rank in range(len(actions))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return ranks


def results_of(folder: Path, ranks: list[warm.Process]) -> list[tuple[int, str]]:
    """Return (exit code, output after "connected") of every rank; none may take long to end."""
    try:
        codes = [process.wait(30) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    logs = [(folder / f"{rank}.log").read_text() for rank in range(len(ranks))]
    return [(code, log.removeprefix("connected\n")) for code, log in zip(codes, logs, strict=True)]
