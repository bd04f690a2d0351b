"""Tests that blocks of remote shards are fetched once for a machine, kept within a limit, and never change a byte."""

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabert.data.shards import blocks, retry
from megabert.data.shards.blocks import BlockReader
from megabert.data.shards.cache import ABANDONED_S, USED, CacheOptions, ExpectedFile, make_room

CONTENT = random.Random(0).randbytes(1000)
EXPECTED = ExpectedFile(len(CONTENT), "ab" * 32)


class Store:
    """A file of CONTENT that counts its requests."""

    def __init__(self, delay_s: float = 0.0):
        self.requests: list[tuple[int, int]] = []
        self.delay_s = delay_s

    def __call__(self, offset: int, size: int) -> bytes:
        self.requests.append((offset, size))
        time.sleep(self.delay_s)
        return CONTENT[offset : offset + size]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 100)


def reader(folder: Path, max_bytes: int = 10_000) -> BlockReader:
    return BlockReader("https://host/c4", CacheOptions(folder, max_bytes))


def read_and_compare(
    cache: BlockReader, store: Callable[[int, int], bytes], offset: int, size: int, name: str = "a.tar"
) -> bytes:
    data = cache.read(name, offset, size, store, EXPECTED)
    assert data == CONTENT[offset : offset + size], (offset, size)
    return data


def kept_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.block*"))


def test_small_reads_become_one_request_that_other_processes_need_not_make(tmp_path):
    store = Store()
    for offset in (210, 250, 290, 200):
        read_and_compare(reader(tmp_path), store, offset, 10)
    assert store.requests == [(200, 100)]
    # Over the edge of two blocks, at the end of the file, and longer than a block.
    read_and_compare(reader(tmp_path), store, 295, 20)
    read_and_compare(reader(tmp_path), store, 950, 60)
    read_and_compare(reader(tmp_path), store, 0, 400)
    assert store.requests[1:] == [(300, 100), (900, 100), (0, 400)]


def test_another_file_another_content_and_another_place_are_other_blocks(tmp_path):
    store = Store()
    read_and_compare(reader(tmp_path), store, 0, 10)
    read_and_compare(reader(tmp_path), store, 0, 10, name="b.tar")
    reader(tmp_path).read("a.tar", 0, 10, store, ExpectedFile(1000, "cd" * 32))
    BlockReader("https://other/c4", CacheOptions(tmp_path, 10_000)).read("a.tar", 0, 10, store, EXPECTED)
    assert len(store.requests) == 4


DAMAGE = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:50]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "gone": lambda path: path.unlink(missing_ok=True),
    "folder": lambda path: (path.unlink(), path.mkdir()),
}


@settings(max_examples=25)
@given(
    reads=st.lists(st.tuples(st.integers(0, 990), st.integers(1, 150)), min_size=1, max_size=20),
    damage=st.sampled_from([None, *DAMAGE]),
    count=st.sampled_from([None, "", "12", "no number", "99999999"]),
    max_bytes=st.sampled_from([50, 150, 450, 5000]),
)
def test_no_read_depends_on_what_the_cache_holds(tmp_path_factory, reads, damage, count, max_bytes):
    folder = tmp_path_factory.mktemp("cache")
    cache, store = reader(folder, max_bytes), Store()
    for offset, size in reads:
        read_and_compare(cache, store, offset, size)
        if damage:
            for path in folder.glob("*.block"):
                if path.is_file():
                    DAMAGE[damage](path)
                    break
        if count is not None:
            (folder / USED).write_text(count)


def test_the_blocks_read_least_recently_are_removed_and_the_limit_holds(tmp_path):
    cache, store = reader(tmp_path, max_bytes=500), Store()
    read_and_compare(cache, store, 0, 400)
    for number in range(5):
        read_and_compare(cache, store, 100 * number, 60)
        [path] = tmp_path.glob(f"*.{number:06d}.block")
        os.utime(path, (number, number))
    # This reads block 0 again, long after it was marked as read.
    read_and_compare(cache, store, 0, 60)
    read_and_compare(cache, store, 500, 60)
    found = {path.name.split(".")[-2] for path in tmp_path.glob("*.block")}
    assert "000000" in found
    assert "000005" in found
    assert "000001" not in found
    assert kept_bytes(tmp_path) <= 500
    assert kept_bytes(tmp_path) <= int((tmp_path / USED).read_text()) <= 500


def test_a_cache_that_is_too_small_is_given_up_with_a_warning(tmp_path, caplog):
    cache, store = reader(tmp_path, max_bytes=300), Store()
    for offset in range(0, 900, 100):
        read_and_compare(cache, store, offset, 10)
    for offset in range(50, 900, 100):
        read_and_compare(cache, store, offset, 10)
    assert len([size for _, size in store.requests if size == 100]) < 9
    [record] = caplog.records
    assert (
        "so each chunk is a request: most of what it fetches is not read: data.cache_gb is too small" in record.message
    )


@pytest.mark.parametrize("at", ["write_bytes", "write_text", "mkdir"])
def test_a_full_disk_costs_requests_and_not_the_run(tmp_path, monkeypatch, caplog, at):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, at, fail)
        cache, store = reader(tmp_path / "cache"), Store()
        for offset in (0, 10, 20):
            read_and_compare(cache, store, offset, 10)
    assert store.requests == [(0, 100), (10, 10), (20, 10)]
    [record] = caplog.records
    assert record.message.startswith(f"{tmp_path / 'cache'}: keeps no more blocks of shards")
    assert not list(tmp_path.rglob("*.part"))


def test_a_disk_that_is_nearly_full_is_left_to_others(tmp_path, monkeypatch, caplog):
    cache, store = reader(tmp_path), Store()
    read_and_compare(cache, store, 0, 10)
    monkeypatch.setattr(blocks, "FREE_SHARE", 1.0)
    read_and_compare(cache, store, 100, 10)
    assert kept_bytes(tmp_path) == 0
    assert not caplog.records
    monkeypatch.setattr(blocks, "FREE_SHARE", 0.0)
    read_and_compare(cache, store, 200, 10)
    assert kept_bytes(tmp_path) == 100


def test_what_a_killed_process_left_is_removed(tmp_path):
    old, new, shard = (
        tmp_path / name for name in ("a.tar.000000.block.00.part", "b.tar.000000.block.00.part", "c.tar.part")
    )
    for path in (old, new, shard):
        path.write_bytes(b"x" * 10)
    for path in (old, shard):
        os.utime(path, (time.time() - 2 * ABANDONED_S,) * 2)
    assert make_room(tmp_path, 10_000) == 20
    assert (old.exists(), new.exists(), shard.exists()) == (False, True, True)


def test_a_block_is_fetched_once_by_all_who_want_it_unless_that_takes_too_long(tmp_path, monkeypatch):
    store = Store(delay_s=0.05)
    threads = [threading.Thread(target=read_and_compare, args=(reader(tmp_path), store, 10 * n, 10)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.requests == [(0, 100)]
    monkeypatch.setattr(retry, "SLOW_S", 0.05)
    asked, answered = threading.Event(), threading.Event()

    def fetch(offset: int, size: int) -> bytes:
        asked.set()
        assert answered.wait(60)
        return CONTENT[offset : offset + size]

    slow = threading.Thread(target=read_and_compare, args=(reader(tmp_path), fetch, 500, 10))
    slow.start()
    assert asked.wait(60)
    store = Store()
    read_and_compare(reader(tmp_path), store, 540, 10)
    assert slow.is_alive()
    assert store.requests == [(540, 10)]
    answered.set()
    slow.join()


READER = """
import random, sys
from pathlib import Path
from megabert.data.shards import blocks
from megabert.data.shards.cache import CacheOptions, ExpectedFile

blocks.BLOCK_BYTES = 4096
content, rng = random.Random(0).randbytes(100_000), random.Random(sys.argv[2])
cache = blocks.BlockReader("here", CacheOptions(Path(sys.argv[1]), 40_000))
for _ in range(int(sys.argv[3])):
    offset, size, name = rng.randrange(99_000), rng.randrange(1, 900), rng.choice("ab")
    fetch = lambda at, n: content[at : at + n]
    assert cache.read(name, offset, size, fetch, ExpectedFile(100_000, "0" * 64)) == content[offset : offset + size]
    cache._fetched = 0
    print("read", flush=True)
"""


@pytest.mark.nightly
def test_processes_that_are_killed_leave_a_cache_that_others_use(tmp_path):
    rng = random.Random(1)
    for round_number in range(6):
        command = [sys.executable, "-c", READER, str(tmp_path)]
        running = [
            subprocess.Popen([*command, f"{round_number}-{n}", "1000000"], stdout=subprocess.PIPE) for n in range(3)
        ]
        # A number of blocks, so that all have written before they are killed.
        for process in running:
            for _ in range(rng.randrange(5, 200)):
                assert process.stdout is not None
                assert process.stdout.readline() == b"read\n"
        for process in running:
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        subprocess.run([*command, "last", "2000"], check=True, timeout=300, stdout=subprocess.DEVNULL)
    # What was killed while it wrote is removed later, and counts.
    assert kept_bytes(tmp_path) <= 40_000 + 18 * 4096
    for path in tmp_path.glob("*.part"):
        os.utime(path, (0, 0))
    make_room(tmp_path, 40_000)
    assert kept_bytes(tmp_path) <= 40_000
    assert not list(tmp_path.glob("*.part"))
