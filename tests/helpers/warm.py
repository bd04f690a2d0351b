"""Start Python scripts of the project without waiting for torch and DeepSpeed to load: warm_server.py forks them.

A script gets a process, session, environment, folder, files and signals of its own, as with subprocess.
"""

import atexit
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
from typing import IO

SERVER = Path(__file__).with_name("warm_server.py")
REPOSITORY = Path(__file__).resolve().parents[2]
# What must be known before Python, torch or DeepSpeed is loaded: scripts with another value are started cold.
READ_AT_START = ("PYTHONPATH", "PYTHONSTARTUP", "LD_PRELOAD", "DS_ACCELERATOR", "MALLOC_CONF", "CUDA_VISIBLE_DEVICES")
AT_START = dict(os.environ)
SCRIPTS = ("launch/pretrain.py", "tests/training/inject.py", "tests/training/witness.py", "tests/training/many_runs.py")


class WarmProcess:
    """The part of subprocess.Popen that tests use. output: where the script's output goes, or None for nowhere."""

    def __init__(self, argv: list[str], env: dict[str, str], stdout: int, stderr: int, stdin: int | None = None):
        self.args, self.returncode = argv, None
        with open(os.devnull, "rb") as nothing:
            connection = _connect()
            request = json.dumps({"argv": argv, "env": env, "cwd": str(REPOSITORY)}).encode()
            socket.send_fds(connection, [request], [nothing.fileno() if stdin is None else stdin, stdout, stderr])
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


def popen(command: list[str], env: dict[str, str], quiet: bool = False) -> Process:
    """Start a command from the repository's root, warm if it is one of SCRIPTS. Its output, both streams, is .stdout.

    quiet: the output goes to /dev/null.
    """
    script = command[1] if len(command) > 1 else ""
    script = script.removeprefix(f"{REPOSITORY}/")
    same = all(env.get(name) == AT_START.get(name, _default(name)) for name in READ_AT_START)
    if command[0] != sys.executable or script not in SCRIPTS or not same:
        return subprocess.Popen(
            command, cwd=REPOSITORY, env=env, text=True, stdin=subprocess.DEVNULL, start_new_session=True,
            stdout=subprocess.DEVNULL if quiet else subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if quiet:
        with open(os.devnull, "wb") as nothing:
            return WarmProcess(command[1:], env, nothing.fileno(), nothing.fileno())
    reading, writing = os.pipe()
    process = WarmProcess(command[1:], env, writing, writing)
    os.close(writing)
    process.stdout = open(reading, errors="replace")
    return process


def _default(name: str) -> str | None:
    return "cpu" if name == "DS_ACCELERATOR" else None


def _connect() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(_server())
    return connection


@functools.cache
def _server() -> str:
    """Start the server once per test process; returns its socket when it listens."""
    folder = tempfile.mkdtemp(prefix="mb-")  # a socket's path may have 107 bytes
    path = os.path.join(folder, "s")
    paths = [str(REPOSITORY), AT_START.get("PYTHONPATH", "")]
    env = AT_START | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": ":".join(filter(None, paths))}
    process = subprocess.Popen([sys.executable, str(SERVER), path], cwd=REPOSITORY, env=env, stdin=subprocess.PIPE)
    atexit.register(process.kill)
    while True:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            try:
                probe.connect(path)
                return path
            except (FileNotFoundError, ConnectionRefusedError):
                assert process.poll() is None, "the warm server ended"
                time.sleep(0.05)
