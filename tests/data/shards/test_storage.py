"""Shards from anywhere: byte ranges, servers that know none, commands, a bounded cache, and a network that breaks."""

import errno
import functools
import hashlib
import http.server
import logging
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megabert.data.shards import storage
from megabert.data.shards.cache import CacheOptions, ExpectedFile, ShardCache, WrongContentError
from megabert.data.shards.manifest import MANIFEST
from megabert.data.shards.source import DamagedShardError, open_source
from megabert.data.shards.storage import open_storage, retrying


class Handler(http.server.SimpleHTTPRequestHandler):
    """A folder over HTTP. Byte ranges only if `ranges`; the first `failures` requests of a shard end in `status`."""

    ranges = True
    failures = 0
    status = 503
    requests: list[str]

    def do_GET(self):
        self.requests.append(f"{self.path} {self.headers.get('Range', '')}".strip())
        cls = type(self)
        if self.path.endswith(".tar") and cls.failures:
            cls.failures -= 1
            self.send_error(self.status)
            return
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data, asked = path.read_bytes(), self.headers.get("Range")
        if self.ranges and asked:
            first, last = asked.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
            self.send_response(206)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """serve(folder, ranges=True, failures=0) -> (url, handler class)"""
    servers = []

    def start(folder: Path, **settings):
        handler = type("Folder", (Handler,), {"requests": [], **settings})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}", handler

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def cache(tmp_path):
    return CacheOptions(tmp_path / "cache", 1 << 30)


@pytest.fixture
def folder(corpus, tmp_path):
    return shutil.copytree(corpus.tokens, tmp_path / "tokens")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(storage, "BACKOFF_S", (0.01, 0.02))


def every_chunk(source) -> list:
    return [source.read_chunk(n, c) for n, shard in enumerate(source.shards) for c in range(len(shard.chunks))]


def same_tokens(source, corpus) -> bool:
    ours, local = every_chunk(source), every_chunk(open_source(str(corpus.tokens)))
    return all((a.tokens == b.tokens).all() for a, b in zip(ours, local, strict=True))


def test_chunks_come_by_byte_range(corpus, serve, cache):
    url, handler = serve(corpus.tokens)
    source = open_source(url, cache=cache)
    assert same_tokens(source, corpus)
    shards = [request for request in handler.requests if ".tar" in request]
    assert all("bytes=" in request for request in shards)
    assert len(shards) == sum(len(shard.chunks) for shard in source.shards)
    assert not cache.folder.exists()
    assert source.read_tokenizer_file() == (corpus.tokens / "tokenizer.json").read_bytes()
    assert source.token_counts.sum() == source.tokens
    assert source.read_optional("nothing.json") is None


def test_a_server_without_byte_ranges_is_read_whole(corpus, serve, cache, caplog):
    url, handler = serve(corpus.tokens, ranges=False)
    source = open_source(f"{url}/train-{{00000..00002}}.tar", cache=cache)
    assert len(source.shards) == 3
    every_chunk(source)
    assert "ignores byte ranges; shards are fetched whole" in caplog.text
    assert len([request for request in handler.requests if ".tar" in request]) == 4  # one found out
    assert len(list(cache.folder.glob("*.tar"))) == 3


def test_a_network_error_is_waited_out(corpus, serve, cache, caplog):
    url, handler = serve(corpus.tokens, failures=2)
    assert same_tokens(open_source(url, cache=cache), corpus)
    assert caplog.text.count("trying again in") == 2
    assert handler.failures == 0


def test_a_network_that_stays_broken_fails_with_the_url(corpus, serve, cache):
    url, _ = serve(corpus.tokens, failures=10**6)
    source = open_source(url, cache=cache)
    with pytest.raises(OSError, match=rf"{url}/train-00000\.tar: failed 3 times over 0 s"):
        source.read_chunk(0, 0)


def test_a_server_that_is_not_there_fails_with_the_url(cache):
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:9/c4/manifest\.json: failed 3 times"):
        open_source("http://127.0.0.1:9/c4", cache=cache)


def test_a_url_without_shards_is_named_at_once(tmp_path, serve, cache, caplog):
    url, _ = serve(tmp_path)
    with pytest.raises(ValueError, match=rf"{url}/manifest\.json: no such file"):
        open_source(url, cache=cache)
    assert "trying again" not in caplog.text


def test_a_shard_cut_short_on_the_server_is_named(folder, serve, cache):
    path = folder / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:700])
    url, _ = serve(folder)
    with pytest.raises(DamagedShardError, match=rf"{url}/train-00000\.tar chunk 0 .*truncated"):
        open_source(url, cache=cache).read_chunk(0, 0)
    path.unlink()
    with pytest.raises(DamagedShardError, match=rf"{url}/train-00000\.tar chunk 0 .*the shard is missing"):
        open_source(url, cache=cache).read_chunk(0, 0)


def test_a_scheme_that_nothing_opens_is_named(cache):
    with pytest.raises(ValueError, match="fsspec cannot open it"):
        open_source("nosuch://bucket/c4", cache=cache)


def test_a_pipe_fills_the_cache(corpus, cache):
    source = open_source(f"pipe:cat {corpus.tokens}/train-{{00000..00023}}.tar", cache=cache)
    assert same_tokens(source, corpus)
    assert len(list(cache.folder.glob("*.tar"))) == 24
    assert open_source(f"pipe:cat {corpus.tokens}/train-{{00000..00023}}.tar", "heldout", cache=cache).tokens > 0


def test_a_command_that_fails_is_named(corpus, cache):
    with pytest.raises(OSError, match=r"pipe:cat /nowhere/manifest\.json: failed 3 times"):
        open_source("pipe:cat /nowhere/train-{00000..00001}.tar", cache=cache)
    with pytest.raises(ValueError, match="contains no shard name"):
        open_source("pipe:cat everything", cache=cache)
    with pytest.raises(ValueError, match="spans several folders"):
        open_source("pipe:cat /{a,b}/train-00000.tar", cache=cache)


def test_a_command_that_prints_half_a_shard_is_damage(folder, cache):
    command = f"pipe:head -c 5000 {folder}/train-{{00000..00001}}.tar"
    source = open_source(str(folder), cache=cache)
    half, _ = open_storage(command, cache)
    shard = source.shards[0]
    with pytest.raises(WrongContentError, match="5000 bytes arrived"):
        half.read(shard.name, 0, 100, ExpectedFile(shard.bytes, shard.sha256))
    assert not list(cache.folder.glob("*.tar"))


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def test_the_cache_is_bounded_and_lets_the_oldest_go(tmp_path):
    cache = ShardCache(tmp_path, max_bytes=2500)
    data = {f"{n}.tar": bytes([n]) * 1000 for n in range(4)}

    def get(name: str) -> Path:
        expected = ExpectedFile(1000, hashlib.sha256(data[name]).hexdigest())
        return cache.get(name, lambda path: write(path, data[name]), expected)

    for number, name in enumerate(("0.tar", "1.tar")):
        os.utime(get(name), (number, number))
    os.utime(get("0.tar"), (5, 5))  # read again: now the younger one
    assert get("2.tar").read_bytes() == data["2.tar"]
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["0.tar", "2.tar"]
    assert get("1.tar").read_bytes() == data["1.tar"]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 2500


def test_a_cache_too_small_for_all_that_read_it_is_slow_and_right(corpus, cache):
    """Two shards' room for four processes that read 24: each chunk is right, and the bound holds."""
    source = open_source(str(corpus.tokens))
    largest = max(shard.bytes for shard in source.shards)
    small = CacheOptions(cache.folder, 2 * largest)
    command = f"pipe:cat {corpus.tokens}/train-{{00000..00023}}.tar"
    program = (
        "import sys, random; from pathlib import Path; from megabert.data.shards.source import open_source\n"
        "from megabert.data.shards.cache import CacheOptions\n"
        "source = open_source(sys.argv[1], cache=CacheOptions(Path(sys.argv[2]), int(sys.argv[3])))\n"
        "random.seed(int(sys.argv[4]))\n"
        "for _ in range(60): assert len(source.read_chunk(random.randrange(24), 0).tokens)\n"
    )
    arguments = [command, str(small.folder), str(small.max_bytes)]
    started = [subprocess.Popen([sys.executable, "-c", program, *arguments, str(seed)]) for seed in range(4)]
    assert [process.wait(60) for process in started] == [0] * 4
    assert sum(path.stat().st_size for path in small.folder.glob("*.tar")) <= small.max_bytes
    assert not list(small.folder.glob("*.part"))


def test_shards_written_anew_are_not_read_from_the_old_copy(folder, cache):
    command = f"pipe:cat {folder}/train-{{00000..00023}}.tar"
    first = open_source(command, cache=cache)
    first.read_chunk(0, 0)
    [kept] = cache.folder.glob("*.tar")
    data = bytearray(kept.read_bytes())
    data[1000] ^= 1
    kept.write_bytes(bytes(data))  # rotten in the cache, of the right size: fetched again
    assert (first.read_chunk(0, 0).tokens == open_source(str(folder)).read_chunk(0, 0).tokens).all()
    shard = first.shards[0]
    assert kept.name.endswith(f"{shard.sha256[:16]}-{shard.name}")


@pytest.mark.parametrize("broken", ["read_only", "file"])
def test_a_cache_that_cannot_be_written_is_named(corpus, tmp_path, broken):
    (tmp_path / "file").write_text("in the way")
    place = Path("/proc/nowhere") if broken == "read_only" else tmp_path / "file" / "cache"
    source = open_source(f"pipe:cat {corpus.tokens}/train-{{00000..00023}}.tar", cache=CacheOptions(place, 1 << 30))
    with pytest.raises(ValueError, match=r"cannot keep shards there.*data\.cache_dir"):
        source.read_chunk(0, 0)


def test_a_full_disk_is_not_the_network():
    tries = []

    def full():
        tries.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        retrying(full, "here")
    assert len(tries) == 1


def test_a_server_that_refuses_is_not_asked_again(corpus, serve, cache, caplog):
    url, _ = serve(corpus.tokens, failures=10**6, status=403)
    with pytest.raises(OSError, match=rf"{url}/train-00000\.tar: HTTP 403"):
        open_source(url, cache=cache).read_chunk(0, 0)
    assert "trying again" not in caplog.text


def test_processes_fetch_a_shard_once(tmp_path):
    cache = ShardCache(tmp_path, max_bytes=1 << 20)
    fetched = []

    def fetch(path: Path) -> None:
        fetched.append(path)
        write(path, b"x" * 100)

    expected = ExpectedFile(100, hashlib.sha256(b"x" * 100).hexdigest())
    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(lambda _: cache.get("a.tar", fetch, expected), range(50)))
    assert len(fetched) == len(paths) == 1


def test_what_another_try_cannot_mend_is_not_tried_again():
    tries = []

    def missing():
        tries.append(1)
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError):
        retrying(missing, "here")
    assert len(tries) == 1


def test_local_locations(corpus, cache):
    for location in (str(corpus.tokens), f"{corpus.tokens}/", f"file://{corpus.tokens}"):
        assert open_source(location, cache=cache).tokens == open_source(str(corpus.tokens)).tokens
    with pytest.raises(ValueError, match=MANIFEST):
        open_source(f"{corpus.tokens / MANIFEST}", cache=cache)


def test_prefetching_is_a_head_start_only(corpus, cache, caplog):
    caplog.set_level(logging.WARNING)
    source = open_source(f"pipe:cat {corpus.tokens}/train-{{00000..00023}}.tar", cache=cache)
    source.prefetch(3)
    source.prefetch(3)
    assert (source.read_chunk(3, 0).tokens == open_source(str(corpus.tokens)).read_chunk(3, 0).tokens).all()
