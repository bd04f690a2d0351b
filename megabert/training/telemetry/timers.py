"""Where a step's time goes, on this rank."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PARTS = ("data", "forward", "backward", "optimizer", "agree")


class Stopwatch:
    """Adds up seconds by part.

    On a device that works behind the host's back it places events, and reads them once the host has waited for the device
    anyway: it never waits itself. event: the device's class of them, or None.
    """

    def __init__(self, event: Any) -> None:
        self.event = event
        self.reset()

    def reset(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.pending: list[tuple[str, Any, Any]] = []

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        if self.event is None or part == "data":  # the host's own work
            began = time.perf_counter()
            yield
            self.seconds[part] += time.perf_counter() - began
            return
        first, last = self.event(enable_timing=True), self.event(enable_timing=True)
        first.record()
        yield
        last.record()
        self.pending.append((part, first, last))

    def read(self) -> dict[str, float]:
        """The seconds so far. On a device: after the host has waited for the last event."""
        for part, first, last in self.pending:
            self.seconds[part] += first.elapsed_time(last) / 1e3
        self.pending = []
        return self.seconds
