import dataclasses
import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import webdataset

from megabert.data import sample_format
from megabert.data.shards import (
    MANIFEST,
    TOKENIZER,
    check_same_tokenizer,
    check_tokenizer_file,
    open_source,
    read_manifest,
)


@pytest.fixture
def folder(corpus, tmp_path):
    """A copy of the token shards to damage."""
    return shutil.copytree(corpus.tokens, tmp_path / "tokens")


def test_plain_webdataset_reads_our_shards(corpus):
    source = open_source(str(corpus.tokens))
    path = corpus.tokens / source.shards[0].name
    samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
    tokens = [np.load(io.BytesIO(sample["tokens.npy"])) for sample in samples]
    lengths = [np.load(io.BytesIO(sample["lengths.npy"])) for sample in samples]
    assert sum(map(len, tokens)) == source.shards[0].tokens
    assert sum(map(len, lengths)) == source.shards[0].documents


def test_chunks_read_by_byte_range_equal_the_whole_shard(corpus):
    source = open_source(str(corpus.tokens))
    samples = webdataset.WebDataset(str(corpus.tokens / source.shards[0].name), shardshuffle=False)
    for number, sample in enumerate(samples):
        whole = np.load(io.BytesIO(sample["tokens.npy"]))
        assert np.array_equal(source.read_chunk(0, number).tokens, whole)


def test_splits_cover_every_chunk_once(corpus):
    source = open_source(str(corpus.tokens))
    few = dataclasses.replace(source, shards=source.shards[:3])
    for part in (source, few):
        splits = part.splits()
        covered = [(s.shard, chunk) for s in splits for chunk in range(s.first, s.last)]
        assert covered == [(i, c) for i, shard in enumerate(part.shards) for c in range(len(shard.chunks))]
        assert all(s.last > s.first for s in splits)


def test_brace_notation_names_shards_of_one_manifest(corpus):
    source = open_source(f"{corpus.tokens}/train-{{00000..00003}}.tar")
    assert [shard.name for shard in source.shards] == [f"train-{i:05d}.tar" for i in range(4)]
    with pytest.raises(ValueError, match=r"train-99999\.tar is not among the manifest's \d+ train shards"):
        open_source(f"{corpus.tokens}/train-99999.tar")
    with pytest.raises(ValueError, match="spans the folders"):
        open_source(f"{corpus.tokens}/{{a,b}}/train-00000.tar")


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"manifest\.json: no such file.*write_shards\.py"):
        open_source(str(tmp_path))


def test_a_missing_shard_is_named(folder):
    (folder / "train-00002.tar").unlink()
    with pytest.raises(ValueError, match=r"train-00002\.tar: the manifest lists this shard, but it is missing"):
        open_source(str(folder))


def test_a_truncated_shard_is_named(folder):
    path = folder / "train-00001.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(ValueError, match=r"train-00001\.tar: \d+ bytes, but the manifest says \d+"):
        open_source(str(folder))


def test_a_shard_that_vanishes_or_shrinks_while_training_is_named(folder):
    source = open_source(str(folder))
    path = folder / source.shards[0].name
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"chunk 0 \(byte 0\): 1000 bytes, expected \d+: the shard is truncated"):
        source.read_chunk(0, 0)
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.tar: the shard is missing"):
        source.read_chunk(0, 0)


def test_damaged_tar_headers_are_named(folder):
    source = open_source(str(folder))
    path = folder / source.shards[0].name
    data = bytearray(path.read_bytes())
    data[0:100] = b"\xff" * 100
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"train-00000\.tar chunk 0"):
        source.read_chunk(0, 0)


def test_a_part_without_documents_is_refused(folder):
    raw = json.loads((folder / MANIFEST).read_text())
    raw["splits"]["train"] = []
    (folder / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="the train part has no documents. Write the shards again from a corpus"):
        open_source(str(folder))


def test_a_manifest_of_another_format_or_no_json_is_refused(folder):
    (folder / MANIFEST).write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99, expected 1"):
        read_manifest(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        read_manifest(folder)


def test_shards_of_another_tokenizer_are_refused(corpus, folder):
    source = open_source(str(corpus.tokens))
    raw = json.loads((folder / MANIFEST).read_text())
    raw["tokenizer"]["fingerprint"] = "f" * 64
    (folder / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="written with tokenizer ffffffffffff, but .* with"):
        check_same_tokenizer(source, open_source(str(folder), "heldout"))
    with pytest.raises(ValueError, match=r"its fingerprint is .*, but the shards were written with ffffffffffff"):
        check_tokenizer_file(open_source(str(folder)))
    (folder / TOKENIZER).unlink()
    with pytest.raises(ValueError, match="no such file; it belongs beside the shards"):
        check_tokenizer_file(open_source(str(folder)))


def test_text_shards_are_not_tokens(folder):
    raw = json.loads((folder / MANIFEST).read_text()) | {"kind": "text", "tokenizer": None}
    (folder / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ValueError, match="holds text, expected tokens"):
        _ = open_source(str(folder)).tokenizer


def test_samples_survive_encoding():
    chunk = sample_format.TokenChunk(np.arange(7, dtype=np.uint16), np.array([3, 0, 4], dtype=np.int32))
    decoded = sample_format.decode_tokens(sample_format.encode_tokens(chunk), "here")
    assert all(np.array_equal(a, b) for a, b in zip(chunk, decoded, strict=True))
    documents = ["plain", "two\nlines", "\u2028 \U0001f600 \x00", ""]
    assert sample_format.decode_text(sample_format.encode_text(documents), "here") == documents
    assert sample_format.token_dtype(65_536) == np.uint16
    assert sample_format.token_dtype(65_537) == np.uint32


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"jsonl": b""}, r"expected a member \.tokens\.npy"),
        ({"tokens.npy": b"garbage", "lengths.npy": b""}, "not a plain .npy array"),
    ],
)
def test_wrong_token_samples_are_refused(sample, message):
    with pytest.raises(ValueError, match=message):
        sample_format.decode_tokens(sample, "shard.tar chunk 3")


def test_wrong_arrays_are_refused():
    good = sample_format.TokenChunk(np.arange(7, dtype=np.uint16), np.array([7], dtype=np.int32))
    floats = sample_format.encode_tokens(good._replace(tokens=np.zeros(7)))
    with pytest.raises(ValueError, match=r"holds float64 of shape \(7,\), expected flat uint16 or uint32"):
        sample_format.decode_tokens(floats, "x")
    short = sample_format.encode_tokens(good._replace(lengths=np.array([6], dtype=np.int32)))
    with pytest.raises(ValueError, match="lengths sum to 6, expected int32 that sum to the chunk's 7 tokens"):
        sample_format.decode_tokens(short, "x")


def test_pickles_are_never_loaded():
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"an": "object"}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a plain .npy array"):
        sample_format.decode_tokens({"tokens.npy": buffer.getvalue(), "lengths.npy": b""}, "x")


def test_wrong_text_samples_are_refused():
    for sample, message in (({"tokens.npy": b""}, "expected a member .jsonl"), ({"jsonl": b'{"a": 1}\n'}, "not one")):
        with pytest.raises(ValueError, match=message):
            sample_format.decode_text(sample, "x")


def test_member_names_never_become_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        sample_format.write_sample(tar, "../../etc/escape", {"jsonl": b""})
    assert sample_format.read_sample(buffer.getvalue(), "x")
    assert list(tmp_path.iterdir()) == []
