"""From text to shards: exact, resumable, the same bytes on every run."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import zstandard
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_prep import train_tokenizer, write_shards
from data_prep.sources import ReadOptions, docstrings, list_units, read_unit
from megabert.data.manifest import read_manifest
from megabert.data.sample_format import decode_text, read_sample
from megabert.data.shards import open_source

REPOSITORY = Path(__file__).resolve().parents[2]


def read_all(source: str, **options) -> list[str]:
    return [text for unit in list_units(source) for text in read_unit(unit, ReadOptions(**options))]


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def document_texts(folder: Path) -> list[str]:
    manifest = read_manifest(folder)
    texts = []
    for shards in manifest.splits.values():
        for shard in shards:
            data = (folder / shard.name).read_bytes()
            for chunk in shard.chunks:
                part = data[chunk.offset : chunk.offset + chunk.size]
                texts += decode_text(read_sample(part, shard.name), shard.name)
    return texts


def test_docstrings_in_order_of_the_file(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        '"""Module."""\n\nif True:\n    class A:\n        """Class."""\n        def f(self):\n            """Method."""\n'
        'def g():\n    try:\n        def h():\n            "Inner."\n    except E:\n        pass\n    x = "not one"\n'
    )
    assert list(docstrings(path)) == ["Module.", "Class.", "Method.", "Inner."]
    path.write_text("def broken(:\n")
    assert list(docstrings(path)) == []


def test_every_format_yields_its_documents(tmp_path):
    lines = [json.dumps({"text": f"document {i} \u00e9", "body": f"other {i}"}) for i in range(50)]
    plain = "\n".join([*lines[:25], "", *lines[25:]])
    (tmp_path / "a.jsonl").write_text(plain)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(plain.encode()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(plain.encode()))
    (tmp_path / "d.txt").write_text("first\nparagraph\n\nsecond")
    (tmp_path / "ignored.bin").write_bytes(b"x")
    expected = [f"document {i} \u00e9" for i in range(50)]
    assert read_all(str(tmp_path)) == [*expected * 3, "first\nparagraph\n\nsecond"]
    assert read_all(str(tmp_path / "d.txt"), blank_lines=True) == ["first\nparagraph", "second"]
    assert read_all(str(tmp_path / "a.jsonl"), text_key="body") == [f"other {i}" for i in range(50)]


def test_byte_ranges_of_a_jsonl_cover_every_line_once(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.sources.UNIT_BYTES", 100)
    path = tmp_path / "a.jsonl"
    texts = ["x" * (i * 7 % 150) for i in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert len(list_units(str(path))) > 20
    assert read_all(str(path)) == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text"', r"a\.jsonl at byte 14: not valid JSON"),
        ('{"body": "a"}\n', r"a\.jsonl at byte 0: has no field 'text'.*--text-key"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_all(str(tmp_path))


def test_sources_that_are_not_there_are_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="no such file or folder"):
        list_units(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="holds no text; expected .txt, .jsonl"):
        list_units(str(tmp_path))
    with pytest.raises(ValueError, match="holds tokens shards, expected text to tokenize"):
        list_units(str(corpus.tokens))


def test_text_shards_hold_each_document_once_and_can_be_tokenized(tmp_path, corpus):
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text(corpus.jsonl.read_text() * 2)
    write_shards.main([f"--source={doubled}", f"--out={tmp_path / 'text'}", "--min_chars=100"])
    assert sorted(document_texts(tmp_path / "text")) == sorted(text for text in corpus.texts if len(text) >= 100)
    write_shards.main(
        [f"--source={tmp_path / 'text'}", f"--out={tmp_path / 'tokens'}", f"--tokenizer={corpus.tokenizer}"]
    )
    assert open_source(str(tmp_path / "tokens")).manifest.statistics["documents"] == len(
        document_texts(tmp_path / "text")
    )


def test_token_shards_hold_exactly_the_tokenized_documents(corpus):
    """Every document once, in either part; held out by its text; ids as the tokenizer gives them, without specials."""
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    expected = {tuple(tokenizer.encode(text, add_special_tokens=False).ids): text for text in corpus.texts}
    manifest = read_manifest(corpus.tokens)
    found: dict[str, list[tuple[int, ...]]] = {"train": [], "heldout": []}
    for part, documents in found.items():
        source = open_source(str(corpus.tokens), part)
        for number, shard in enumerate(source.shards):
            for chunk in range(len(shard.chunks)):
                tokens, lengths = source.read_chunk(number, chunk)
                documents += [tuple(piece.tolist()) for piece in np.split(tokens, lengths.cumsum()[:-1])]
    whole = [document for document in found["train"] + found["heldout"] if document in expected]
    # A document of more than chunk_tokens is cut into several; all others are whole.
    assert len(whole) >= len(corpus.texts) - 20
    held = {expected[document] for document in found["heldout"] if document in expected}
    below = write_shards._heldout_below(0.1)
    for text in corpus.texts:
        first = np.frombuffer(write_shards.text_hash(text), dtype=np.uint64)[0]
        if tuple(tokenizer.encode(text, add_special_tokens=False).ids) in set(whole):
            assert (text in held) == (first < below)
    assert 0.03 < len(held) / len(corpus.texts) < 0.2
    assert (
        sum(map(len, found["train"] + found["heldout"]))
        == manifest.statistics["tokens"]
        == sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in corpus.texts)
    )
    counts = np.load(corpus.tokens / "token_counts.npy")
    flat = np.concatenate([np.array(document) for document in found["train"]])
    assert np.array_equal(counts, np.bincount(flat, minlength=len(counts)))
    assert len(manifest.splits["train"]) >= 24


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_bytes_whatever_the_number_of_workers(tmp_path, corpus, workers):
    out = tmp_path / "again"
    common = [f"--source={corpus.jsonl}", f"--tokenizer={corpus.tokenizer}", "--heldout=0.1", "--chunk_tokens=2048"]
    write_shards.main([*common, f"--out={out}", f"--workers={workers}"])
    assert hashes(out) == hashes(corpus.tokens)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, corpus):
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "data_prep/write_shards.py",
        f"--source={corpus.jsonl}",
        f"--tokenizer={corpus.tokenizer}",
    ]
    command += ["--heldout=0.1", "--chunk_tokens=2048", f"--out={out}"]
    # As soon as the first run stands, then in the second pass when the first, and when the tenth shard does.
    for wanted, pattern in ((1, "run-*"), (1, "train-*.npz"), (10, "train-*.npz")):
        process = subprocess.Popen(command, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL)
        while len(list((out / ".work").glob(pattern))) < wanted:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    assert hashes(out) == hashes(corpus.tokens)
    assert not (out / ".work").exists()


def test_what_is_finished_is_reused_and_what_changed_is_not(tmp_path, corpus, capsys):
    source = tmp_path / "corpus.jsonl"
    source.write_text(corpus.jsonl.read_text())
    command = [f"--source={source}", f"--out={tmp_path / 'out'}"]
    write_shards.main(command)
    first = hashes(tmp_path / "out")
    write_shards.main(command)
    assert "already written from this, reused" in capsys.readouterr().out
    source.write_text(json.dumps({"text": "one more document"}) + "\n" + source.read_text())
    write_shards.main(command)
    assert hashes(tmp_path / "out") != first


def test_a_long_text_is_never_cut(tmp_path):
    """A cut at a byte would split characters, and the halves could land on both sides of the held-out split."""
    text = "\u00e9" * 300
    (tmp_path / "a.txt").write_text(text)
    write_shards.main([f"--source={tmp_path / 'a.txt'}", f"--out={tmp_path / 'out'}", "--chunk_tokens=101"])
    assert document_texts(tmp_path / "out") == [text]


def test_a_bare_tokenizer_json_is_enough(tmp_path, corpus):
    (tmp_path / "tokenizer.json").write_text((corpus.tokenizer / "tokenizer.json").read_text())
    command = [f"--source={corpus.jsonl}", f"--out={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'tokenizer.json'}"]
    write_shards.main(command)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token == "[MASK]"


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("  \n ")
    with pytest.raises(ValueError, match="has no document of at least 1 characters; nothing to write"):
        write_shards.main([f"--source={tmp_path}", f"--out={tmp_path / 'out'}"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--heldout=1.5", "heldout is 1.5, expected a share in [0, 1)"),
        ("--chunk_tokens=0", "chunk_tokens is 0, expected 1 to 131072"),
        ("--workers=0", "at least 1"),
        ("--sorce=x", "unknown setting --sorce. Did you mean --source?"),
    ],
)
def test_wrong_flags_are_one_line(capsys, flag, message):
    with pytest.raises(SystemExit) as exit_info:
        write_shards.main([flag])
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_a_tokenizer_without_berts_tokens_is_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="no such tokenizer"):
        write_shards.find_tokenizer(str(tmp_path / "none.json"))
    text = (corpus.tokenizer / "tokenizer.json").read_text().replace("[MASK]", "<mask>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"has no token \[MASK\]"):
        write_shards.find_tokenizer(str(tmp_path))


def test_the_tokenizer_gives_sentencepieces_ids_and_loads_in_transformers(corpus):
    model = sentencepiece.SentencePieceProcessor(model_file=str(corpus.tokenizer / "tokenizer.model"))
    tokenizer = Tokenizer.from_file(str(corpus.tokenizer / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    strange = [
        "",
        " ",
        "a  b",
        "\ttab\nline",
        "\u4f60\u597d \U0001f600",
        "caf\u00e9 na\u00efve",
        "x" * 300,
        " lead and trail ",
    ]
    for text in [*corpus.texts, *strange]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == model.encode(text), repr(text[:80])
    loaded = AutoTokenizer.from_pretrained(corpus.tokenizer)
    ids = loaded("A [MASK] module.", "Second.")["input_ids"]
    assert loaded.mask_token_id in ids
    assert (ids[0], ids[-1]) == (loaded.cls_token_id, loaded.sep_token_id)
    assert loaded.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]


def test_bpe_gives_sentencepieces_ids_too(tmp_path, corpus):
    train_tokenizer.main([f"--source={corpus.jsonl}", f"--out={tmp_path}", "--vocab_size=600", "--model=bpe"])
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    for text in corpus.texts[:300]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == model.encode(text), repr(text[:80])


def test_a_corpus_too_small_for_the_vocabulary_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("only these few words")
    with pytest.raises(ValueError, match="cannot learn 8192 pieces from it.*smaller --vocab-size"):
        train_tokenizer.main([f"--source={tmp_path}", f"--out={tmp_path / 'out'}"])


def test_a_trained_tokenizer_is_reused(corpus, capsys):
    train_tokenizer.main([f"--source={corpus.jsonl}", f"--out={corpus.tokenizer}", "--vocab_size=800"])
    assert "already trained on this, reused" in capsys.readouterr().out
