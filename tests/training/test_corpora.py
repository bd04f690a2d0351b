"""The corpora of a run are usable before anything is loaded from them."""

import pytest

from data_prep import write_shards
from megabert.config.data_section import CorpusPart, DataConfig
from megabert.training.corpora import open_corpora


def write_text(folder, *texts: str) -> str:
    source = folder / "source"
    source.mkdir(parents=True)
    for number, text in enumerate(texts):
        (source / f"{number:02d}.txt").write_text(text)
    write_shards.main([f"--source={source}", f"--out={folder / 'text'}", "--workers=1", "--min_shards=2"])
    return str(folder / "text")


def test_text_of_which_the_tokenizer_leaves_nothing_is_refused(tmp_path, corpus):
    nothing = write_text(tmp_path / "nothing", *("\x01" * (number + 1) for number in range(40)))
    tokens, tokenizer = str(corpus.tokens), str(corpus.tokenizer)
    message = r"nothing/text: the tokenizer .*/tokenizer.json leaves no token of any document\. Use a corpus with text"
    with pytest.raises(ValueError, match=message):
        open_corpora(DataConfig(train=nothing, heldout=tokens, tokenizer=tokenizer))
    # A source without tokens would be waited for although the other one has some.
    with pytest.raises(ValueError, match=message):
        open_corpora(
            DataConfig(
                train=[CorpusPart(shards=tokens, weight=1), CorpusPart(shards=nothing, weight=1)],
                heldout=tokens,
                tokenizer=tokenizer,
            )
        )


def test_one_document_with_tokens_is_enough(tmp_path, corpus, monkeypatch):
    # The sample has documents without tokens only.
    monkeypatch.setattr("megabert.data.shards.source.SAMPLED_CHUNKS", 1)
    texts = ["\x01" * (number + 1) for number in range(40)]
    folder = write_text(tmp_path, *texts, "words")
    data = DataConfig(train=folder, heldout=str(corpus.tokens), tokenizer=str(corpus.tokenizer))
    train, _ = open_corpora(data)
    assert sum(len(train.sources[0].read_chunk(n, 0).tokens) for n in range(len(train.sources[0].shards))) > 0
