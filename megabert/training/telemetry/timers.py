"""Where a step's time goes, on this rank."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PARTS = ("data", "forward", "backward", "optimizer", "agree")


@dataclass
class Clock:
    """budget: seconds, or None; used: those used so far, over all restarts, as all ranks agreed after the last step;
    slowest: seconds that the next step may take.

    Counts from when it is made, evaluation and saving included: the budget is what a cluster bills.
    """

    budget: float | None
    used: float = 0.0
    slowest: float = 0.0
    began: float = field(default_factory=time.monotonic)
    before: float = 0.0

    def go_on_from(self, used: float, slowest: float) -> None:
        """Count on from a checkpoint's: what was over there still is."""
        self.before = self.used = used
        self.slowest = slowest

    def now(self) -> float:
        """Seconds used, as this rank's clock says."""
        return self.before + time.monotonic() - self.began

    def agree(self, used: float) -> None:
        """After a step: what rank 0's clock says."""
        self.slowest = max(
            used - self.used, 0.9 * self.slowest
        )  # a step, and what came with it; a rare one is forgotten
        self.used = used

    @property
    def share(self) -> float:
        """Of the budget, 0 to 1."""
        assert self.budget is not None, "only a run with max_hours asks"
        return min(1.0, self.used / self.budget)

    @property
    def is_over(self) -> bool:
        """Whether another step would end after the budget."""
        return self.budget is not None and self.used + self.slowest > self.budget


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
