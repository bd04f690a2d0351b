"""Storages: byte ranges, servers without them, commands, network errors and the bounded cache."""

import contextlib
import errno
import functools
import hashlib
import http.server
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import httpx2
import psutil
import pytest
from huggingface_hub.errors import HfHubHTTPError

from megabert.config.cli import exit_code
from megabert.data.shards import blocks, retry, side_files, storage
from megabert.data.shards.cache import CacheOptions, ExpectedFile, ShardCache, WrongContentError
from megabert.data.shards.manifest import MANIFEST
from megabert.data.shards.read_ahead import read_ahead
from megabert.data.shards.retry import (
    LONGEST_PAUSE_S,
    HedgedRequest,
    RefusedError,
    StoreAwayError,
    retrying,
    waited_for_store_at,
)
from megabert.data.shards.source import DamagedShardError, open_source
from megabert.data.shards.storage import CommandStorage, RemoteFolder, open_storage


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with byte ranges only if `ranges`; the first `failures` requests of a shard end in `status`."""

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

    def log_message(self, *args):  # type: ignore[override]
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
    return CacheOptions(tmp_path / "cache", 1 << 30, patience_s=0.1)


@pytest.fixture
def folder(corpus, tmp_path):
    return shutil.copytree(corpus.tokens, tmp_path / "tokens")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(retry, "LOG_AFTER_S", 0.0)


def every_chunk(source) -> list:
    return [source.read_chunk(n, c) for n, shard in enumerate(source.shards) for c in range(len(shard.chunks))]


def same_tokens(source, corpus) -> bool:
    ours, local = every_chunk(source), every_chunk(open_source(str(corpus.tokens)))
    return all((a.tokens == b.tokens).all() for a, b in zip(ours, local, strict=True))


def test_chunks_are_read_by_byte_range(corpus, serve, cache):
    url, handler = serve(corpus.tokens)
    source = open_source(url, cache=cache)
    assert same_tokens(source, corpus)
    shards = [request for request in handler.requests if ".tar" in request]
    assert all("bytes=" in request for request in shards)
    # These shards are smaller than a block, so each is one request, and another process makes none.
    assert len(shards) == len(source.shards) < source.num_chunks
    del handler.requests[:]
    assert same_tokens(open_source(url, cache=cache), corpus)
    assert not [request for request in handler.requests if ".tar" in request]
    assert source.read_tokenizer_file() == (corpus.tokens / "tokenizer.json").read_bytes()
    assert source.token_counts.sum() == source.tokens
    assert source.read_optional("nothing.json") is None


def test_whole_shards_are_fetched_from_a_server_without_byte_ranges(corpus, serve, cache, caplog, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 8192)
    url, handler = serve(corpus.tokens, ranges=False)
    source = open_source(f"{url}/train-{{00000..00002}}.tar", cache=cache)
    assert len(source.shards) == 3
    every_chunk(source)
    assert "ignores byte ranges; shards are fetched whole" in caplog.text
    # The first had a byte range.
    assert len([request for request in handler.requests if ".tar" in request]) == 4
    assert len(list(cache.folder.glob("*.tar"))) == 3


def test_a_network_error_is_retried(corpus, serve, cache, caplog):
    url, handler = serve(corpus.tokens, failures=2)
    assert same_tokens(open_source(url, cache=cache), corpus)
    assert caplog.text.count("still retrying after") == 2
    assert handler.failures == 0


def test_a_lasting_network_error_raises_with_the_url(corpus, serve, cache):
    url, _ = serve(corpus.tokens, failures=10**6)
    source = open_source(url, cache=cache)
    with pytest.raises(
        OSError, match=rf"{url}/train-00000\.tar: failed \d+ times over \d+ s: HTTP 503 .*data.store_patience_s"
    ) as error:
        source.read_chunk(0, 0)
    assert exit_code(error.value) == 75


def test_an_unreachable_server_raises_with_the_url(cache):
    with socket.socket() as unused:
        # Without listen(), connections are refused.
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/c4"
        with pytest.raises(OSError, match=rf"{url}/manifest\.json: failed \d+ times"):
            open_source(url, cache=cache)


def test_a_url_without_shards_raises_at_once(tmp_path, serve, cache, caplog):
    url, _ = serve(tmp_path)
    with pytest.raises(ValueError, match=rf"{url}/manifest\.json: no such file"):
        open_source(url, cache=cache)
    assert "trying again" not in caplog.text


def test_a_truncated_or_missing_shard_on_a_server_raises(folder, serve, cache):
    path = folder / "train-00000.tar"
    path.write_bytes(path.read_bytes()[:700])
    url, _ = serve(folder)
    with pytest.raises(DamagedShardError, match=rf"{url}/train-00000\.tar chunk 0 .*truncated"):
        open_source(url, cache=cache).read_chunk(0, 0)
    path.unlink()
    with pytest.raises(DamagedShardError, match=rf"{url}/train-00000\.tar chunk 0 .*the shard is missing"):
        open_source(url, cache=cache).read_chunk(0, 0)


def test_an_unknown_url_scheme_raises(cache):
    with pytest.raises(ValueError, match="fsspec cannot open it"):
        open_source("nosuch://bucket/c4", cache=cache)


def test_shards_of_a_command_are_kept_in_the_cache(corpus, cache):
    source = open_source(f"pipe:cat {corpus.tokens}/train-{{00000..00023}}.tar", cache=cache)
    assert same_tokens(source, corpus)
    assert len(list(cache.folder.glob("*.tar"))) == 24
    assert open_source(f"pipe:cat {corpus.tokens}/train-{{00000..00023}}.tar", "heldout", cache=cache).tokens > 0


def test_a_failing_command_raises_with_its_name(corpus, cache):
    with pytest.raises(
        OSError, match=r"pipe:cat /nowhere/manifest\.json: failed \d+ times over .* s: the command ended with 1"
    ):
        open_source("pipe:cat /nowhere/train-{00000..00001}.tar", cache=cache)
    with pytest.raises(ValueError, match="contains no shard name"):
        open_source("pipe:cat everything", cache=cache)
    with pytest.raises(ValueError, match="spans several folders"):
        open_source("pipe:cat /{a,b}/train-00000.tar", cache=cache)


def test_half_a_shard_from_a_command_is_not_cached(folder, cache):
    command = f"pipe:head -c 5000 {folder}/train-{{00000..00001}}.tar"
    source = open_source(str(folder), cache=cache)
    half, _ = open_storage(command, cache)
    shard = source.shards[0]
    with pytest.raises(WrongContentError, match="5000 bytes arrived"):
        half.read(shard.name, 0, 100, ExpectedFile(shard.bytes, shard.sha256))
    assert not list(cache.folder.glob("*.tar"))


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def test_the_cache_is_bounded_and_evicts_the_least_recently_read(tmp_path):
    cache = ShardCache(tmp_path, max_bytes=2500)
    data = {f"{n}.tar": bytes([n]) * 1000 for n in range(4)}

    def get(name: str) -> Path:
        expected = ExpectedFile(1000, hashlib.sha256(data[name]).hexdigest())
        return cache.get(name, lambda path: write(path, data[name]), expected)

    for number, name in enumerate(("0.tar", "1.tar")):
        os.utime(get(name), (number, number))
    # Read later than the other.
    os.utime(get("0.tar"), (5, 5))
    assert get("2.tar").read_bytes() == data["2.tar"]
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["0.tar", "2.tar"]
    assert get("1.tar").read_bytes() == data["1.tar"]
    assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 2500


READER = """
import random, shutil, sys
from pathlib import Path
from megabert.data.shards.cache import CacheOptions, ExpectedFile, WholeFileReader

folder, cache, max_bytes, hashes, seed = sys.argv[1:]
expected = [ExpectedFile(1000, sha256) for sha256 in hashes.split(",")]
reader = WholeFileReader("here", CacheOptions(Path(cache), int(max_bytes)))
random.seed(seed)
for _ in range(150):
    number = random.randrange(len(expected))
    fetch = lambda path: shutil.copyfile(f"{folder}/{number}.tar", path)
    assert reader.read(f"{number}.tar", 500, 100, fetch, expected[number]) == bytes([number]) * 100
"""


def test_a_cache_smaller_than_its_readers_need_stays_correct(tmp_path):
    """Four processes read 24 files through a cache for two: every read is correct, and the limit holds at the end."""
    files = [bytes([number]) * 1000 for number in range(24)]
    for number, data in enumerate(files):
        write(tmp_path / f"{number}.tar", data)
    hashes = ",".join(hashlib.sha256(data).hexdigest() for data in files)
    command = [sys.executable, "-c", READER, str(tmp_path), str(tmp_path / "cache"), "2000", hashes]
    processes = [subprocess.Popen([*command, str(seed)]) for seed in range(4)]
    assert [process.wait(300) for process in processes] == [0] * 4
    assert sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= 2000
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_damaged_copy_in_the_cache_is_fetched_again(folder, cache):
    command = f"pipe:cat {folder}/train-{{00000..00023}}.tar"
    first = open_source(command, cache=cache)
    first.read_chunk(0, 0)
    [kept] = cache.folder.glob("*.tar")
    data = bytearray(kept.read_bytes())
    data[1000] ^= 1
    # The size stays right.
    kept.write_bytes(bytes(data))
    assert (first.read_chunk(0, 0).tokens == open_source(str(folder)).read_chunk(0, 0).tokens).all()
    shard = first.shards[0]
    assert kept.name.endswith(f"{shard.sha256[:16]}-{shard.name}")


def test_a_damaged_block_in_the_cache_is_fetched_again(folder, serve, cache):
    """Its size stays right, as after a power cut. A shard that is damaged on the server stays an error."""
    url, handler = serve(folder)
    source, local = open_source(url, cache=cache), open_source(str(folder))
    source.read_chunk(0, 0)
    [kept] = cache.folder.glob("*.block")
    kept.write_bytes(bytes(kept.stat().st_size))
    assert (source.read_chunk(0, 0).tokens == local.read_chunk(0, 0).tokens).all()
    assert len([request for request in handler.requests if ".tar" in request]) == 2
    path = folder / source.shards[1].name
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedShardError, match="its checksum differs from the manifest's"):
        source.read_chunk(1, 0)


@pytest.mark.parametrize("broken", ["read_only", "file"])
def test_an_unwritable_cache_raises_with_a_remedy(corpus, tmp_path, broken):
    (tmp_path / "file").write_text("in the way")
    place = Path("/proc/nowhere") if broken == "read_only" else tmp_path / "file" / "cache"
    source = open_source(f"pipe:cat {corpus.tokens}/train-{{00000..00023}}.tar", cache=CacheOptions(place, 1 << 30))
    with pytest.raises(ValueError, match=r"cannot keep shards there.*data\.cache_dir"):
        source.read_chunk(0, 0)


@pytest.mark.parametrize(
    "error",
    [FileNotFoundError("gone"), OSError(errno.ENOSPC, "No space left"), ValueError("wrong"), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_another_attempt_cannot_cure_are_raised_at_once(error):
    attempts = []

    def fail():
        attempts.append(1)
        raise error

    with pytest.raises(type(error)) as raised:
        retrying(fail, "here", 60.0)
    assert raised.value is error
    assert len(attempts) == 1


def test_a_failing_action_is_repeated_until_it_succeeds(caplog):
    errors = [TimeoutError("first"), EOFError("second")]

    def act():
        if errors:
            raise errors.pop(0)
        return "done"

    assert retrying(act, "here", 60.0) == "done"
    assert caplog.messages == [
        "here: TimeoutError('first'); still retrying after 0 s",
        "here: EOFError('second'); still retrying after 0 s",
    ]


def test_a_refusing_server_is_not_asked_again(corpus, serve, cache, caplog):
    url, _ = serve(corpus.tokens, failures=10**6, status=403)
    with pytest.raises(
        OSError, match=rf"{url}/train-00000\.tar: HTTP 403 .*signed URL are missing or have expired"
    ) as error:
        open_source(url, cache=cache).read_chunk(0, 0)
    assert exit_code(error.value) == 2
    assert "trying again" not in caplog.text


def as_raised_by(monkeypatch, name: str, message: str = "sorry", **attributes: object) -> BaseException:
    """Return an error of a client that need not be installed, such as "gcsfs.retry.HttpError"."""
    module = types.ModuleType(name.rpartition(".")[0])
    error = type(name.rpartition(".")[2], (Exception,), attributes)
    setattr(module, error.__name__, error)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return error(message)


def as_raised_by_s3fs(code: str) -> OSError:
    error = OSError(errno.EINVAL, "The provided token is not valid")
    error.__cause__ = Exception()
    error.__cause__.response = {"Error": {"Code": code}}  # pyrefly: ignore[missing-attribute] # as of a ClientError
    return error


def as_raised_by_hub(status: int) -> HfHubHTTPError:
    request = httpx2.Request("GET", "https://hub/file")
    return HfHubHTTPError("for url:\nhttps://hub/file", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    "make",
    [
        lambda patch: httpx2.ReadTimeout("slow"),
        lambda patch: as_raised_by(patch, "gcsfs.retry.HttpError", code=503),
        lambda patch: as_raised_by(patch, "gcsfs.retry.HttpError", code="429"),
        lambda patch: as_raised_by(patch, "google.auth.exceptions.GoogleAuthError"),
        lambda patch: as_raised_by(patch, "azure.core.exceptions.AzureError"),
        lambda patch: as_raised_by(patch, "azure.core.exceptions.AzureError", status_code=503),
        lambda patch: as_raised_by(patch, "botocore.exceptions.BotoCoreError"),
        lambda patch: as_raised_by(patch, "botocore.exceptions.ClientError", response={"Error": {"Code": "SlowDown"}}),
        lambda patch: as_raised_by_s3fs("RequestTimeout"),
        lambda patch: as_raised_by_hub(503),
    ],
)
def test_the_errors_of_each_store_client_are_retried(make, monkeypatch):
    monkeypatch.setattr(retry, "_pause", lambda seconds: None)
    error, attempts = make(monkeypatch), []

    def act():
        attempts.append(1)
        if len(attempts) < 3:
            raise error
        return "done"

    assert retrying(act, "gs://b/c", 60.0) == "done"


@pytest.mark.parametrize(
    "make",
    [
        # As s3fs does: without an errno.
        lambda patch: PermissionError("The provided token has expired."),
        lambda patch: as_raised_by_s3fs("InvalidToken"),
        lambda patch: as_raised_by_s3fs("TokenRefreshRequired"),
        # As gcsfs does.
        lambda patch: OSError("Forbidden: https://storage/file\nexpired"),
        lambda patch: as_raised_by(patch, "gcsfs.retry.HttpError", code=401),
        lambda patch: as_raised_by(patch, "azure.core.exceptions.AzureError", status_code=403),
        lambda patch: as_raised_by_hub(401),
        lambda patch: as_raised_by_hub(403),
    ],
)
def test_credentials_that_a_store_refuses_are_told_apart_from_an_outage(make, monkeypatch):
    attempts = []

    def act():
        attempts.append(1)
        raise make(monkeypatch)

    with pytest.raises(RefusedError, match=r"^s3://b/c: .*signed URL are missing or have expired, renew.*$") as error:
        retrying(act, "s3://b/c", 60.0)
    assert exit_code(error.value) == 2
    assert len(attempts) == 1


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("botocore.exceptions.BotoCoreError", "NoCredentialsError"),
        ("botocore.exceptions.BotoCoreError", "CredentialRetrievalError"),
        ("botocore.exceptions.BotoCoreError", "SSOError"),
        ("google.auth.exceptions.GoogleAuthError", "RefreshError"),
        ("azure.core.exceptions.AzureError", "ClientAuthenticationError"),
    ],
)
def test_missing_credentials_are_looked_for_again_for_half_a_minute(family, name, monkeypatch):
    error = as_raised_by(monkeypatch, family)
    module = sys.modules[family.rpartition(".")[0]]
    monkeypatch.setattr(module, name, type(name, (type(error),), {}), raising=False)
    monkeypatch.setattr(retry, "_pause", lambda seconds: None)
    clock = count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    attempts = []

    def act():
        attempts.append(1)
        raise getattr(module, name)("expired")

    with pytest.raises(RefusedError, match=rf"^s3://b/c: {name}\('expired'\)\. .*renew them.*$") as raised:
        retrying(act, "s3://b/c", 900.0)
    assert exit_code(raised.value) == 2
    assert 2 < len(attempts) <= 31


def test_ranks_that_fail_together_do_not_return_together(monkeypatch):
    pauses = []
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.25)
    monkeypatch.setattr(retry, "_pause", pauses.append)
    clock = count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))

    def fail():
        raise TimeoutError

    for _ in range(2):
        with pytest.raises(StoreAwayError):
            retrying(fail, "here", 60.0)
    half = len(pauses) // 2
    assert pauses[:half] != pauses[half : 2 * half]
    assert max(pauses) <= LONGEST_PAUSE_S


def test_a_slow_request_is_made_a_second_time_and_the_first_answer_counts(monkeypatch, caplog):
    monkeypatch.setattr(retry, "SLOW_S", 0.05)
    started, released = [], threading.Event()

    def request() -> int:
        started.append(1)
        number = len(started)
        if number == 1:
            released.wait(30)
        return number

    before = waited_for_store_at()
    assert HedgedRequest()(request, "here") == 2
    released.set()
    assert "here: no answer for" in caplog.text
    assert waited_for_store_at() > before, "its peers know that this is no hang"


def test_a_store_that_is_always_slow_is_no_hang_before_the_second_request():
    request = HedgedRequest()
    # So that a request counts as slow after 75 s.
    request._seconds.extend([15.0])
    started, before, released = [], waited_for_store_at(), threading.Event()
    answer = threading.Thread(target=lambda: request(lambda: started.append(1) or released.wait(30), "here"))
    answer.start()
    until = time.monotonic() + 30.0
    while waited_for_store_at() == before and time.monotonic() < until:
        time.sleep(0.1)
    released.set()
    answer.join()
    assert waited_for_store_at() > before
    assert len(started) == 1


def test_two_failing_requests_raise_and_one_that_succeeds_is_enough(monkeypatch):
    monkeypatch.setattr(retry, "SLOW_S", 0.05)
    started, second_began, first_failed = [], threading.Event(), threading.Event()

    def request() -> str:
        started.append(1)
        if len(started) == 1:
            second_began.wait(30)
            first_failed.set()
            raise TimeoutError("the first")
        second_began.set()
        first_failed.wait(30)
        return "the second"

    assert HedgedRequest()(request, "here") == "the second"
    with pytest.raises(ZeroDivisionError):
        HedgedRequest()(lambda: 1 // 0, "here")


def test_reads_ahead_are_counted_in_seconds_of_training(monkeypatch):
    """One result a second: ten seconds of them would be ten reads, of which eight are allowed."""
    now, read = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    results = read_ahead(range(100), lambda item: read.append(item) or item, 2)
    for expected in range(20):
        now[0] += 1.0
        assert next(results) == (expected, expected)
    assert wait_until(lambda: len(read) == 20 + 8)
    slow = read_ahead(range(100, 200), lambda item: read.append(item) or item, 2)
    for _ in range(20):
        now[0] += 60.0
        next(slow)
    assert wait_until(lambda: sum(item >= 100 for item in read) == 20 + 2)
    assert list(read_ahead("abc", str.upper, 0)) == [("a", "A"), ("b", "B"), ("c", "C")]


def wait_until(condition) -> bool:
    for _ in range(500):
        if condition():
            return True
        time.sleep(0.01)
    return False


def test_concurrent_readers_fetch_a_shard_once(tmp_path):
    cache = ShardCache(tmp_path, max_bytes=1 << 20)
    fetched = []

    def fetch(path: Path) -> None:
        fetched.append(path)
        write(path, b"x" * 100)

    expected = ExpectedFile(100, hashlib.sha256(b"x" * 100).hexdigest())
    with ThreadPoolExecutor(8) as threads:
        paths = set(threads.map(lambda _: cache.get("a.tar", fetch, expected), range(50)))
    assert len(fetched) == len(paths) == 1


def test_local_locations_with_and_without_scheme(corpus, cache):
    for location in (str(corpus.tokens), f"{corpus.tokens}/", f"file://{corpus.tokens}"):
        assert open_source(location, cache=cache).tokens == open_source(str(corpus.tokens)).tokens
    with pytest.raises(ValueError, match=MANIFEST):
        open_source(f"{corpus.tokens / MANIFEST}", cache=cache)


def test_prefetching_does_not_change_what_is_read(corpus, cache, caplog):
    caplog.set_level(logging.WARNING)
    source = open_source(f"pipe:cat {corpus.tokens}/train-{{00000..00023}}.tar", cache=cache)
    source.prefetch(3)
    source.prefetch(3)
    assert (source.read_chunk(3, 0).tokens == open_source(str(corpus.tokens)).read_chunk(3, 0).tokens).all()


@pytest.mark.parametrize("command", ["yes {name}", "cat /dev/zero; sleep 1000 # {name}"])
def test_a_command_without_end_is_stopped(corpus, cache, tmp_path, monkeypatch, command):
    """Its output is the manifest, or a shard, of which the manifest gives the size."""
    monkeypatch.setattr(side_files, "MAX_MANIFEST_BYTES", 5000)
    with pytest.raises(ValueError, match=r"has more than 5,000 bytes, the most that are expected"):
        open_source(f"pipe:{command.replace('{name}', 'train-00000.tar')}", cache=cache)
    expected = ExpectedFile(5000, "0" * 64)
    with pytest.raises(WrongContentError, match="more bytes arrived than the 5000 of the manifest"):
        CommandStorage(f"pipe:{command}", cache).read("train-00000.tar", 0, 10, expected)
    assert not [path for path in cache.folder.iterdir() if path.name.endswith((".part", ".tar"))]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("SLEEP; cat {name}", "printed nothing for 0 s"),
        ("echo x; SLEEP # {name}", "printed nothing for 0 s"),
        ("echo x; exec 1>&-; SLEEP # {name}", "printed all, but did not end for 0 s"),
    ],
)
def test_a_command_that_stalls_is_stopped(cache, monkeypatch, command, message):
    """Nothing that it has started stays behind."""
    monkeypatch.setattr(storage, "SILENT_S", 0.3)
    sleep = ["sleep", f"1000.{os.getpid()}"]
    command = command.replace("SLEEP", " ".join(sleep)).replace("{name}", "train-00000.tar")
    with pytest.raises(StoreAwayError, match=rf"pipe:.*manifest\.json.*: failed 1 times over 0 s: .*{message}"):
        open_source(f"pipe:{command}", cache=cache)
    # A process that was killed may wait for init to collect its exit code.
    alive = [process for process in psutil.process_iter(["cmdline", "status"]) if process.info["cmdline"] == sleep]
    assert {process.info["status"] for process in alive} <= {psutil.STATUS_ZOMBIE}


class Endless(http.server.BaseHTTPRequestHandler):
    """Answers every request with bytes without end, compressed if the address says so."""

    def do_GET(self):
        self.send_response(200)
        compress = zlib.compressobj(wbits=31) if "gzip" in self.path else None
        if compress:
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        with contextlib.suppress(OSError):
            while True:
                data = bytes(1 << 20)
                self.wfile.write(compress.compress(data) + compress.flush(zlib.Z_SYNC_FLUSH) if compress else data)

    def log_message(self, *args):  # type: ignore[override]
        pass


@pytest.mark.parametrize("folder", ["plain", "gzip"])
def test_a_server_without_end_is_stopped(cache, monkeypatch, folder):
    monkeypatch.setattr(side_files, "MAX_MANIFEST_BYTES", 5_000_000)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{folder}"
        with pytest.raises(ValueError, match=rf"{url}/manifest\.json: has more than 5,000,000 bytes"):
            open_source(url, cache=cache)
        with pytest.raises(WrongContentError, match="more bytes arrived than the 3000 of the manifest"):
            RemoteFolder(url, cache).read("train-00000.tar", 0, 10, ExpectedFile(3000, "0" * 64))
        server.shutdown()


@pytest.mark.parametrize(
    "location",
    ["x-{0..99999999}.tar", "x-{0..999}{0..9999}.tar", "x{0..1" + "0" * 30 + "}.tar", "{a,b}" * 30 + ".tar",
     "{{a,b}" + "{a,b}" * 30 + ",x}.tar", "x-{0..99999999}{5..5}.tar", r"\\{0..99999999}.tar",
     "pipe:cat x-{0..99999999}.tar", "http://h/x-{000000000..999999999}.tar"],
)  # fmt: skip
def test_more_names_than_there_can_be_shards_are_refused_at_once(cache, location):
    with pytest.raises(ValueError, match="names more than 100,000 shards. Name a folder, which means all in it"):
        open_storage(location, cache)


def test_unbalanced_braces_are_named(cache):
    with pytest.raises(ValueError, match=r"x-\{0\.\.9\.tar: Unbalanced braces.*such as train-\{00000"):
        open_storage("x-{0..9.tar", cache)
    assert open_storage("x-{0..2}.tar", cache)[1] == ["x-0.tar", "x-1.tar", "x-2.tar"]
