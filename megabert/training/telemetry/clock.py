"""The wall-clock budget of a run that has one."""

import time
from dataclasses import dataclass, field


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
