"""Tests that a damaged index of MDS shards is named, and that no shard takes more memory than a limit."""

import json

import pytest
import zstandard

from data_prep.sources import LeftOut, ReadOptions, list_input_splits
from data_prep.sources.tokens import read_token_split
from data_prep.sources.tokens.ids import IdRule
from tests.data_prep.helpers.foreign_tokens import write_mds

DOCUMENTS = [[5, 6, 7], [8], [9, 10]]
OPTIONS = ReadOptions(text_key="tokens")


def read(folder, left_out=None) -> list[int]:
    left_out = left_out or LeftOut()
    options = OPTIONS._replace(skip_damaged=left_out.skip_damaged)
    splits = list_input_splits(str(folder), options, left_out)
    rule = IdRule(100, (0,), None)
    batches = [batch for split in splits for batch in read_token_split(split, options, rule, left_out)]
    return [number for batch in batches for number in batch.ids.tolist()]


def in_shard(**values):
    """Change the first entry of the index; a value of None removes it."""

    def change(text: str) -> str:
        index = json.loads(text)
        entry = index["shards"][0] | {name: value for name, value in values.items() if value is not None}
        index["shards"][0] = {name: value for name, value in entry.items() if values.get(name, 0) is not None}
        return json.dumps(index)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"shards"', '"shards": [], "shards"'), "the key 'shards' appears twice"),
        (lambda text: text[:40], "damaged: "),
        (lambda text: "[" * 100_000, "damaged: "),
        (lambda text: '{"shards": 5}', "it has no list of shards"),
        (lambda text: '{"shards": [5]}', r"lacks shards\.0\.samples"),
        (in_shard(column_names=None), r"lacks shards\.0\.column_names"),
        (in_shard(column_names=["tokens"]), "column_names, column_encodings and column_sizes have different lengths"),
        (in_shard(column_encodings=["int", 5]), r"shards\.0\.column_encodings\.1 is 5, expected a string"),
        (in_shard(column_sizes=[-8, None]), r"shards\.0\.column_sizes\.0 is -8, expected at least 0"),
        (in_shard(samples="2"), r"shards\.0\.samples is '2', expected an integer"),
        (in_shard(raw_data={"basename": "shard.00000.mds"}), r"lacks shards\.0\.raw_data\.bytes"),
        (in_shard(raw_data={"basename": "../a.mds", "bytes": 5}), r"'\.\./a\.mds' is not below its folder"),
        (in_shard(raw_data={"basename": "shard.00000.mds", "bytes": 10**12}), r"the limit of a shard is 1024 MiB"),
    ],
)  # fmt: skip
def test_a_damaged_index_is_named_and_may_be_skipped(tmp_path, change, message):
    index = write_mds(tmp_path / "mds", DOCUMENTS, shards=1) / "index.json"
    assert read(tmp_path) == [5, 6, 7, 8, 9, 10]
    index.write_text(change(index.read_text()))
    with pytest.raises(ValueError, match=rf"mds/(index\.json|shard\.00000\.mds): .*{message}.*rite"):
        read(tmp_path)
    left_out = LeftOut(skip_damaged=True)
    assert read(tmp_path, left_out) == []
    assert left_out.counts == {"damaged": 1}


def test_an_index_of_another_version_may_say_more(tmp_path):
    index = write_mds(tmp_path / "mds", DOCUMENTS, shards=1) / "index.json"
    index.write_text(in_shard(size_limit=1 << 26, hashes=["sha1"], version=3)(index.read_text()))
    assert read(tmp_path) == [5, 6, 7, 8, 9, 10]


def test_a_packed_shard_takes_no_more_memory_than_its_index_says(tmp_path):
    folder = write_mds(tmp_path / "mds", DOCUMENTS, shards=1)
    shard = folder / "shard.00000.mds"
    data = shard.read_bytes()
    packed = {True: zstandard.compress(data), False: zstandard.compress(data + bytes(1 << 26))}
    for whole, content in packed.items():
        (folder / "shard.00000.mds.zstd").write_bytes(content)
        zip_data = {"basename": "shard.00000.mds.zstd", "bytes": len(content), "hashes": {}}
        index = folder / "index.json"
        index.write_text(in_shard(zip_data=zip_data, compression="zstd:3")(index.read_text()))
        shard.unlink(missing_ok=True)
        if whole:
            assert read(tmp_path) == [5, 6, 7, 8, 9, 10]
        else:
            with pytest.raises(ValueError, match=rf"mds\.zstd: does not unpack to the {len(data)} bytes that index"):
                read(tmp_path)
