"""Turn SIGTERM, SIGUSR1 and the death of the launcher into a stop request, which the loop reads once per step."""

import contextlib
import logging
import os
import signal
import threading
import time
from types import FrameType

import psutil

log = logging.getLogger(__name__)

EXIT_REQUEUE = 85  # exit code of a run that stopped early, saved, and should be started again
# SLURM sends SIGTERM before it kills a job, and SIGUSR1 if sbatch --signal asks for it.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
DEEPSPEED_COMMANDS = ("deepspeed", "ds", "deepspeed.launcher.runner")
POLL_S = 1.0
# Time to finish a step and save after the launcher has died; then this process exits, whatever it is waiting for.
GRACE_S = 45.0


class StopSignals:
    """Collects requests to stop this process. reason: why to stop, or None.

    A request only sets the reason. At the end of a step all ranks agree to stop, save, and exit with EXIT_REQUEUE.
    """

    def __init__(self) -> None:
        self.reason: str | None = None

    def install_handlers(self) -> None:
        """Handle SIGTERM and SIGUSR1; call this in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.reason = self.reason or f"received {signal.Signals(number).name}"

    def watch_launcher(self) -> None:
        """Start a thread that requests a stop once the deepspeed launcher, or the `deepspeed` command, is gone.

        Call this before anything else: a launcher that died earlier goes unnoticed. Does nothing if the deepspeed
        launcher did not start this process: such a run may outlive its shell.
        """
        if "CROSS_RANK" not in os.environ:  # the launcher sets it
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
        os._exit(1)  # a rank that waits for dead peers cannot be interrupted otherwise, and would keep the port in use

    def _request_stop(self, reason: str) -> None:
        self.reason = self.reason or reason
        log.warning("%s: stopping after a checkpoint", reason)


def _deepspeed_command_of(launcher: psutil.Process) -> int | None:
    """Return the pid of the `deepspeed` command; None if something else, such as ssh, started the launcher."""
    parent = launcher.parent()
    try:
        named = parent is not None and any(os.path.basename(word) in DEEPSPEED_COMMANDS for word in parent.cmdline())
    except psutil.Error:  # it has just ended, or belongs to another user
        return None
    return parent.pid if parent is not None and named else None
