"""Tests that check_shards.py finds every kind of damage and names shard, chunk and byte."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import check_shards, write_shards
from megabert.data.shards.manifest import read_manifest, write_manifest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(corpus, tmp_path):
    return shutil.copytree(corpus.tokens, tmp_path / "tokens")


def check(folder, capsys) -> tuple[int, list[str]]:
    code = check_shards.main([str(folder), "--workers=1"])
    return code, capsys.readouterr().out.splitlines()[:-1]


def test_undamaged_shards_have_no_problem(corpus, tmp_path, capsys):
    assert check(corpus.tokens, capsys) == (0, [])
    write_shards.main([f"--source={corpus.jsonl}", f"--out={tmp_path / 'text'}"])
    capsys.readouterr()
    assert check(tmp_path / "text", capsys) == (0, [])


def test_damage_is_reported_with_shard_chunk_and_byte(folder, capsys):
    first, second, third, fourth = (folder / f"train-0000{i}.tar" for i in range(4))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-3000])
    manifest = read_manifest(folder)
    begin = int(manifest.splits["train"][2].chunks[1, 0])
    data = bytearray(third.read_bytes())
    # In the tar header.
    data[begin + 100] ^= 0xFF
    third.write_bytes(bytes(data))
    data = bytearray(fourth.read_bytes())
    # In a token.
    data[700] ^= 1
    fourth.write_bytes(bytes(data))
    code, found = check(folder, capsys)
    assert code == 1
    assert f"{first}: missing" in found
    assert f"{second}: its hash differs from the manifest's" in found
    assert any(line.startswith(f"{second} chunk ") and line.endswith("truncated") for line in found)
    assert any(line.startswith(f"{third} chunk 1 (byte {begin}): its checksum is") for line in found)
    assert any(line.startswith(f"{third} chunk 1 (byte {begin}): damaged: no tar header") for line in found)
    assert any(line.startswith(f"{fourth} chunk 0 (byte 0): its checksum is") for line in found)
    assert not any("chunk 0 (byte 0)" in line for line in found if str(third) in line)


def test_wrong_counts_and_ids_in_the_manifest_are_reported(folder, capsys):
    """Each document that a chunk has less, another has more, so that the totals stay."""
    manifest = read_manifest(folder)
    first, *rest = manifest.splits["train"]
    chunks = first.chunks.copy()
    chunks[0, 2] += 1
    chunks[1, 2] -= 1
    tokenizer = replace(manifest.tokenizer, vocab_size=100)  # type: ignore[type-var]
    splits = manifest.splits | {"train": (replace(first, chunks=chunks), *rest)}
    write_manifest(folder, replace(manifest, splits=splits, tokenizer=tokenizer))
    code, found = check(folder, capsys)
    output = "\n".join(found)
    assert code == 1
    assert f"the manifest says {chunks[0, 2]} of {chunks[0, 3]}" in output
    assert "but the vocabulary has 100" in output
    assert "its vocabulary and special tokens are not those of tokenizer.json" in output


def test_totals_that_the_shards_do_not_have_are_reported(folder, capsys):
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, statistics=manifest.statistics | {"documents": 5}))
    assert check_shards.main([str(folder)]) == 1
    assert "statistics of 5 documents, its shards have" in capsys.readouterr().out


def test_missing_and_unexpected_files_are_reported(folder, capsys):
    (folder / "train-00099.tar").write_bytes(b"")
    (folder / "notes").write_text("")
    (folder / ".work").mkdir()
    (folder / "statistics.png").unlink()
    assert check(folder, capsys) == (
        1,
        [
            f"{folder / '.work'}: left by an interrupted write_shards.py. Run its command again, or remove the folder",
            f"{folder / 'notes'}: a file that the manifest does not list",
            f"{folder / 'train-00099.tar'}: a shard that the manifest does not list",
            f"{folder / 'statistics.png'}: missing",
        ],
    )


def test_a_wrong_tokenizer_and_wrong_counts_are_reported(folder, capsys):
    counts = np.load(folder / "token_counts.npy")
    counts[7] += 1
    np.save(folder / "token_counts.npy", counts)
    expected = f"counts id 7 {counts[7]} times, the training shards hold it {counts[7] - 1} times"
    changed = f"{folder / 'token_counts.npy'}: its hash differs from the manifest's"
    assert check(folder, capsys) == (1, [changed])
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, files={}))
    assert check(folder, capsys) == (1, [f"{folder / 'token_counts.npy'}: {expected}"])
    config = (folder / "tokenizer_config.json").read_bytes()
    (folder / "tokenizer_config.json").write_bytes(b"")
    assert "tokenizer_config.json: not valid JSON" in check(folder, capsys)[1][0]
    (folder / "tokenizer_config.json").write_bytes(config)
    np.save(folder / "token_counts.npy", counts[:-1])
    assert f"has shape ({len(counts) - 1},), expected ({len(counts)},)" in check(folder, capsys)[1][0]
    (folder / "token_counts.npy").write_bytes(b"noise")
    assert "token_counts.npy: not a plain .npy array" in check(folder, capsys)[1][0]
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert "tokenizer.json: its fingerprint is" in check(folder, capsys)[1][0]
    path.write_text("{")
    assert "tokenizer.json: not valid JSON" in check(folder, capsys)[1][0]


def test_a_damaged_manifest_exits_with_1_and_a_missing_one_with_2(folder, capsys):
    raw = json.loads((folder / "manifest.json").read_text())
    raw["splits"]["train"][0]["name"] = "../../etc/passwd.tar"
    (folder / "manifest.json").write_text(json.dumps(raw))
    assert check_shards.main([str(folder)]) == 1
    assert "is not a shard's name" in capsys.readouterr().out
    (folder / "manifest.json").unlink()
    assert check_shards.main([str(folder)]) == 2
    assert "manifest.json: no such file; expected a folder of shards" in capsys.readouterr().err
    for argv in ([], [str(folder), "--workers=0"]):
        with pytest.raises(SystemExit) as exit_info:
            check_shards.main(argv)
        assert exit_info.value.code == 2


def test_the_exit_code_tells_a_script_the_result(folder):
    command = [sys.executable, "data_prep/check_shards.py", str(folder)]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False).returncode == 0
    path = folder / "train-00003.tar"
    data = bytearray(path.read_bytes())
    # After the last chunk.
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == f"{path}: its hash differs from the manifest's"
