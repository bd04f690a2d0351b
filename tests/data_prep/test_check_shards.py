"""What check_shards.py finds: every kind of damage, named by shard, chunk and byte."""

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


def test_whole_shards_have_no_problem(corpus, tmp_path, capsys):
    assert check(corpus.tokens, capsys) == (0, [])
    write_shards.main([f"--source={corpus.jsonl}", f"--out={tmp_path / 'text'}"])
    capsys.readouterr()
    assert check(tmp_path / "text", capsys) == (0, [])


def test_damage_is_named_with_shard_chunk_and_byte(folder, capsys):
    first, second, third, fourth = (folder / f"train-0000{i}.tar" for i in range(4))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-3000])
    manifest = read_manifest(folder)
    begin = int(manifest.splits["train"][2].chunks[1, 0])
    data = bytearray(third.read_bytes())
    data[begin + 100] ^= 0xFF  # in the tar header
    third.write_bytes(bytes(data))
    data = bytearray(fourth.read_bytes())
    data[700] ^= 1  # in a token
    fourth.write_bytes(bytes(data))
    code, found = check(folder, capsys)
    assert code == 1
    assert f"{first}: missing" in found
    assert f"{second}: its hash is not the manifest's" in found
    assert any(line.startswith(f"{second} chunk ") and line.endswith("cut short") for line in found)
    assert any(line.startswith(f"{third} chunk 1 (byte {begin}): its checksum is") for line in found)
    assert any(line.startswith(f"{third} chunk 1 (byte {begin}): damaged: no tar header") for line in found)
    assert any(line.startswith(f"{fourth} chunk 0 (byte 0): its checksum is") for line in found)
    assert not any("chunk 0 (byte 0)" in line for line in found if str(third) in line)


def test_counts_and_ids_that_the_shards_do_not_have_are_named(folder, capsys):
    manifest = read_manifest(folder)
    first, second, third, *rest = manifest.splits["train"]
    chunks = first.chunks.copy()
    chunks[0, 2] += 1
    train = (
        replace(first, chunks=chunks),
        replace(second, tokens=second.tokens + 5),
        replace(third, documents=10**6),
        *rest,
    )
    tokenizer = replace(manifest.tokenizer, vocab_size=100)
    write_manifest(folder, replace(manifest, splits=manifest.splits | {"train": train}, tokenizer=tokenizer))
    code, found = check(folder, capsys)
    output = "\n".join(found)
    assert code == 1
    assert f"the manifest says {chunks[0, 2]} of {chunks[0, 3]}" in output
    assert "but the vocabulary has 100" in output
    assert f"tokens, the manifest says {second.tokens + 5}" in output
    assert "documents, the manifest says 1000000" in output
    assert "its statistics say" in output
    assert "its vocabulary and special tokens are not those of tokenizer.json" in output


def test_files_that_are_missing_or_stray_are_named(folder, capsys):
    (folder / "train-00099.tar").write_bytes(b"")
    (folder / "notes").write_text("")
    (folder / ".work").mkdir()
    (folder / "statistics.png").unlink()
    assert check(folder, capsys) == (
        1,
        [
            f"{folder / '.work'}: an interrupted write_shards.py left this. Run it again, or remove it",
            f"{folder / 'notes'}: a file that the manifest does not list",
            f"{folder / 'train-00099.tar'}: a shard that the manifest does not list",
            f"{folder / 'statistics.png'}: missing",
        ],
    )


def test_another_tokenizer_and_other_counts_are_named(folder, capsys):
    counts = np.load(folder / "token_counts.npy")
    counts[7] += 1
    np.save(folder / "token_counts.npy", counts)
    assert check(folder, capsys) == (
        1,
        [f"{folder / 'token_counts.npy'}: not the counts of id 7 that the training shards have"],
    )
    np.save(folder / "token_counts.npy", counts[:-1])
    assert "not the counts that" in check(folder, capsys)[1][0]
    (folder / "token_counts.npy").write_bytes(b"noise")
    assert "token_counts.npy: not a plain .npy array" in check(folder, capsys)[1][0]
    path = folder / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert "tokenizer.json: its fingerprint is" in check(folder, capsys)[1][0]
    path.write_text("{")
    assert "tokenizer.json: not valid JSON" in check(folder, capsys)[1][0]


def test_a_damaged_manifest_is_a_problem_and_a_missing_one_a_mistake(folder, capsys):
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


def test_a_script_can_ask(folder):
    command = [sys.executable, "data_prep/check_shards.py", str(folder)]
    assert subprocess.run(command, cwd=REPOSITORY, capture_output=True, check=False).returncode == 0
    path = folder / "train-00003.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # behind the last chunk
    path.write_bytes(bytes(data))
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout.splitlines()[0] == f"{path}: its hash is not the manifest's"
