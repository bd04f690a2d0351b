"""A web server on the loopback interface that delays, hangs or refuses requests for shards.

python tests/benchmarks/support/slow_store.py FOLDER DELAY_S HANG_SHARE HANG_S BUSY_SHARE OUTAGE_AT OUTAGE_S

It prints its port. OUTAGE_AT: the number of the request with which an outage begins, in which all get a 503; 0: none.
/counts tells the requests for shards so far, and the bytes of the answers.
"""

import asyncio
import random
import sys
import time
from pathlib import Path

from aiohttp import web

COUNTS = "counts"


class Store:
    """Serves byte ranges of the files of a folder. The small files are always served at once."""

    def __init__(self, folder: Path, delay_s: float, hang_share: float, hang_s: float, busy_share: float):
        self.folder, self.delay_s, self.busy_share = folder, delay_s, busy_share
        self.hang_share, self.hang_s = hang_share, hang_s
        self.outage_at, self.outage_s, self.outage_until = 0, 0.0, 0.0
        self.requests = self.bytes = 0
        self.random = random.Random(1)

    async def get(self, request: web.Request) -> web.StreamResponse:
        if request.match_info["name"] == COUNTS:
            return web.json_response({"requests": self.requests, "bytes": self.bytes})
        path = self.folder / request.match_info["name"]
        if not path.is_file():
            return web.Response(status=404)
        if path.suffix == ".tar" and (refused := await self.delay()):
            return refused
        if path.suffix == ".tar":
            asked = request.http_range
            self.bytes += min(asked.stop or 1 << 60, path.stat().st_size) - (asked.start or 0)
        return web.FileResponse(path)

    async def delay(self) -> web.Response | None:
        """Treat a request for a shard badly. Returns the refusal, if it is one."""
        self.requests += 1
        await asyncio.sleep(self.delay_s)
        if self.requests == self.outage_at:
            self.outage_until = time.monotonic() + self.outage_s
        if time.monotonic() < self.outage_until or self.random.random() < self.busy_share:
            return web.Response(status=503)
        if self.random.random() < self.hang_share:
            await asyncio.sleep(self.hang_s)
        return None


async def main(folder: str, *numbers: str) -> None:
    store = Store(Path(folder), *map(float, numbers[:4]))
    store.outage_at, store.outage_s = int(numbers[4]), float(numbers[5])
    app = web.Application()
    app.router.add_get("/{name}", store.get)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    sys.stdout.write(f"{runner.addresses[0][1]}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
