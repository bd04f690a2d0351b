"""Start Python scripts without waiting for torch, DeepSpeed or transformers to load: warm_server.py forks them.

A script gets a process, session, environment, folder, files and signals of its own, as with subprocess.
"""

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Literal

import filelock

from tests.helpers.warm_server import STAY

SERVER = Path(__file__).with_name("warm_server.py")
REPOSITORY = Path(__file__).resolve().parents[2]
# What a script is forked from: a process that has loaded megabert and DeepSpeed, or transformers without megabert.
Preload = Literal["megabert", "transformers"]
# What must be known before Python, torch or DeepSpeed is loaded: scripts with another value are started cold.
READ_AT_START = ("PYTHONPATH", "PYTHONSTARTUP", "LD_PRELOAD", "DS_ACCELERATOR", "MALLOC_CONF", "CUDA_VISIBLE_DEVICES")
AT_START = dict(os.environ)
SCRIPTS = (
    "launch/pretrain.py",
    "launch/finetune_glue.py",
    "launch/pareto.py",
    "launch/convert_to_hf.py",
    "launch/convert_from_hf.py",
    "launch/quickstart/summarize.py",
    "tests/helpers/scripts/many_runs.py",
    "tests/training/helpers/traps.py",
    "tests/training/helpers/watchdog_rank.py",
    "tests/helpers/scripts/forked_launcher.py",
    "tests/helpers/scripts/inject.py",
    "tests/helpers/scripts/patched.py",
    "tests/helpers/scripts/run_code.py",
    "tests/helpers/scripts/witness.py",
)


class WarmProcess:
    """The part of subprocess.Popen that tests use. outputs: the descriptors of stdout and stderr."""

    def __init__(
        self,
        argv: list[str],
        env: dict[str, str],
        outputs: tuple[int, int],
        preload: Preload = "megabert",
        cwd: Path = REPOSITORY,
    ):
        self.args = argv
        self.returncode: int | None = None
        with open(os.devnull, "rb") as nothing:
            connection = _connect(preload)
            request = json.dumps({"argv": argv, "env": env, "cwd": str(cwd)}).encode()
            socket.send_fds(connection, [request], [nothing.fileno(), *outputs])
        self.pid = int(connection.recv(64))
        self._done = threading.Event()
        self._connection = connection
        threading.Thread(target=self._collect, daemon=True).start()
        self.stdout: IO[str] | None = None

    def _collect(self) -> None:
        with self._connection:
            self.returncode = int(self._connection.recv(64) or b"-9")
        self._done.set()

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if not self._done.wait(timeout):
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Read the output to its end. Raises TimeoutExpired."""
        until = None if timeout is None else time.monotonic() + timeout
        parts: list[str] = []
        if self.stdout is not None:
            reader = threading.Thread(target=lambda file: parts.append(file.read()), args=(self.stdout,), daemon=True)
            reader.start()
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self.stdout.close()
            self.stdout = None
        self.wait(None if until is None else max(0.0, until - time.monotonic()))
        return "".join(parts), None

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = WarmProcess | subprocess.Popen[str]


def popen(
    command: list[str], env: dict[str, str], output: Path | None = None, preload: Preload = "megabert"
) -> Process:
    """Start a command from the repository's root, warm if it is one of SCRIPTS or needs transformers.

    output: the file for what it prints, stdout and stderr; without one it is a pipe, the result's .stdout.
    """
    script = command[1].removeprefix(f"{REPOSITORY}/") if len(command) > 1 else ""
    same = all(env.get(name) == _of_server(name) for name in READ_AT_START)
    known = script in SCRIPTS or preload == "transformers"
    cold = command[0] != sys.executable or not known or not same
    reading, writing = (
        os.pipe() if output is None else (None, os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666))
    )
    try:
        process = (
            _popen_cold(command, env, writing) if cold else WarmProcess(command[1:], env, (writing, writing), preload)
        )
    finally:
        os.close(writing)
    if reading is not None:
        process.stdout = open(reading, errors="replace")
    return process


def _popen_cold(command: list[str], env: dict[str, str], output: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True,
        start_new_session=True,
    )  # fmt: skip


def _of_server(name: str) -> str | None:
    """Return the value that a variable has in the servers: they have loaded DeepSpeed for a CPU."""
    return "cpu" if name == "DS_ACCELERATOR" else AT_START.get(name)


def run_check(command: list[str], cwd: str, env: dict[str, str], **_) -> "subprocess.CompletedProcess[str]":
    """Run `python -P SCRIPT ...` as subprocess.run with capture_output does, from transformers without megabert."""
    python, isolated, *argv = command
    assert (python, isolated) == (sys.executable, "-P")
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = WarmProcess(argv, env, (stdout.fileno(), stderr.fileno()), "transformers", Path(cwd))
        code = process.wait()
        stdout.seek(0)
        stderr.seek(0)
        return subprocess.CompletedProcess(command, code, stdout.read(), stderr.read())


# In the place of the module subprocess in export_check, it forks the process of every check.
CHECKS = SimpleNamespace(run=run_check)


def _connect(preload: Preload) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(_server(preload))
    return connection


# Connections and processes that keep the servers running until this process ends.
USED: list[object] = []


@functools.cache
def _server(preload: Preload) -> str:
    """Start the server once per test run; returns its socket when it listens."""
    # A socket's path may have 107 bytes.
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    path = os.path.join(tempfile.gettempdir(), f"mb-{run}-{preload[0]}")
    with filelock.FileLock(f"{path}.lock"):
        if not _become_user(path):
            paths = [str(REPOSITORY), AT_START.get("PYTHONPATH", "")]
            env = AT_START | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": ":".join(filter(None, paths))}
            if preload == "transformers":
                env["HF_HUB_OFFLINE"] = "1"
            Path(path).unlink(missing_ok=True)
            command = [sys.executable, str(SERVER), path, preload]
            process = subprocess.Popen(command, cwd=REPOSITORY, env=env, stdin=subprocess.PIPE, start_new_session=True)
            USED.append(process)
            while not _become_user(path):
                assert process.poll() is None, "the warm server ended"
                time.sleep(0.05)
    return path


def _become_user(path: str) -> bool:
    """Open a connection for which the server stays. False if there is no server."""
    user = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.suppress(FileNotFoundError, ConnectionError):
        user.connect(path)
        user.send(STAY)
        if user.recv(64) == STAY:
            USED.append(user)
            return True
    user.close()
    return False
