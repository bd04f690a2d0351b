"""Start runs as processes, wait for their steps, and kill what a failed test leaves running."""

import contextlib
import os
import signal
import time
from pathlib import Path

from megabert.files.metrics_format import read_metrics
from tests.helpers import warm

_started: list[warm.Process] = []


def start(command: list[str], **environment: str) -> warm.Process:
    """Start a command in a process group of its own, with its output in a pipe."""
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | environment
    process = warm.popen(command, env)
    _started.append(process)
    return process


def wait_for_step(process: warm.Process, out: Path, step: int) -> None:
    """Wait until the run in the folder `out` has logged this step."""
    deadline = time.monotonic() + 600
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


def _kill_group(process: warm.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
