"""Progress of the ranks of a run: what this rank is doing, and which rank has made no progress for too long."""

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
LONG_S = 1800.0
MAX_NAMED = 8
# On a CPU a part of a step may take minutes: its limit is at least this many times the longest part of the last two
# steps.
SLOWER = 3.0
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

    def restart(self, timeout_s: float, waits_for_store_at: Callable[[], float] = lambda: 0.0) -> None:
        """Begin a run. timeout_s: run.hang_timeout_s. waits_for_store_at: when a store was last waited for, or 0."""
        self.timeout_s, self.waits_for_store_at = timeout_s, waits_for_store_at
        self.step = self.count = 0
        self.long = self.compiling = self.started = False
        # The longest part of this step, and of the previous one.
        self.longest_s = self.longest_before_s = 0.0
        self.part, self.entered_at = "", time.monotonic()
        self.enter("starting")

    def enter(self, part: str, *, long: bool = False) -> None:
        """Begin a part of the run. long: it may take LONG_S."""
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
        self.step, self.started = step, True
        self.longest_s, self.longest_before_s = 0.0, self.longest_s
        self.advance()

    def compile_began(self, _: object = None) -> None:
        """Note that a compilation begins; PyTorch calls this."""
        self.compiling = True
        self.advance()

    def compile_ended(self, _: object = None) -> None:
        self.compiling = False
        self.advance()

    def beat(self) -> Beat:
        limit_s = self.timeout_s * (START_FACTOR if self.compiling or not self.started else 1.0)
        limit_s = max(limit_s, SLOWER * self.longest_s, SLOWER * self.longest_before_s)
        if self.long:
            limit_s = max(limit_s, LONG_S)
        age_s = time.monotonic() - max(self.moved_at, self.waits_for_store_at())
        return Beat(self.step, self.count, f"compiling ({self.part})" if self.compiling else self.part, age_s, limit_s)


# Of this process; a process has one run at a time.
progress = Progress()


def watch_compiler() -> None:
    """Let `progress` know when PyTorch compiles, if anything here does. Call it after the model is built."""
    if "torch._dynamo" not in sys.modules:
        return
    from torch._dynamo.callback import callback_handler

    if progress.compile_began not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(progress.compile_began)
        callback_handler.register_end_callback(progress.compile_ended)


class HangDetector:
    """Finds the ranks that hang, from the heartbeats that this rank receives.

    Rank 0 receives those of all ranks. Other ranks hear only rank 0, so they detect only its silence.
    """

    def __init__(self, timeout_s: float, hosts: dict[int, str], now: float):
        """timeout_s: run.hang_timeout_s. hosts: those of ranks that send heartbeats. now: as of time.monotonic()."""
        self.timeout_s, self.hosts = timeout_s, hosts
        # Rank 0 is one of the hosts from the beginning.
        self.has_all_ranks = len(hosts) > 1
        first = Beat(0, 0, "starting", 0.0, START_FACTOR * timeout_s)
        self.beats = dict.fromkeys(hosts, (now, first))

    def update(self, rank: int, beat: Beat, now: float) -> None:
        self.beats[rank] = (now, beat)

    def forget(self, rank: int) -> None:
        """Expect no more heartbeats of a rank: it has ended."""
        self.beats.pop(rank, None)

    def restart(self, now: float) -> None:
        """Restart all time limits: this process was suspended and received nothing meanwhile."""
        self.beats = {rank: (now, beat) for rank, (_, beat) in self.beats.items()}

    def find_hang(self, now: float) -> str | None:
        """Name the ranks that hang; None if none does.

        A rank hangs if it has been silent too long, or if it is the furthest behind and has exceeded its own limit
        there; the other ranks wait for it. Of several equally far behind, all must have exceeded theirs.
        """
        silent = {
            rank: now - received_at
            for rank, (received_at, beat) in self.beats.items()
            if now - received_at > min(beat.limit_s, START_FACTOR * self.timeout_s)
        }
        if silent:
            return self._describe(silent, "sent no heartbeat")
        if not self.has_all_ranks:
            return None
        least = min((beat.count for _, beat in self.beats.values()), default=0)
        behind = {
            rank: (now - received_at + beat.age_s, beat.limit_s)
            for rank, (received_at, beat) in self.beats.items()
            if beat.count == least
        }
        if behind and all(age_s > limit_s for age_s, limit_s in behind.values()):
            return self._describe({rank: age_s for rank, (age_s, _) in behind.items()}, "made no progress")
        return None

    def _describe(self, ranks: dict[int, float], what: str) -> str:
        named = [
            f"rank {rank} on {self.hosts[rank]} ({self.beats[rank][1].place})" for rank in sorted(ranks)[:MAX_NAMED]
        ]
        if len(ranks) > MAX_NAMED:
            named.append(f"{len(ranks) - MAX_NAMED} more")
        verb = "has" if len(ranks) == 1 else "have"
        return (
            f"{', '.join(named)} {verb} {what} for {max(ranks.values()):.0f} s: a process, GPU or file system hangs. "
            "If it only needs longer, raise run.hang_timeout_s"
        )
