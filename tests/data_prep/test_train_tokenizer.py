"""Tests of train_tokenizer.py: training, comparison with sentencepiece, and reuse of finished tokenizers."""

import json

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_prep import train_tokenizer
from data_prep.train_tokenizer import TOKENIZER_FORMAT
from megabert.data.shards.tokenizer import find_tokenizer


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
    loaded = AutoTokenizer.from_pretrained(corpus.tokenizer)
    ids = loaded("A [MASK] module.", "Second.")["input_ids"]
    assert loaded.mask_token_id in ids
    assert (ids[0], ids[-1]) == (loaded.cls_token_id, loaded.sep_token_id)
    assert loaded.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]


def test_a_corpus_too_small_for_the_vocabulary_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("only these few words")
    with pytest.raises(ValueError, match="cannot train 8192 pieces on it.*smaller --vocab-size"):
        train_tokenizer.main([f"--source={tmp_path}", f"--out={tmp_path / 'out'}"])


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


def test_a_trained_tokenizer_is_reused(corpus, capsys):
    train_tokenizer.main([f"--source={corpus.jsonl}", f"--out={corpus.tokenizer}", "--vocab_size=800"])
    assert "already made from this with these settings, reused" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["unigram", "bpe", "wordpiece"])
def test_a_corpus_without_text_is_refused(tmp_path, model):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match="cannot train|has no text to train on"):
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


def test_a_vocabulary_of_special_tokens_alone_is_refused(capsys):
    with pytest.raises(SystemExit):
        train_tokenizer.main(["--vocab_size=5"])
    assert "vocab_size is 5, expected more than the 5 special tokens" in capsys.readouterr().err
