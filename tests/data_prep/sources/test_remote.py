"""Tests that a corpus at a URL, in memory or on a web server, is read as the same corpus in a folder."""

import gzip
import http.server
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from data_prep import write_shards
from data_prep.sources import LeftOut, ReadOptions, list_input_splits, read_input_split, source_state
from megabert.data.shards import retry

PLAIN = ReadOptions()


@pytest.fixture
def folder(tmp_path) -> Path:
    """Text in every format, hidden, empty and other files, in nested folders."""
    folder = tmp_path / "corpus"
    (folder / "deep/er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / "a.txt").write_text("one text")
    (folder / "latin.txt").write_bytes("\ufeffmarked text".encode("utf-16"))
    lines = "".join(json.dumps({"text": f"line {n} " + "x" * (n % 50)}) + "\n" for n in range(400))
    (folder / "deep/b.jsonl").write_text(lines)
    (folder / "deep/er/c.json.gz").write_bytes(gzip.compress(lines.replace("line", "packed").encode()))
    table = pyarrow.table({"text": [f"row {n}" for n in range(50)] + [None]})
    pyarrow.parquet.write_table(table, folder / "deep/d.parquet", row_group_size=20)
    with pyarrow.ipc.new_file(folder / "e.arrow", table.schema) as writer:
        writer.write_table(pyarrow.table({"text": ["arrow text", "more"]}))
    for name in (".hidden/f.txt", ".g.txt", "deep/empty.txt", "deep/picture.png"):
        (folder / name).write_text("" if "empty" in name else "not read")
    return folder


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, with ranges of bytes if `ranges`; answers the first requests with 503 if `failures`."""

    ranges, failures = True, 0

    def do_GET(self) -> None:
        if type(self).failures:
            type(self).failures -= 1
            self.send_error(503)
            return
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        path = Path(self.translate_path(self.path))
        if not (self.ranges and span and path.is_file()):
            super().do_GET()
            return
        data = path.read_bytes()[int(span[1]) : int(span[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {span[1]}-{span[2]}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def serve(folder) -> Iterator:
    servers = []

    def start(**settings: object) -> str:
        handler = type("Handler", (Server,), settings)
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=folder))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def in_memory(folder: Path) -> str:
    system = fsspec.filesystem("memory")
    if system.exists("/corpus"):
        system.rm("/corpus", recursive=True)
    system.put(str(folder), "/corpus", recursive=True)
    return "memory://corpus"


def read(source: str, options: ReadOptions = PLAIN) -> tuple[list[str], dict[str, int]]:
    left_out = LeftOut(options.skip_damaged)
    splits = list_input_splits(source, options, left_out)
    return [text for split in splits for text in read_input_split(split, options, left_out)], left_out.counts


def test_every_format_in_memory_is_read_as_in_a_folder(folder, monkeypatch):
    monkeypatch.setattr("data_prep.sources.base.INPUT_SPLIT_BYTES", 100)
    expected = read(str(folder))
    assert len(expected[0]) == 2 + 800 + 50 + 2
    assert expected[1] == {
        "hidden files and folders": 2,
        "empty files": 1,
        "files of another kind": 1,
        "null texts": 1,
    }
    assert read(in_memory(folder)) == expected
    # Only a link of a web page is not read for its question mark.
    (folder / "what?.txt").write_text("a question")
    assert read(in_memory(folder)) == read(str(folder)) != expected
    url = "memory://corpus/deep/b.jsonl"
    assert len(list_input_splits(url, ReadOptions())) > 1
    assert read(url) == read(str(folder / "deep/b.jsonl"))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_with_and_without_ranges_is_read_as_a_folder(folder, serve, ranges):
    assert read(serve(ranges=ranges)) == read(str(folder))


def test_damage_is_refused_or_counted_as_in_a_folder(folder):
    (folder / "deep/b.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n{"text"\n')
    packed = folder / "deep/er/c.json.gz"
    packed.write_bytes(packed.read_bytes()[:-30])
    skip = ReadOptions(skip_damaged=True)
    expected = read(str(folder), skip)
    assert expected[1]["damaged"] == 3
    url = in_memory(folder)
    assert read(url, skip) == expected
    with pytest.raises(ValueError, match=r"memory://.*/deep/b\.jsonl at byte 17.*--on-bad-document skip"):
        read(url)
    assert read("memory://corpus/a.txt", ReadOptions(encoding="latin-1")) == (["one text"], {})


def test_a_changed_file_changes_the_state_of_the_source(folder):
    url = in_memory(folder)
    before = source_state(list_input_splits(url, ReadOptions()))
    assert source_state(list_input_splits(url, ReadOptions())) == before
    fsspec.filesystem("memory").pipe_file("/corpus/a.txt", b"two text")
    assert source_state(list_input_splits(url, ReadOptions())) != before


def test_a_server_that_fails_is_tried_again_and_never_counts_as_damage(folder, serve, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_PAUSE_S", 0.01)
    url = serve(failures=2)
    assert read(f"{url}deep/b.jsonl") == read(str(folder / "deep/b.jsonl"))
    for name in ("deep/d.parquet", "deep/b.jsonl", "deep/er/c.json.gz"):
        handler_url = serve()
        options = ReadOptions(skip_damaged=True)
        (split, *_) = list_input_splits(handler_url + name, options, LeftOut(True))
        (folder / name).unlink()
        with pytest.raises(ValueError, match="no such file or folder"):
            list(read_input_split(split, options, LeftOut(True)))


def test_what_cannot_be_read_is_a_one_line_error(serve):
    url = serve()
    for source, message in (
        (f"{url}none.jsonl", r"none\.jsonl: no such file or folder\. A folder of a web server must end with a slash"),
        (f"{url}deep", r"holds no text; .* A folder of a web server ends with a slash"),
        ("memory://nothing", r"memory://nothing: no such file or folder"),
        ("s3://bucket/corpus", r"s3://bucket: fsspec cannot open it: .*s3fs"),
        ("nosuch://x", r"nosuch://x: fsspec cannot open it: .*nosuch"),
    ):
        with pytest.raises(ValueError, match=message):
            list_input_splits(source, ReadOptions())


def test_shards_of_a_url_have_the_bytes_of_the_shards_of_the_folder(folder, serve, tmp_path):
    """The workers open the URL themselves."""
    for name, source in (("local", str(folder)), ("web", serve())):
        write_shards.main([f"--source={source}", f"--out={tmp_path / name}", "--min_shards=2", "--workers=1"])
    for path in (tmp_path / "local").glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "web" / path.name).read_bytes()
