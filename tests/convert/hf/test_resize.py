"""The vocabulary of another tokenizer: what both have is kept, whatever marks words in either."""

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from megabert.convert.hf.resize import BIAS, Imported, resize_vocabulary
from megabert.convert.weight_names import WORDS
from tests.convert.small import small_model

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDPIECE = [*SPECIALS, "the", "model", "##s", "learn", "##ing", "s"]


def wordpiece(pieces: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def unigram(pieces: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(pieces)], unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def imported(rows: int) -> Imported:
    model = small_model(vocab_size=rows)
    return Imported(model.config, {name: p.detach() for name, p in model.named_parameters()}, [], [])


def test_shared_pieces_keep_their_rows_and_others_are_made_of_them():
    model = imported(len(WORDPIECE))
    pieces = [*SPECIALS, "\u2581model", "s", "ing", "\u2581Models", "\u2581s", "\u2581\u00df", "\u2581the"]
    changed = resize_vocabulary(model, wordpiece(WORDPIECE), unigram(pieces), multiple=8, seed=0)
    old, new = model.weights[WORDS], changed.weights[WORDS]
    assert new.shape == (16, 24)
    assert changed.config.vocab_size == 16
    sources = {
        "[PAD]": ["[PAD]"], "[MASK]": ["[MASK]"], "\u2581model": ["model"], "s": ["##s"], "ing": ["##ing"],
        "\u2581Models": ["model", "##s"], "\u2581s": ["s"], "\u2581the": ["the"],
    }  # fmt: skip
    for piece, parts in sources.items():
        rows = [WORDPIECE.index(part) for part in parts]
        torch.testing.assert_close(new[pieces.index(piece)], old[rows].mean(dim=0))
        bias = changed.weights[BIAS][pieces.index(piece)]
        torch.testing.assert_close(bias, model.weights[BIAS][rows].mean())
    assert changed.vocabulary == "10 pieces kept, 1 the mean of old pieces, 1 new"
    assert changed.weights[BIAS][12:].max() <= model.weights[BIAS].min(), "filler is never predicted"
    for name, tensor in model.weights.items():
        if name not in (WORDS, BIAS):
            assert changed.weights[name] is tensor


def test_the_same_tokenizer_changes_nothing():
    model = imported(len(WORDPIECE))
    changed = resize_vocabulary(model, wordpiece(WORDPIECE), wordpiece(WORDPIECE), multiple=1, seed=0)
    assert all(torch.equal(changed.weights[name], tensor) for name, tensor in model.weights.items())


def test_special_tokens_go_by_their_role_and_bytes_by_what_they_spell():
    names = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    pieces = [
        *names,
        "\u0120model",
        "\u0120the",
        "s",
        "\u0120caf\u00c3\u00a9",
    ]  # GPT-2's spelling of cafe with an accent
    new = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
    old = [*WORDPIECE, "caf\u00e9"]
    model = imported(len(old))
    changed = resize_vocabulary(model, wordpiece(old), new, multiple=1, seed=0)
    expected = model.weights[WORDS][[*range(5), old.index("model"), old.index("the"), old.index("##s"), len(old) - 1]]
    assert torch.equal(changed.weights[WORDS], expected)
    assert changed.config.pad_token_id == 0


def test_tokenizers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the tokenizer has the id 10, the model only 7 rows"):
        resize_vocabulary(imported(7), wordpiece(WORDPIECE), wordpiece(WORDPIECE), multiple=1, seed=0)
    with pytest.raises(ValueError, match="share no piece"):
        resize_vocabulary(imported(11), wordpiece(WORDPIECE), wordpiece(["q", "##q"]), multiple=1, seed=0)
    with pytest.raises(ValueError, match="a multiple of 0"):
        resize_vocabulary(imported(11), wordpiece(WORDPIECE), wordpiece(WORDPIECE), multiple=0, seed=0)
