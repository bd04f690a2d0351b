import json
import shutil

import pytest

from data_prep import check_shards, write_shards


@pytest.fixture
def folder(corpus, tmp_path):
    return shutil.copytree(corpus.tokens, tmp_path / "tokens")


def test_whole_shards_have_no_problem(folder, corpus, tmp_path, capsys):
    assert check_shards.main([str(folder)]) == 0
    assert "0 problems" in capsys.readouterr().out
    write_shards.main([f"--source={corpus.jsonl}", f"--out={tmp_path / 'text'}"])
    assert check_shards.main([str(tmp_path / "text")]) == 0


def test_damage_is_named_with_shard_and_byte(folder, capsys):
    first, second, third = (folder / f"train-0000{i}.tar" for i in range(3))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-100])
    data = bytearray(third.read_bytes())
    data[100] ^= 0xFF  # in the tar header
    third.write_bytes(bytes(data))
    assert check_shards.main([str(folder)]) == 1
    output = capsys.readouterr().out
    assert "train-00000.tar: missing" in output
    assert "train-00001.tar: its hash is not the manifest's" in output
    assert "train-00002.tar chunk 0 (byte 0)" in output


def test_wrong_counts_and_ids_are_named(folder, capsys):
    raw = json.loads((folder / "manifest.json").read_text())
    raw["splits"]["train"][0]["chunks"][0][2] += 1
    raw["tokenizer"]["vocab_size"] = 10
    raw["splits"]["train"][1]["tokens"] += 5
    (folder / "manifest.json").write_text(json.dumps(raw))
    assert check_shards.main([str(folder)]) == 1
    output = capsys.readouterr().out
    assert "documents of" in output
    assert "but the vocabulary has 10" in output
    assert "its chunks have" in output
