"""Tests of train_tokenizer.py: training, comparison with sentencepiece, and reuse of finished tokenizers."""

import json
import re

import pytest
import sentencepiece
from tokenizers import Tokenizer

from data_prep import train_tokenizer
from data_prep.train_tokenizer import TOKENIZER_FORMAT
from megabert.data.shards.tokenizer import find_tokenizer
from tests.convert.helpers.auto_tokenizer import load_auto_tokenizer


def test_a_tokenizer_without_the_special_tokens_of_bert_is_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="no such tokenizer"):
        find_tokenizer(str(tmp_path / "none.json"))
    text = (corpus.tokenizer / "tokenizer.json").read_text().replace("[MASK]", "<mask>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"has no token \[MASK\]"):
        find_tokenizer(str(tmp_path))


def test_the_ids_are_those_of_sentencepiece_and_transformers_loads_the_tokenizer(corpus):
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
    loaded = load_auto_tokenizer(corpus.tokenizer)
    ids = loaded("A [MASK] module.", "Second.")["input_ids"]
    assert loaded.mask_token_id in ids
    assert (ids[0], ids[-1]) == (loaded.cls_token_id, loaded.sep_token_id)
    assert loaded.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("model", ["unigram", "bpe", "wordpiece"])
@pytest.mark.parametrize("vocab_size", [12, 8192])
def test_the_advice_about_the_size_of_the_vocabulary_works(tmp_path, model, vocab_size):
    (tmp_path / "a.txt").write_text("only these few words " * 30)
    command = [f"--source={tmp_path / 'a.txt'}", f"--out={tmp_path / 'out'}", f"--model={model}"]
    if model == "wordpiece" and vocab_size == 8192:
        # It gets fewer.
        train_tokenizer.main([*command, f"--vocab-size={vocab_size}"])
        return
    with pytest.raises(ValueError, match=r"a\.txt: .*[Pp]ass --vocab-size \d+ or (more|less)\.$") as info:
        train_tokenizer.main([*command, f"--vocab-size={vocab_size}"])
    advice = re.findall(r"--vocab-size \d+", str(info.value))[0].split()
    train_tokenizer.main([*command, *advice])
    assert find_tokenizer(tmp_path / "out")[1].vocab_size == int(advice[1])


def test_long_lines_are_trained_on(tmp_path):
    """sentencepiece leaves out lines of more than 4,192 bytes, and a document may be one line."""
    (tmp_path / "a.txt").write_text(" ".join(f"\u4f60\u597d{n % 7}" for n in range(5000)) + " " + "\u597d" * 5000)
    train_tokenizer.main([f"--source={tmp_path / 'a.txt'}", f"--out={tmp_path / 'out'}", "--vocab-size=18"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert len(tokenizer.encode("\u4f60\u597d3", add_special_tokens=False).ids) < 4
    lines = ["a" * 2500, "short", "b " * 700]
    assert "".join(train_tokenizer.short_lines(lines)) == "".join(lines)
    assert [len(line) for line in train_tokenizer.short_lines(lines)] == [1000, 1000, 500, 5, 1000, 400]


@pytest.mark.parametrize("version", [None, TOKENIZER_FORMAT - 1])
def test_a_tokenizer_of_another_format_version_is_made_again(tmp_path, corpus, capsys, version):
    command = [f"--existing={corpus.tokenizer}", f"--out={tmp_path}"]
    train_tokenizer.main(command)
    expected = (tmp_path / "tokenizer.json").read_bytes()
    current = json.loads((tmp_path / "request").read_text())
    assert current["format"] == TOKENIZER_FORMAT
    older = current["request"] if version is None else json.dumps(current | {"format": version})
    (tmp_path / "request").write_text(older)
    (tmp_path / "tokenizer.json").write_text("of an older version")
    capsys.readouterr()
    train_tokenizer.main(command)
    assert "reused" not in capsys.readouterr().out
    assert (tmp_path / "tokenizer.json").read_bytes() == expected


def test_two_commands_cannot_write_to_one_folder(tmp_path, corpus, monkeypatch):
    """Each would record its own request for the files of the other, and reuse them later."""
    command = [f"--existing={corpus.tokenizer}", f"--out={tmp_path}"]
    refused = []

    def write(*written: object) -> None:
        with pytest.raises(ValueError, match=r"another train_tokenizer\.py is writing there, process \d+ on") as error:
            train_tokenizer.main([*command, "--seed=1"])
        refused.append(error)
        write_tokenizer(*written)

    write_tokenizer = train_tokenizer.write_tokenizer
    monkeypatch.setattr(train_tokenizer, "write_tokenizer", write)
    train_tokenizer.main(command)
    assert refused
    monkeypatch.undo()
    train_tokenizer.main([*command, "--seed=1"])


def test_a_trained_tokenizer_is_reused(corpus, capsys):
    train_tokenizer.main([f"--source={corpus.jsonl}", f"--out={corpus.tokenizer}", "--vocab_size=800"])
    assert "already made from this with these settings, reused" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["unigram", "bpe", "wordpiece"])
def test_a_corpus_without_text_is_refused(tmp_path, model):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="has no text to train on. Use more text."):
        train_tokenizer.main([f"--source={tmp_path}", f"--out={tmp_path / 'out'}", f"--model={model}"])


def test_a_sample_comes_from_many_places_and_has_the_requested_size(tmp_path):
    """A compressed file is one large input split, so the sample must not read all of it."""
    for i in range(20):
        (tmp_path / f"{i:02d}.jsonl").write_text("".join(f'{{"text": "file {i} line {n:06d}"}}\n' for n in range(2000)))
    options = train_tokenizer.Options(source=str(tmp_path), sample_bytes=100_000)
    lines = list(train_tokenizer.sample_lines(options))
    assert 100_000 <= sum(map(len, lines)) < 110_000
    assert len({line.split()[1] for line in lines}) == 16
    assert lines == list(train_tokenizer.sample_lines(options))
    few = train_tokenizer.Options(source=str(tmp_path / "00.jsonl"), sample_bytes=30_000)
    assert sum(map(len, train_tokenizer.sample_lines(few))) >= 30_000


@pytest.mark.parametrize("bad", ["a\0b", "half \ud800", "\x1b$B"])
def test_a_sample_has_texts_only(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("good", bad)))
    with pytest.raises(ValueError, match=f"{path}: a document has .* Or pass --on-bad-document skip"):
        list(train_tokenizer.sample_lines(train_tokenizer.Options(source=str(path))))
    skipping = train_tokenizer.Options(source=str(path), on_bad_document="skip")
    assert list(train_tokenizer.sample_lines(skipping)) == ["good"]


def test_a_vocabulary_of_special_tokens_alone_is_refused(capsys):
    with pytest.raises(SystemExit):
        train_tokenizer.main(["--vocab_size=5"])
    assert "vocab_size is 5, expected a number in [6, 2^24]" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "tokenizer.model", "request"])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_lost_or_damaged_file_is_written_again(tmp_path, corpus, capsys, name, damage):
    command = [f"--existing={corpus.tokenizer / 'tokenizer.model'}", f"--source={corpus.jsonl}", f"--out={tmp_path}"]
    train_tokenizer.main(command)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    damage(tmp_path / name)
    capsys.readouterr()
    train_tokenizer.main(command)
    assert "reused" not in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    train_tokenizer.main(command)
    assert "reused" in capsys.readouterr().out


@pytest.mark.parametrize("sign", ["manifest.json", ".work"])
def test_the_tokenizer_of_shards_is_not_replaced(tmp_path, corpus, monkeypatch, sign):
    words = ["--existing", str(corpus.tokenizer), "--out", str(tmp_path / "out")]

    def make_sign(*given):
        (tmp_path / "out" / sign).mkdir()
        return load(*given)

    # The shards are there before the command, or another command begins to write them meanwhile.
    load = train_tokenizer.load_tokenizer
    monkeypatch.setattr(train_tokenizer, "load_tokenizer", make_sign)
    for _ in range(2):
        with pytest.raises(ValueError, match="out: holds shards, whose tokenizer would be replaced. Choose another"):
            train_tokenizer.main(words)
        assert not (tmp_path / "out" / "tokenizer.json").exists()
