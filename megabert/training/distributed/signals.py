"""Convert stop signals, and the launcher's death, into a request that the training loop checks each step."""

import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

import psutil

from megabert.process.exit_codes import EXIT_INTERRUPTED, EXIT_REQUEUE

log = logging.getLogger(__name__)

# SLURM sends SIGTERM before it kills a job, and SIGUSR1 if sbatch --signal asks for it; Grid Engine and LSF send
# SIGUSR1 or SIGUSR2. A terminal sends SIGINT for Ctrl-C, and SIGHUP when it is closed; `ulimit -St` sends SIGXCPU.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU, signal.SIGINT)
DEEPSPEED_COMMANDS = ("deepspeed", "ds", "deepspeed.launcher.runner")
# The deepspeed launcher sets the first, and torchrun the second.
SET_BY_LAUNCHERS = ("CROSS_RANK", "TORCHELASTIC_RUN_ID")
POLL_S = 1.0
# Time to finish a step and save after the launcher has died; then this process exits, whatever it is waiting for.
GRACE_S = 45.0
# A second SIGINT within this time belongs to the same Ctrl-C: a terminal and a launcher may both have sent one.
SAME_INTERRUPT_S = 0.5
PEER_REASON = "another rank was asked to stop"


class StopRequested(BaseException):
    """A stop signal ended a wait of the main thread. Not an Exception: no library on the way may swallow it."""


class StopSignals:
    """Collects requests to stop this process. reason: why to stop, or None.

    A request sets the reason. At the end of a step all ranks agree to stop, save, and exit with EXIT_REQUEUE. While
    the main thread waits for data, a request raises StopRequested there. Before the first step is done there is nothing
    to save: a request then ends the process at once. So does a second Ctrl-C.
    """

    def __init__(self, embedded: bool = False) -> None:
        """embedded: the process continues after the run, as a notebook's does, and is never ended: a stop before the
        first step waits for that step, and a second Ctrl-C raises KeyboardInterrupt.
        """
        self.embedded = embedded
        self.reason: str | None = None
        self.tell_peers: Callable[[], None] = _do_nothing
        self._has_stepped = False
        self._interruptible = False
        self._interrupted_at: float | None = None
        # A signal handler may interrupt another.
        self._lock = threading.RLock()

    def install_handlers(self) -> None:
        """Handle SIGNALS; call this in the main thread. An ignored SIGHUP (nohup) stays ignored."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        if not self.embedded:
            # A Python handler only runs once the main thread leaves C++, which may be in a collective or a compiler.
            # C writes the signal's number to this socket at once, and a thread of its own reads it.
            receiver, sender = socket.socketpair()
            sender.setblocking(False)
            signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self._read_signals, args=(receiver, sender), name="signals", daemon=True).start()

    def first_step_done(self) -> None:
        """Let a request to stop take effect at the end of a step from now on."""
        self._has_stepped = True

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Raise StopRequested in the block as soon as a stop is requested, or if it has been already."""
        before, self._interruptible = self._interruptible, True
        try:
            if self.reason is not None:
                raise StopRequested(self.reason)
            yield
        finally:
            self._interruptible = before

    def request(self, reason: str) -> None:
        """Ask this process to stop, and tell the other ranks; any thread may call this."""
        with self._lock:
            if self.reason is not None:
                return
            self.reason = reason
        if reason != PEER_REASON:
            self.tell_peers()
        if not self._has_stepped and not self.embedded:
            _end(f"{reason} before the first step was done: nothing to save", EXIT_REQUEUE)
        if self._interruptible and threading.current_thread() is not threading.main_thread():
            # Wakes the main thread from a system call; _on_signal then raises.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        """Handle a signal, in the main thread."""
        if self.embedded and self._is_second_interrupt(number):
            raise KeyboardInterrupt
        if self.embedded or self._has_stepped:
            self.request(_describe(number))
        if self._interruptible:
            raise StopRequested(self.reason)

    def _read_signals(self, receiver: socket.socket, _sender: socket.socket) -> None:
        """Act on signals, in a thread of its own. _sender: kept open."""
        while numbers := receiver.recv(64):
            for number in set(numbers) & set(SIGNALS):
                if self._is_second_interrupt(number):
                    _end("interrupted again: ending without saving", EXIT_INTERRUPTED)
                if number == signal.SIGINT and not self._has_stepped:
                    self.tell_peers()
                    _end("interrupted", EXIT_INTERRUPTED)
                self.request(_describe(number))

    def _is_second_interrupt(self, number: int) -> bool:
        """Record a SIGINT, and return whether it is a second one."""
        if number != signal.SIGINT:
            return False
        now = time.monotonic()
        if self._interrupted_at is None:
            self._interrupted_at = now
        return now - self._interrupted_at > SAME_INTERRUPT_S

    def watch_launcher(self) -> None:
        """Start a thread that requests a stop once deepspeed's launcher, the `deepspeed` command or torchrun is gone.

        Call this before anything else: a launcher that died earlier goes unnoticed. Does nothing if neither of them
        started this process: such a run may outlive its shell.
        """
        if not any(name in os.environ for name in SET_BY_LAUNCHERS):
            return
        threading.Thread(target=self._watch, args=(os.getppid(),), name="launcher-watch", daemon=True).start()

    def _watch(self, launcher_pid: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(launcher_pid)
            command_pid = _deepspeed_command_of(launcher)
            while os.getppid() == launcher_pid:
                if command_pid is not None and launcher.ppid() != command_pid:
                    # The command forwards no signals: when it is terminated, the launcher and the ranks keep running.
                    command_pid = None
                    self._request_stop("the deepspeed command is gone")
                time.sleep(POLL_S)
        self._request_stop("the launcher is gone")
        time.sleep(GRACE_S)
        # A rank that waits for dead peers cannot be interrupted otherwise, and would keep the port in use.
        os._exit(1)

    def _request_stop(self, reason: str) -> None:
        log.warning("%s: stopping after a checkpoint", reason)
        self.request(reason)


def _describe(number: int) -> str:
    return f"received {signal.Signals(number).name}"


def _do_nothing() -> None:
    """Do nothing: a run of one rank has no peers to tell."""


def _end(message: str, code: int) -> NoReturn:
    """End this process without returning to the main thread, which may be anywhere."""
    with contextlib.suppress(OSError):
        os.write(2, f"pretrain: {message}\n".encode())
    os._exit(code)


def _deepspeed_command_of(launcher: psutil.Process) -> int | None:
    """Return the pid of the `deepspeed` command; None if something else, such as ssh, started the launcher."""
    parent = launcher.parent()
    try:
        named = parent is not None and any(os.path.basename(word) in DEEPSPEED_COMMANDS for word in parent.cmdline())
    except psutil.Error:
        # The process has just ended, or belongs to another user.
        return None
    return parent.pid if parent is not None and named else None
