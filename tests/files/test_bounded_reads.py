"""Reading ends with an error for a file that has no end, or that nobody writes to."""

import os
import signal

import pytest

from data_prep.tokenizer.existing import load_tokenizer
from data_prep.writing.metadata import tokenizer_files
from megabert.data.shards.manifest import read_manifest
from megabert.data.shards.tokenizer import TokenizerFile
from megabert.files.bounded_reads import has_file, read_bounded
from megabert.files.hashing import file_sha256
from megabert.files.json_file import read_json


@pytest.fixture(autouse=True)
def limited_time():
    """Raise in the middle of a test that waits for a writer."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("waited for 10 s"))
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("read", [lambda path: read_bounded(path, 10), file_sha256, read_json])
def test_a_named_pipe_is_refused_at_once(tmp_path, read):
    os.mkfifo(path := tmp_path / "pipe")
    with pytest.raises(ValueError, match=f"{path}: is a named pipe, expected a file"):
        read(path)


@pytest.mark.parametrize("name", ["manifest.json", "chunks.npy"])
def test_a_named_pipe_among_shards_is_refused_at_once(tmp_path, name):
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: is a named pipe"):
        read_manifest(tmp_path)


def test_a_device_without_an_end_is_read_up_to_the_limit(tmp_path):
    (path := tmp_path / "link").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"{path}: has more than 10 bytes"):
        read_bounded(path, 10)


def test_a_link_to_nothing_is_not_a_missing_file(tmp_path):
    (tmp_path / "link").symlink_to("link")
    with pytest.raises(ValueError, match="link: is a link to link, where no file is"):
        has_file(tmp_path / "link")
    assert not has_file(tmp_path / "missing")
    assert not has_file(tmp_path)


def test_a_tokenizer_with_a_link_to_nothing_beside_it_is_refused(corpus, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((corpus.tokenizer / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").symlink_to("nothing")
    file = TokenizerFile(tmp_path / "tokenizer.json", "")
    for read in (lambda: load_tokenizer(tmp_path, False), lambda: tokenizer_files(file)):
        with pytest.raises(ValueError, match="tokenizer_config.json: is a link to nothing"):
            read()
