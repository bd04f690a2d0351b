"""Record what this rank is doing, and tell the other ranks in heartbeats."""

import sys
import time
from collections.abc import Callable
from typing import NamedTuple

# Time between two beats of a rank.
BEAT_S = 5.0
# Before its first step a rank imports, compiles, opens the corpus and loads a checkpoint: its limit is this many times
# as long.
START_FACTOR = 5.0
# Limit for saving, converting and final scoring, which report no progress; equal to the collectives' timeout
# (process.py).
LONG_PART_LIMIT_S = 1800.0
# On a CPU a part of a step may take minutes: its limit is at least this many times the longest part of the last two
# steps.
LIMIT_FACTOR = 3.0
COMPUTING = ("forward", "backward", "optimizer")


class Beat(NamedTuple):
    """What a rank tells the others. age_s: time since its last progress. limit_s: a larger age_s is a hang.

    step: steps done. count: parts of the run begun so far, the same number on ranks that are equally far.
    """

    step: int
    count: int
    part: str
    age_s: float
    limit_s: float

    def to_line(self) -> str:
        return f"{self.step} {self.count} {self.age_s:.3f} {self.limit_s:.3f} {self.part}"

    @classmethod
    def from_line(cls, line: str) -> "Beat":
        step, count, age_s, limit_s, part = line.split(" ", 4)
        return cls(int(step), int(count), part, float(age_s), float(limit_s))

    @property
    def place(self) -> str:
        return f"step {self.step}, {self.part}" if self.step else f"before the first step, {self.part}"


class Progress:
    """How far this process has come. All ranks call `enter` with the same parts in the same order."""

    def __init__(self) -> None:
        self.restart(0.0)

    def restart(self, timeout_s: float, waited_for_store_at: Callable[[], float] = lambda: 0.0) -> None:
        """Begin a run. timeout_s: run.hang_timeout_s. waited_for_store_at: when a store was last waited for, or 0."""
        self.timeout_s, self.waited_for_store_at = timeout_s, waited_for_store_at
        self.step = self.count = 0
        self.long = self.compiling = self.has_stepped = False
        # The longest part of this step, and of the previous one.
        self.longest_s = self.previous_step_longest_s = 0.0
        self.part, self.entered_at = "", time.monotonic()
        self.enter("starting")

    def enter(self, part: str, *, long: bool = False) -> None:
        """Begin a part of the run. long: it may take LONG_PART_LIMIT_S."""
        now = time.monotonic()
        if self.part in COMPUTING:
            self.longest_s = max(self.longest_s, now - self.entered_at)
        self.part, self.long, self.entered_at, self.moved_at = part, long, now, now
        self.count += 1

    def advance(self) -> None:
        """Report progress within a part."""
        self.moved_at = time.monotonic()

    def step_done(self, step: int) -> None:
        """Report a step. step: steps done so far."""
        self.step, self.has_stepped = step, True
        self.longest_s, self.previous_step_longest_s = 0.0, self.longest_s
        self.advance()

    def compile_began(self, _: object = None) -> None:
        """Note that a compilation begins; PyTorch calls this."""
        self.compiling = True
        self.advance()

    def compile_ended(self, _: object = None) -> None:
        self.compiling = False
        self.advance()

    def beat(self) -> Beat:
        limit_s = self.timeout_s * (START_FACTOR if self.compiling or not self.has_stepped else 1.0)
        limit_s = max(limit_s, LIMIT_FACTOR * self.longest_s, LIMIT_FACTOR * self.previous_step_longest_s)
        if self.long:
            limit_s = max(limit_s, LONG_PART_LIMIT_S)
        age_s = time.monotonic() - max(self.moved_at, self.waited_for_store_at())
        return Beat(self.step, self.count, f"compiling ({self.part})" if self.compiling else self.part, age_s, limit_s)


# The progress of this process, which has one run at a time.
progress = Progress()


def watch_compiler() -> None:
    """Let `progress` know when PyTorch compiles, if anything here does. Call it after the model is built."""
    if "torch._dynamo" not in sys.modules:
        return
    from torch._dynamo.callback import callback_handler

    if progress.compile_began not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(progress.compile_began)
        callback_handler.register_end_callback(progress.compile_ended)
