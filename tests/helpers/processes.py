"""Start runs as processes, wait for their steps, and kill what a failed test leaves running."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from megabert.files.metrics_format import read_metrics
from tests.conftest import REPOSITORY

_started: list[subprocess.Popen] = []


def start(command: list[str], **environment: str) -> subprocess.Popen:
    """Start a command in a process group of its own, with its output in a pipe."""
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | environment
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=env,
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    _started.append(process)
    return process


def wait_for_step(process: subprocess.Popen, out: Path, step: int) -> None:
    """Wait until the run in the folder `out` has logged this step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if any(record["step"] >= step for record in read_metrics(out / "metrics.jsonl")):
            return
        time.sleep(0.02)
    _kill_group(process)
    raise AssertionError(f"step {step} was not reached: {process.communicate()[0]}")


def kill_started() -> None:
    """Kill the process groups of everything that `start` started."""
    while _started:
        _kill_group(_started.pop())


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
