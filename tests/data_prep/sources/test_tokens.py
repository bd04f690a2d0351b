"""Tests that tokens of other projects become shards with the same ids and documents, and that damage is refused."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data_prep import train_tokenizer, write_shards
from data_prep.sources import LeftOut, ReadOptions, list_input_splits
from data_prep.sources.tokens import read_token_split
from data_prep.sources.tokens.check import check_tokenizer
from data_prep.sources.tokens.ids import IdRule, make_rule
from megabert.data.shards.source import open_source
from megabert.data.shards.tokenizer import encode, find_tokenizer, read_tokenizer
from tests.data_prep.helpers.foreign_tokens import (
    write_datatrove,
    write_mds,
    write_megatron,
    write_with_the_packages,
)

PLAIN = IdRule(100, (0, 3), None)
DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12], [13, 99]]


def read(source: Path, rule: IdRule = PLAIN, key: str = "text", left_out: LeftOut | None = None) -> list[list[int]]:
    options = ReadOptions(text_key=key, skip_damaged=bool(left_out and left_out.skip_damaged))
    left_out = left_out or LeftOut()
    return [
        piece.tolist()
        for split in list_input_splits(str(source), options, left_out)
        for batch in read_token_split(split, options, rule, left_out)
        for piece in np.split(batch.ids, batch.lengths.cumsum()[:-1])
    ]


def documents_of(folder: Path) -> list[tuple[int, ...]]:
    source = open_source(str(folder))
    chunks = (source.read_chunk(n, c) for n, shard in enumerate(source.shards) for c in range(len(shard.chunks)))
    return sorted(
        tuple(piece.tolist()) for tokens, lengths in chunks for piece in np.split(tokens, lengths.cumsum()[:-1])
    )


@pytest.fixture(scope="module")
def tokenized(corpus) -> list[list[int]]:
    return encode(read_tokenizer(corpus.tokenizer / "tokenizer.json"), corpus.texts[:300])


def write_all(folder: Path, documents: list[list[int]]) -> dict[str, Path]:
    sources = {name: folder / name for name in ("megatron", "datatrove", "mds")}
    for name in ("megatron", "datatrove"):
        sources[name].mkdir()
    write_megatron(sources["megatron"] / "a", documents)
    write_datatrove(sources["datatrove"] / "a.ds", documents)
    write_mds(sources["mds"], documents)
    return sources


def check_shards_of(sources: dict[str, Path], documents: list[list[int]], corpus, out: Path) -> None:
    for name, source in sources.items():
        command = [f"--source={source}", f"--out={out / name}", f"--tokenizer={corpus.tokenizer}", "--min_shards=2"]
        write_shards.main([*command, *(["--text-key=tokens"] if name.startswith("mds") else [])])
        assert documents_of(out / name) == sorted(set(map(tuple, documents))), name


def test_documents_and_ids_stay_the_same(tmp_path, tokenized, corpus, capsys):
    """One source goes through the whole command, the others to the documents that it reads."""
    sources = write_all(tmp_path, tokenized)
    rule = make_rule(find_tokenizer(corpus.tokenizer)[1], None)
    for name, source in sources.items():
        found = read(source, rule, "tokens" if name == "mds" else "text")
        assert sorted(found) == sorted(tokenized), name
    check_shards_of({"datatrove": sources["datatrove"]}, tokenized, corpus, tmp_path / "out")
    assert "of 100 documents are those that" in capsys.readouterr().out


@pytest.mark.nightly
def test_every_format_goes_through_the_whole_command(tmp_path, tokenized, corpus):
    check_shards_of(write_all(tmp_path, tokenized), tokenized, corpus, tmp_path / "out")


@pytest.mark.foreign_tokens
def test_files_of_the_real_packages_give_the_same_documents(tmp_path, tokenized, corpus):
    check_shards_of(write_with_the_packages(tmp_path, tokenized), tokenized, corpus, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
@pytest.mark.parametrize("sentences", [1, 3])
def test_megatron_documents_of_any_type_and_number_of_sequences(tmp_path, monkeypatch, dtype, sentences):
    monkeypatch.setattr("data_prep.sources.base.INPUT_SPLIT_BYTES", 6)
    write_megatron(tmp_path / "a", DOCUMENTS, dtype, sentences)
    assert read(tmp_path) == read(tmp_path / "a.bin") == DOCUMENTS
    assert len(list_input_splits(str(tmp_path), ReadOptions())) > 1


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_datatrove_documents_of_both_types(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr("data_prep.sources.base.INPUT_SPLIT_BYTES", 6)
    assert read(write_datatrove(tmp_path / "a.ds", DOCUMENTS, dtype)) == DOCUMENTS


def test_an_empty_datatrove_file_is_left_out_unless_its_index_lists_documents(tmp_path):
    write_datatrove(tmp_path / "a.ds", DOCUMENTS)
    (tmp_path / "b.ds").touch()
    (tmp_path / "b.ds.index").touch()
    left_out = LeftOut()
    assert read(tmp_path, left_out=left_out) == DOCUMENTS
    assert left_out.counts == {"empty files": 1}
    (tmp_path / "a.ds").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.ds: has 0 bytes, but its index says 10 tokens of 2 or 4 bytes"):
        read(tmp_path)


@pytest.mark.parametrize("encoding", ["ndarray", "ndarray:uint16", "ndarray:int64", "bytes"])
def test_mds_columns_of_all_types_of_integers(tmp_path, encoding):
    write_mds(tmp_path / "mds", DOCUMENTS, encoding, shards=1)
    assert read(tmp_path, key="tokens") == read(tmp_path / "mds", key="tokens") == DOCUMENTS


def test_special_tokens_at_the_ends_are_left_out_and_counted(tmp_path):
    left_out = LeftOut()
    write_datatrove(tmp_path / "a.ds", [[3, 5, 6, 3], [3], [7, 0, 0]])
    assert read(tmp_path, left_out=left_out) == [[5, 6], [], [7]]
    assert left_out.counts == {"special tokens at the ends of documents": 5}


def test_a_special_token_within_a_document_is_refused_until_documents_end_there(tmp_path):
    write_datatrove(tmp_path / "a.ds", [[8, 9], [5, 6, 3, 7, 3]])
    with pytest.raises(ValueError, match=r"a\.ds: document 1 contains the special token 3 between .*--document-end"):
        read(tmp_path)
    assert read(tmp_path, PLAIN._replace(document_end=3)) == [[8, 9], [5, 6], [7]]
    left_out = LeftOut(skip_damaged=True)
    assert read(tmp_path, left_out=left_out) == [[8, 9]]
    assert left_out.counts["damaged"] == 1


def cut(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("megatron/a.bin", lambda path: cut(path, 2), r"a\.bin: has 18 bytes, but a\.idx says 20\. Copy both"),
        ("megatron/a.idx", lambda path: cut(path, 8), r"a\.idx: has \d+ bytes, expected \d+\. Copy both"),
        ("megatron/a.idx", lambda path: path.write_bytes(b"x" + path.read_bytes()[1:]), r"a\.idx: not an index of Meg"),
        ("megatron/a.bin", Path.unlink, r"a\.bin: no such file, but its index is there\. Copy it there"),
        ("datatrove/a.ds", lambda path: cut(path, 2), r"a\.ds: has 18 bytes, but its index says 10 tokens of 2 or 4"),
        (
            "datatrove/a.ds.index",
            lambda path: cut(path, 3),
            r"a\.ds\.index: has 29 bytes, expected 8 for each document",
        ),
        ("datatrove/a.ds.index", Path.unlink, r"a\.ds\.index: no such file, so it is unknown where the documents"),
        ("mds/shard.00001.mds", lambda path: cut(path, 1), r"00001\.mds: has \d+ bytes, but index\.json says \d+"),
        ("mds/shard.00001.mds", Path.unlink, r"00001\.mds: no such file, but .*index\.json lists it"),
        (
            "mds/shard.00000.mds",
            lambda p: p.write_bytes(b"\xff" * p.stat().st_size),
            "says that it has 4294967295 samp",
        ),
    ],
)
def test_damaged_and_cut_files_are_refused_with_their_names(tmp_path, name, change, message):
    write_all(tmp_path, DOCUMENTS)
    change(tmp_path / name)
    folder = tmp_path / name.partition("/")[0]
    with pytest.raises(ValueError, match=message):
        read(folder, key="tokens")


def test_the_tokenizer_must_be_given_and_have_all_ids(tmp_path, corpus):
    write_datatrove(tmp_path / "a.ds", [[5, 60_000]])
    command = [f"--source={tmp_path}", f"--out={tmp_path / 'out'}"]
    with pytest.raises(ValueError, match=r"a\.ds: holds tokens\. Pass the tokenizer .* as --tokenizer"):
        write_shards.main(command)
    with pytest.raises(ValueError, match=r"document 0 contains the id 60000, but the tokenizer has only .*below 800"):
        write_shards.main([*command, f"--tokenizer={corpus.tokenizer}"])
    write_datatrove(tmp_path / "a.ds", [[50, 60]])
    for flag in ("--min-chars=5", "--encoding=latin-1", "--document-end=[NONE]"):
        with pytest.raises(ValueError, match=flag.split("=")[0]):
            write_shards.main([*command, f"--tokenizer={corpus.tokenizer}", flag])
    with pytest.raises(ValueError, match="holds tokens, expected text"):
        train_tokenizer.main([f"--source={tmp_path}", f"--out={tmp_path / 'tokenizer'}"])
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match=r"holds tokens \(.*a\.ds\) and text \(.*b\.txt\)\. Pass one of them"):
        write_shards.main([*command, f"--tokenizer={corpus.tokenizer}"])
    with pytest.raises(ValueError, match="--document-end has no effect on text"):
        write_shards.main([f"--source={tmp_path / 'b.txt'}", f"--out={tmp_path / 'out'}", "--document-end=[SEP]"])


def shuffled_unigram(raw: dict) -> None:
    vocabulary = raw["model"]["vocab"]
    raw["model"]["vocab"] = vocabulary[:5] + random.Random(0).sample(vocabulary[5:], len(vocabulary) - 5)


def shuffled_wordpiece(raw: dict) -> None:
    names = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    names = names[:5] + random.Random(0).sample(names[5:], len(names) - 5)
    raw["model"]["vocab"] = {name: number for number, name in enumerate(names)}


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_ids_of_another_tokenizer_of_the_same_size_are_refused(tmp_path, corpus, kind, capsys):
    path, shuffle = corpus.tokenizer / "tokenizer.json", shuffled_unigram
    if kind == "wordpiece":
        path, shuffle = tmp_path / "right.json", shuffled_wordpiece
        write_wordpiece(path, corpus.texts[:300])
    write_datatrove(tmp_path / "a.ds", encode(read_tokenizer(path), corpus.texts[:300]))
    splits = list_input_splits(str(tmp_path / "a.ds"), ReadOptions())
    rule = make_rule(find_tokenizer(path)[1], None)
    assert "of 100 documents are those that" in check_tokenizer(splits, ReadOptions(), rule, path, trusted=False)
    raw = json.loads(path.read_text())
    shuffle(raw)
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(raw))
    assert Tokenizer.from_file(str(other)).get_vocab_size() == rule.vocab_size
    message = r"a\.ds: the ids of \d+% of .*pass that one as --tokenizer\..*pass --trust-tokenizer"
    with pytest.raises(ValueError, match=message):
        check_tokenizer(splits, ReadOptions(), rule, other, trusted=False)
    assert "of 100 documents" in check_tokenizer(splits, ReadOptions(), rule, other, trusted=True)


def write_wordpiece(path: Path, texts: list[str]) -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))
