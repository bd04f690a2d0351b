"""Being told to stop: by a signal, by the batch system, by the death of the launcher.

A signal only raises a flag; the loop reads it once per step, together with all other ranks, saves, and ends with REQUEUE.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from types import FrameType

import psutil

log = logging.getLogger(__name__)

REQUEUE = 85  # the exit code of a run that stopped early, saved, and wants to be started again
SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
)  # SLURM sends the first before it kills, and the second when asked (--signal)
COMMANDS = ("deepspeed", "ds", "deepspeed.launcher.runner")
POLL_S = 1.0
GRACE_S = 45.0  # to finish a step and save, once the launcher is gone; then whoever holds the port ends


class Interrupts:
    """What this process was told. reason: None, or why to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None

    def listen(self) -> None:
        """Take over SIGTERM and SIGUSR1; call from the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.reason = self.reason or f"{signal.Signals(number).name} arrived"

    def watch_launcher(self) -> None:
        """Where the deepspeed launcher started this process, notice that it is gone, or the `deepspeed` command above it.

        Call it first of all: a launcher that was killed before is not missed. A run without one may outlive its shell.
        """
        if "CROSS_RANK" not in os.environ:  # which the launcher sets
            return
        threading.Thread(target=self._watch, args=(os.getppid(),), name="launcher-watch", daemon=True).start()

    def _watch(self, started_by: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(started_by)
            command = _command_above(launcher)
            while os.getppid() == started_by:
                if command is not None and launcher.ppid() != command:
                    # It passes no signal on: told to end, it leaves its launcher and the ranks behind.
                    command = None
                    self._stop("the deepspeed command is gone")
                time.sleep(POLL_S)
        self._stop("the launcher is gone")
        time.sleep(GRACE_S)
        os._exit(1)  # a rank that waits for dead peers can't be interrupted otherwise, and would hold the port for ever

    def _stop(self, reason: str) -> None:
        self.reason = self.reason or reason
        log.warning("%s: saving, and ending", reason)


def _command_above(launcher: psutil.Process) -> int | None:
    """The process of the `deepspeed` command; None where something else started the launcher, as ssh, which may go."""
    parent = launcher.parent()
    try:
        named = parent is not None and any(os.path.basename(word) in COMMANDS for word in parent.cmdline())
    except psutil.Error:  # it has just ended, or is somebody else's
        return None
    return parent.pid if parent is not None and named else None
