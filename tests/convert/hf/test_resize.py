"""Resizing to the vocabulary of another tokenizer keeps the tokens that both have, however each of them marks words."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from megabert.convert.check.export_check import build_model
from megabert.convert.hf.resize import (
    DECODER_BIAS,
    POSITION_EMBEDDINGS,
    ImportedModel,
    resize_positions,
    resize_vocabulary,
)
from megabert.convert.weight_names import TIED_DECODER, WORD_EMBEDDINGS
from tests.convert.helpers.small_model import small_model
from tests.convert.helpers.wordpiece import SPECIALS, WORDPIECE, wordpiece


def unigram(tokens: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram([(token, -float(i)) for i, token in enumerate(tokens)], unk_id=1))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def imported(rows: int) -> ImportedModel:
    model = small_model(vocab_size=rows)
    return ImportedModel(model.config, {name: p.detach() for name, p in model.named_parameters()}, [], [])


def test_shared_tokens_keep_their_rows_and_others_are_composed_of_them():
    model = imported(len(WORDPIECE))
    tokens = [*SPECIALS, "\u2581model", "s", "ing", "\u2581Models", "\u2581s", "\u2581\u00df", "\u2581the"]
    changed = resize_vocabulary(model, wordpiece(WORDPIECE), unigram(tokens), multiple=8, seed=0)
    old, new = model.weights[WORD_EMBEDDINGS], changed.weights[WORD_EMBEDDINGS]
    assert new.shape == (16, 24)
    assert changed.config.vocab_size == 16
    sources = {
        "[PAD]": ["[PAD]"], "[MASK]": ["[MASK]"], "\u2581model": ["model"], "s": ["##s"], "ing": ["##ing"],
        "\u2581Models": ["model", "##s"], "\u2581s": ["s"], "\u2581the": ["the"],
    }  # fmt: skip
    for token, parts in sources.items():
        rows = [WORDPIECE.index(part) for part in parts]
        torch.testing.assert_close(new[tokens.index(token)], old[rows].mean(dim=0))
        bias = changed.weights[DECODER_BIAS][tokens.index(token)]
        torch.testing.assert_close(bias, model.weights[DECODER_BIAS][rows].mean())
    assert changed.vocabulary == "10 tokens kept, 1 the mean of old tokens, 1 initialized"
    assert changed.weights[DECODER_BIAS][12:].max() <= model.weights[DECODER_BIAS].min(), (
        "rows added by rounding are never predicted"
    )
    for name, tensor in model.weights.items():
        if name not in (WORD_EMBEDDINGS, DECODER_BIAS):
            assert changed.weights[name] is tensor


def test_the_same_tokenizer_changes_nothing():
    model = imported(len(WORDPIECE))
    changed = resize_vocabulary(model, wordpiece(WORDPIECE), wordpiece(WORDPIECE), multiple=1, seed=0)
    assert all(torch.equal(changed.weights[name], tensor) for name, tensor in model.weights.items())


def test_special_tokens_are_matched_by_role_and_bytes_by_their_text():
    names = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
    # The last is how GPT-2 writes cafe with an accent.
    tokens = [*names, "\u0120model", "\u0120the", "s", "\u0120caf\u00c3\u00a9"]
    new = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    old = [*WORDPIECE, "caf\u00e9"]
    model = imported(len(old))
    changed = resize_vocabulary(model, wordpiece(old), new, multiple=1, seed=0)
    expected = model.weights[WORD_EMBEDDINGS][
        [*range(5), old.index("model"), old.index("the"), old.index("##s"), len(old) - 1]
    ]
    assert torch.equal(changed.weights[WORD_EMBEDDINGS], expected)
    assert changed.config.pad_token_id == 0


def test_tokenizers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="the tokenizer has the id 10, but the model has only 7 rows"):
        resize_vocabulary(imported(7), wordpiece(WORDPIECE), wordpiece(WORDPIECE), multiple=1, seed=0)
    with pytest.raises(ValueError, match="have no token in common"):
        resize_vocabulary(imported(11), wordpiece(WORDPIECE), wordpiece(["q", "##q"]), multiple=1, seed=0)
    with pytest.raises(ValueError, match="a multiple of 0"):
        resize_vocabulary(imported(11), wordpiece(WORDPIECE), wordpiece(WORDPIECE), multiple=0, seed=0)


@pytest.mark.parametrize("length", [25, 96])
def test_rows_of_positions_before_the_first_tokens_stay(length):
    small = small_model(position="learned", ffn="gelu", position_offset=2, pad_token_id=1).eval()
    weights = {name: p.detach() for name, p in small.named_parameters() if name != TIED_DECODER}
    changed = resize_positions(ImportedModel(small.config, weights, [], []), length)
    table, old = (each[POSITION_EMBEDDINGS] for each in (changed.weights, weights))
    assert len(table) == length + 2
    shared = min(length, 40) + 2
    assert torch.equal(table[:shared], old[:shared])
    if length > 40:
        assert torch.equal(table[42:82], old[2:])
    ids = torch.randint(5, 800, (2, 25))
    with torch.no_grad():
        assert torch.equal(build_model(changed.weights, changed.config)(ids).logits, small(ids).logits)
