"""Manifests: what is written is read again, and impossible values raise ValueError."""

import contextlib
import hashlib
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabert.data.shards import manifest
from megabert.data.shards.manifest import (
    CHUNKS,
    MANIFEST,
    Manifest,
    Shard,
    TokenizerInfo,
    own_hash,
    parse_manifest,
    read_manifest,
    write_manifest,
)

INFO = TokenizerInfo("abc", 100, {"pad": 0, "unk": 1, "cls": 2, "sep": 3, "mask": 4}, (0, 1, 2, 3, 4))
INDEX = np.array([[0, 1024, 2, 9, 77], [1024, 1024, 1, 5, 78]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("manifest")
    shards = (Shard("train-00000.tar", "f" * 64, 3072, 3, 14, INDEX),)
    write_manifest(
        folder, Manifest("tokens", {"train": shards}, {"documents": 3, "median_document_tokens": 4}, INFO, "asked")
    )
    return folder


def parse(folder, change=lambda raw: None, index: bytes | None = None) -> Manifest:
    raw = json.loads((folder / MANIFEST).read_text())
    chunks = (folder / CHUNKS).read_bytes() if index is None else index
    raw["chunks_sha256"] = hashlib.sha256(chunks).hexdigest()
    change(raw)
    raw["sha256"] = own_hash(raw)
    return parse_manifest(json.dumps(raw).encode(), chunks, "here")


def test_what_is_written_is_read(folder):
    found = read_manifest(folder)
    assert found.tokenizer == INFO
    assert found.splits["train"][0].name == "train-00000.tar"
    assert np.array_equal(found.splits["train"][0].chunks, INDEX)
    assert (found.kind, found.request, found.statistics) == (
        "tokens",
        "asked",
        {"documents": 3, "median_document_tokens": 4},
    )


def shard(raw):
    return raw["splits"]["train"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: shard(raw).update(name="../train.tar"), "is not a shard's name"),
        (lambda raw: shard(raw).update(name="/etc/x.tar"), "is not a shard's name"),
        (lambda raw: shard(raw).update(name=".hidden.tar"), "is not a shard's name"),
        (lambda raw: shard(raw).update(name=5), "not a manifest of write_shards.py"),
        (lambda raw: shard(raw).update(num_chunks=3), r"has 3 chunks, chunks\.npy has 2 left"),
        (lambda raw: shard(raw).update(num_chunks=-1), "has -1 chunks"),
        (lambda raw: shard(raw).update(num_chunks=1e9), "has 1000000000.0 chunks"),
        (lambda raw: shard(raw).update(bytes=2000), "a chunk outside its 2000 bytes"),
        (lambda raw: shard(raw).update(bytes="many"), "train-00000.tar with 'many' bytes"),
        (lambda raw: raw["tokenizer"]["special_ids"].pop("mask"), "expected pad, unk, cls, sep, mask"),
        (lambda raw: shard(raw).update(extra=1), "not a manifest of write_shards.py"),
        (lambda raw: shard(raw).pop("sha256"), "not a manifest of write_shards.py"),
        (lambda raw: raw.update(splits=[1]), "not a manifest of write_shards.py"),
        (lambda raw: raw.pop("statistics"), "not a manifest of write_shards.py: KeyError"),
        (lambda raw: raw.update(statistics=[]), "statistics that are not a table"),
        (lambda raw: raw.update(statistics={}), "no median_document_tokens among its statistics"),
        (lambda raw: raw["statistics"].update(length_histogram=[]), "a length_histogram that does not list documents"),
        (
            lambda raw: raw["statistics"].update(length_histogram={"documents": [1, 2], "tokens": [1, -2]}),
            "a length_histogram that does not list documents",
        ),
        (lambda raw: raw["tokenizer"].update(fingerprint=5), "a fingerprint 5"),
        (lambda raw: shard(raw).update(num_chunks=1), r"its shards have 1 chunks, chunks\.npy has 2"),
        (lambda raw: shard(raw).update(tokens=15), "3 documents of 15 tokens, its chunks have 3 of 14"),
        (lambda raw: shard(raw).update(documents=4), "4 documents of 14 tokens, its chunks have 3 of 14"),
        (lambda raw: shard(raw).update(sha256="f"), "with a sha256 'f'"),
        (lambda raw: raw["statistics"].update(documents=4), "statistics of 4 documents, its shards have 3"),
        (lambda raw: raw["statistics"].update(tokens="many"), "statistics of 'many' tokens, its shards have 14"),
        (lambda raw: raw.update(files={"a": 5}), "files without a sha256"),
        (lambda raw: raw.update(files=[]), "files without a sha256"),
        (lambda raw: raw.update(format=True), "format True, expected 3"),
        (lambda raw: raw.update(format=[]), r"format \[\], expected 3"),
        (lambda raw: raw["tokenizer"].update(all_special_ids=[]), "not among all_special_ids"),
        (lambda raw: raw["tokenizer"]["special_ids"].update(mask=0), "special tokens that share an id"),
        (lambda raw: raw.update(kind="pickle"), "kind 'pickle' with a tokenizer"),
        (lambda raw: raw.update(tokenizer=None), "kind 'tokens' with no tokenizer"),
        (lambda raw: raw["tokenizer"].update(vocab_size=10**12), "a vocabulary of 1000000000000, expected 1 to"),
        (lambda raw: raw["tokenizer"]["special_ids"].update(mask=100), "a special id beyond its vocabulary of 100"),
        (lambda raw: raw["tokenizer"].update(all_special_ids=[-1]), "a special id beyond its vocabulary"),
        (lambda raw: raw.update(format=1), "format 1, expected 3"),
        (lambda raw: raw.update(chunks_sha256="0"), r"belongs to another chunks\.npy than the one next to it"),
    ],
)
def test_impossible_values_are_refused(folder, change, message):
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        parse(folder, change)


@pytest.mark.parametrize("row", [[-1, 5, 1, 1, 0], [0, 2**62, 1, 1, 0], [2**62, 2**62, 1, 1, 0], [0, 5, -1, 1, 0]])
def test_an_index_that_points_outside_the_shard_is_refused(folder, row):
    file = io.BytesIO()
    np.save(file, np.array([row, INDEX[1]]))
    with pytest.raises(ValueError, match="a chunk outside its 3072 bytes, or of more than 1024 MiB"):
        parse(folder, index=file.getvalue())


def test_a_changed_value_is_found_by_the_hash_of_the_manifest(folder):
    raw = json.loads((folder / MANIFEST).read_text())
    raw["statistics"]["median_document_tokens"] = 5
    with pytest.raises(ValueError, match="here: was changed after it had been written.*Fetch or write it again"):
        parse_manifest(json.dumps(raw).encode(), (folder / CHUNKS).read_bytes(), "here")


def test_a_manifest_without_end_is_not_read(tmp_path, folder, monkeypatch):
    (tmp_path / CHUNKS).write_bytes((folder / CHUNKS).read_bytes())
    (tmp_path / MANIFEST).symlink_to("/dev/zero")
    monkeypatch.setattr(manifest, "MAX_MANIFEST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"manifest\.json: has more than 1,000 bytes"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000, "null", "5", '"x"', "[]"])
def test_json_of_another_type_or_depth_is_refused(text):
    with pytest.raises(ValueError, match="here: (not valid JSON|format None, expected 3)"):
        parse_manifest(text.encode(), b"", "here")


def test_an_index_of_another_shape_or_a_pickle_is_refused(folder):
    for array, message in (
        (np.zeros((2, 4), np.int64), r"shape \(2, 4\), expected int64"),
        (np.zeros((2, 5)), "float64"),
    ):
        file = io.BytesIO()
        np.save(file, array)
        with pytest.raises(ValueError, match=message):
            parse(folder, index=file.getvalue())
    file = io.BytesIO()
    np.save(file, np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a plain .npy array"):
        parse(folder, index=file.getvalue())


@contextlib.contextmanager
def may_be_refused():
    """Allow a ValueError that names the file, and no other error."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("here: "):
            raise


SHARD_KEYS = ("name", "sha256", "bytes", "documents", "tokens", "num_chunks")
TOKENIZER_KEYS = ("fingerprint", "vocab_size", "special_ids", "all_special_ids")
PATHS = [
    *[("kind",), ("splits",), ("splits", "train"), ("splits", "train", 0)],
    *[("tokenizer",), ("statistics",), ("request",)],
    *[("splits", "train", 0, key) for key in SHARD_KEYS],
    *[("tokenizer", key) for key in TOKENIZER_KEYS],
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.sampled_from(PATHS), JSON)
def test_any_json_value_is_accepted_or_refused_with_a_message(folder, path, value):
    def change(raw):
        for key in path[:-1]:
            raw = raw[key]
        raw[path[-1]] = value

    with may_be_refused():
        parse(folder, change)


@given(st.binary(max_size=200))
def test_noise_is_refused(noise):
    with pytest.raises(ValueError, match="here: (not valid JSON|format)"):
        parse_manifest(noise, b"", "here")
