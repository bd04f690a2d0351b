"""Measure how much of a run's time is lost to a store that is slow, hangs, or refuses requests.

    python tests/benchmarks/bench_stores.py [--quick] [--json FILE]

One rank with two loader workers and eight streams reads bins of 65,536 tokens from a web server on the loopback
interface, and pretends to compute for 0.2 s a bin (--quick: 0.1 s). What it waits for data after the first bins, as a
share of its time, is the loss. The server answers every request for a shard after 50 ms, and:
stall_share_slow: answers normally. stall_share_hang: hangs for 10 s at one request in 64. stall_share_503: returns 503
for half of them. stall_share_outage: returns 503 for all of them for five minutes (--quick: 8 s); only what is lost
beyond the outage counts. bins_equal: share of the bins that are bitwise those of the local folder, each of them once.
requests_per_bin, mb_per_request, fetched_per_read: of the slow store, with an empty cache; the last is the bytes that
the store sends for a byte that training reads. requests_again: the same of a second run with the cache of the first.
"""

import json
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.corpus import write_token_shards
from support.report import read_arguments, write
from support.slow_store import COUNTS

from megabert.data.batch_schedule import Length, MaskingRate, make_schedule
from megabert.data.bin_shape import default_max_documents
from megabert.data.masking import masked_count
from megabert.data.shards.cache import CacheOptions
from megabert.data.shards.source import open_corpus
from megabert.data.stream import BatchStream, StreamConfig, open_loader

BIN_TOKENS, STREAMS, WORKERS, WARM_UP = 65_536, 8, 2, 16
# Of the server: share of requests that hang, for how long, share that get a 503; request at which an outage begins.
STORES = {
    "slow": (0.0, 0.0, 0.0, 0),
    "hang": (1 / 64, 10.0, 0.0, 0),
    "503": (0.0, 0.0, 0.5, 0),
    "outage": (0, 0, 0, 60),
}


@contextmanager
def store(folder: Path, name: str, outage_s: float) -> Iterator[str]:
    """Serve a folder by one of STORES. Yields its URL."""
    hang_share, hang_s, busy_share, outage_at = STORES[name]
    numbers = map(str, (0.05, hang_share, hang_s, busy_share, outage_at, outage_s))
    command = [sys.executable, str(Path(__file__).with_name("support") / "slow_store.py"), str(folder), *numbers]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None, "stdout is a pipe"
    try:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
    finally:
        server.kill()
        server.wait()


def train(location: str, bins: int, step_s: float, cache: Path) -> tuple[float, float, list[tuple[int, int]]]:
    """Read bins as a rank does, with a cache. Returns seconds waited, seconds in all, and (index, checksum) of each."""
    corpus = open_corpus([(location, 1.0)], cache=CacheOptions(cache))
    config = StreamConfig(
        bin_tokens=BIN_TOKENS,
        schedule=make_schedule(10**6, STREAMS, [Length(512, 1.0)]),
        max_documents={512: default_max_documents(corpus, BIN_TOKENS, 512, truncate=False)},
        max_masked=masked_count(BIN_TOKENS, 0.3),
        masking=MaskingRate.constant(0.3),
        truncate=False,
        seed=17,
        num_streams=STREAMS,
    )
    batches = iter(open_loader(BatchStream(corpus, config, rank=0, world_size=1, positions={}, first_index=0), WORKERS))
    waited, began, seen = 0.0, 0.0, []
    for number in range(bins):
        if number == WARM_UP:
            waited, began = 0.0, time.perf_counter()
        asked = time.perf_counter()
        batch, *_ = next(batches)
        waited += time.perf_counter() - asked
        seen.append((batch.index, zlib.crc32(batch.input_ids.numpy().tobytes())))
        time.sleep(step_s)
    return waited, time.perf_counter() - began, seen


def count_requests(url: str, bins: int, cache: Path) -> dict[str, float]:
    """Count what a run has asked of a store, and what a second one asks that finds the first one's cache."""
    first = ask_counts(url)
    train(url, bins, 0.0, cache)
    figures = {
        "requests_per_bin": first["requests"] / bins,
        "mb_per_request": first["bytes"] / first["requests"] / 1e6,
        "fetched_per_read": first["bytes"] / (2 * BIN_TOKENS * bins),
        "requests_again": (ask_counts(url)["requests"] - first["requests"]) / bins,
    }
    print(", ".join(f"{name} {value:.2f}" for name, value in figures.items()), flush=True)
    return figures


def ask_counts(url: str) -> dict[str, int]:
    with urllib.request.urlopen(f"{url}/{COUNTS}") as answer:
        return json.load(answer)


def main() -> None:
    options = read_arguments(__doc__ or "")
    bins, step_s, outage_s = (80, 0.1, 8.0) if options.quick else (600, 0.2, 300.0)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shards"
        write_token_shards(folder, 32, 2_000_000)
        _, _, expected = train(str(folder), bins, 0.0, folder)
        equal = 0
        for name in STORES:
            cache = Path(temporary) / f"cache-{name}"
            with store(folder, name, outage_s) as url:
                waited, seconds, seen = train(url, bins, step_s, cache)
                if name == "slow":
                    figures |= count_requests(url, bins, cache)
            lost = max(0.0, waited - outage_s) if name == "outage" else waited
            share = figures[f"stall_share_{name}"] = lost / (seconds - (waited - lost))
            equal += sum(one == other for one, other in zip(seen, expected, strict=True))
            print(
                f"{name}: {bins - WARM_UP} bins in {seconds:.0f} s, {waited:.1f} s of them waited for data: "
                f"{share:.1%} lost",
                flush=True,
            )
    figures["bins_equal"] = equal / (len(STORES) * bins)
    print(f"bins as from a local folder: {figures['bins_equal']:.0%}")
    write(figures, options.json)


if __name__ == "__main__":
    main()
