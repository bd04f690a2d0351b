"""Detect a rank that is slower than the others again and again, so that all of them wait for it."""

import statistics
from collections.abc import Sequence

# A rank counts as slow below this share of the median rate.
SLOWER = 0.9
# A rank must be slow in this many reports of the log. One alone may be chance, such as a compilation.
IN_A_ROW = 3


class Straggler:
    """Finds a rank that is much slower than the median in several reports in a row, and names it once."""

    def __init__(self, hosts: Sequence[str]):
        """hosts: the ranks' hosts."""
        self.hosts = hosts
        self.rank, self.in_a_row = -1, 0

    def update(self, rates: Sequence[float]) -> str | None:
        """Take the tokens/s of each rank in data and forward; return a line for the log when a straggler is found."""
        slowest, median = min(range(len(rates)), key=rates.__getitem__), statistics.median(rates)
        if rates[slowest] >= SLOWER * median:
            self.rank, self.in_a_row = -1, 0
            return None
        self.in_a_row = self.in_a_row + 1 if slowest == self.rank else 1
        self.rank = slowest
        if self.in_a_row != IN_A_ROW:
            return None
        return (
            f"straggler: rank {slowest} on {self.hosts[slowest]} is slow in data and forward: {rates[slowest]:,.0f} "
            f"tokens/s, the median rank {median:,.0f}; all ranks wait for it"
        )
