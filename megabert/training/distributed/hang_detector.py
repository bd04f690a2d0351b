"""Find the ranks that have made no progress for too long, from their heartbeats."""

from megabert.training.distributed.heartbeat import START_FACTOR, Beat

# Ranks that one message names.
MAX_NAMED = 8


class HangDetector:
    """Finds the ranks that hang, from the heartbeats that this rank receives.

    Rank 0 receives those of all ranks. Other ranks receive only rank 0's, so they detect only its silence.
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
        there; the other ranks wait for it. If several are equally far behind, all must have exceeded theirs.
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
