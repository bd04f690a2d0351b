"""Measure how long each part of a step takes on this rank, and how much of a run's time budget is used."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from megabert.training.distributed.heartbeat import progress

PARTS = ("data", "forward", "backward", "optimizer", "agree")


@dataclass
class TimeBudget:
    """The wall-clock time that a run may use, counted from the creation of this object, over all restarts.

    Evaluation and saving count too: the budget is what a cluster bills. All times are in seconds. limit: None for a
    run without one. used: as all ranks agreed after the last step. max_step: an estimate of the longest that the next
    step may take. schedule_start: what was used when the first step was done; before it a run compiles.
    """

    limit: float | None
    used: float = 0.0
    max_step: float = 0.0
    schedule_start: float = 0.0
    started_at: float = field(default_factory=time.monotonic)
    used_before: float = 0.0

    def resume(self, used: float, max_step: float, schedule_start: float = 0.0) -> None:
        """Continue from a checkpoint's values."""
        self.used_before = self.used = used
        self.max_step = max_step
        self.schedule_start = schedule_start

    def elapsed(self) -> float:
        """Return the time used so far by this rank's clock."""
        return self.used_before + time.monotonic() - self.started_at

    def update(self, used: float) -> None:
        """Set the time used after a step. used: elapsed() on rank 0, so that all ranks agree."""
        # The time since the last update, evaluation and saving included; a rare long one is forgotten slowly.
        self.max_step = max(used - self.used, 0.9 * self.max_step)
        if not self.used:
            self.schedule_start = used
        self.used = used

    @property
    def share_of_schedule(self) -> float:
        """The share of the time since the first step that is used, from 0 to 1: start-up shortens no warm-up."""
        assert self.limit is not None, "run.max_hours is not set, so there is no share of the time"
        rest = self.limit - self.schedule_start
        return min(1.0, (self.used - self.schedule_start) / rest) if rest > 0 else 1.0

    @property
    def left(self) -> float:
        """The time that is left, at least 0."""
        assert self.limit is not None, "run.max_hours is not set, so no time is left or used up"
        return max(0.0, self.limit - self.used)

    @property
    def is_over(self) -> bool:
        """Whether another step would end after the limit."""
        return self.limit is not None and self.used + self.max_step > self.limit


class TimingEvent(Protocol):
    """A point in a device's work, as torch.cuda.Event."""

    def record(self) -> None: ...
    def elapsed_time(self, end_event: Any, /) -> float: ...


EventClass = Callable[..., TimingEvent]


class StepTimer:
    """Adds up the seconds of each part of a step.

    On a device that runs asynchronously it records events, and reads them only after the host has waited for the device
    for another reason: it never synchronizes itself. event_class: of the device; None for a CPU.
    """

    def __init__(self, event_class: EventClass | None) -> None:
        self.event_class = event_class
        self.reset()

    def reset(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.pending: list[tuple[str, TimingEvent, TimingEvent]] = []

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Time the block as one of PARTS, and report the part to the other ranks with the next heartbeat."""
        progress.enter(part)
        # The host does this work itself, so its clock measures it.
        if self.event_class is None or part == "data":
            started_at = time.perf_counter()
            yield
            self.seconds[part] += time.perf_counter() - started_at
            return
        first, last = self.event_class(enable_timing=True), self.event_class(enable_timing=True)
        first.record()
        yield
        last.record()
        self.pending.append((part, first, last))

    def totals(self) -> dict[str, float]:
        """Return the seconds of each part so far. On a device, call it after the host has waited for the last event."""
        for part, first, last in self.pending:
            self.seconds[part] += first.elapsed_time(last) / 1e3
        self.pending = []
        return self.seconds
