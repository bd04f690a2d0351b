"""Our tokenizer.json gives the ids of what it was made from."""

import pytest
import sentencepiece
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from data_prep import train_tokenizer
from megabert.data.tokenizer import find_tokenizer


def test_a_tokenizer_without_berts_tokens_is_refused(tmp_path, corpus):
    with pytest.raises(ValueError, match="no such tokenizer"):
        find_tokenizer(str(tmp_path / "none.json"))
    text = (corpus.tokenizer / "tokenizer.json").read_text().replace("[MASK]", "<mask>")
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"has no token \[MASK\]"):
        find_tokenizer(str(tmp_path))


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
