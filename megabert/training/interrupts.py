"""Being told to stop: by a signal, by the batch system, by the death of the launcher.

A signal only raises a flag; the loop reads it once per step, together with all other ranks, saves, and ends with REQUEUE.
"""

import logging
import os
import signal
import threading
import time
from types import FrameType

log = logging.getLogger(__name__)

REQUEUE = 85  # the exit code of a run that stopped early, saved, and wants to be started again
SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
)  # SLURM sends the first before it kills, and the second when asked (--signal)
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
        """Notice that the process which started this one is gone. A run without a launcher may outlive its shell."""
        launcher = os.getppid()
        threading.Thread(target=self._watch, args=(launcher,), name="launcher-watch", daemon=True).start()

    def _watch(self, launcher: int) -> None:
        while os.getppid() == launcher:
            time.sleep(POLL_S)
        self.reason = self.reason or "the launcher is gone"
        log.warning("the launcher is gone: saving, and ending within %.0f s", GRACE_S)
        time.sleep(GRACE_S)
        os._exit(1)  # a rank that waits for dead peers can't be interrupted otherwise, and would hold the port for ever
