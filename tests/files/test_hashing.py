"""Hashes of values, which are stored in manifests, requests and records: they must not change."""

import hashlib

from megabert.files.hashing import file_sha256, json_sha256, texts_sha256


def test_hashes_of_texts_and_values_are_those_of_earlier_versions(tmp_path):
    (tmp_path / "file").write_bytes(b"a\nb")
    assert texts_sha256(["a", "b"]) == file_sha256(tmp_path / "file") == hashlib.sha256(b"a\nb").hexdigest()
    assert texts_sha256(["b", "a"]) != texts_sha256(["a", "b"])
    assert json_sha256({"b": [1, None], "a": "x"}) == hashlib.sha256(b'{"a": "x", "b": [1, null]}').hexdigest()
    assert json_sha256({"a": "x", "b": [1, None]}) == json_sha256({"b": [1, None], "a": "x"})
