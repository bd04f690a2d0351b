"""Read from a store before the results are needed, as far ahead as training uses in some seconds."""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TypeVar

from megabert.data.shards.cache import read_ahead_pool

Item = TypeVar("Item")
Result = TypeVar("Result")

# A request that hangs and is made a second time may take as long as this.
READ_AHEAD_S = 10.0
# At most this many reads are in flight or waiting, for one source of one stream. They hold two megabytes.
MOST_READS = 8
# The first results fill a packing buffer, so they are used faster than training uses the later ones.
WARM_UP = 4


def read_ahead(items: Iterable[Item], read: Callable[[Item], Result], least: int) -> Iterator[tuple[Item, Result]]:
    """Yield each item with read(item), in order, and read further items meanwhile.

    At least `least` reads are ahead, and up to MOST_READS if the consumer uses more than that in READ_AHEAD_S. With 0
    each item is read when it is needed.
    """
    if not least:
        yield from ((item, read(item)) for item in items)
        return
    pending: deque[tuple[Item, Future[Result]]] = deque()
    used, warm_at, depth = 0, 0.0, least
    for item in items:
        pending.append((item, read_ahead_pool(os.getpid()).submit(read, item)))
        while len(pending) > depth:
            oldest, future = pending.popleft()
            yield oldest, future.result()
            used += 1
            if used == WARM_UP:
                warm_at = time.monotonic()
            elif used > WARM_UP:
                seconds_each = (time.monotonic() - warm_at) / (used - WARM_UP)
                depth = min(MOST_READS, max(least, int(READ_AHEAD_S / max(seconds_each, 1e-3))))
    yield from ((oldest, future.result()) for oldest, future in pending)
