"""Tests that the fast tokenizer gives the ids of sentencepiece for all settings of the model and all texts."""

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources.docstrings import docstrings
from data_prep.tokenizer.from_sentencepiece import differing_lines, to_fast_tokenizer
from data_prep.train_tokenizer import apply_bert_conventions
from megabert.data.shards.tokenizer import encode
from tests.helpers.foreign.sentencepiece_models import SETTINGS, STRANGE, train


def is_tie(tokenizer, model: bytes, line: str) -> bool:
    """Whether both segmentations of a line have the same score in a unigram model, such as a + b + b and b + b + a.

    sentencepiece adds scores in 32 bits and tokenizers in 64, so rounding can make either of them win.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if to_fast_tokenizer(model).model.__class__.__name__ == "BPE":
        # Merges have an order but no score.
        return False
    scores = [sum(map(processor.get_score, ids)) for ids in (encode(tokenizer, [line])[0], processor.encode(line))]
    return abs(scores[0] - scores[1]) < 1e-5 * abs(scores[0])


def assert_same(tokenizer, model: bytes, lines: list[str]) -> None:
    different = differing_lines(tokenizer, model, lines)
    assert [line for line in different if not is_tie(tokenizer, model, line)] == []
    assert len(different) <= len(lines) // 500


@pytest.fixture(scope="session")
def lines(texts) -> list[str]:
    """More than 10,000 real lines, and some in other scripts."""
    spec = find_spec("sklearn")
    assert spec is not None
    assert spec.origin is not None
    more = Path(spec.origin).with_name("linear_model")
    more_texts = [text for path in sorted(more.glob("*.py")) for text in docstrings(path)]
    found = [line for text in [*more_texts, *texts] for line in text.splitlines() if line.strip()]
    rng = random.Random(0)
    chinese = [
        "".join(rng.choices("\u7684\u4e00\u662f\u4e0d\u4e86\u5728\u4eba\u6709", k=9)) + " \uac00\ub098 \u30ab\u30bf"
        for _ in range(50)
    ]
    assert len(found) > 10_000
    return found + chinese


@pytest.mark.parametrize("model", ["unigram", "bpe"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_ids_are_the_same_for_all_settings(lines, model, name):
    found = train(lines[-3000:], model_type=model, **SETTINGS[name])
    tokenizer = to_fast_tokenizer(found)
    apply_bert_conventions(tokenizer)
    tokenizer.encode_special_tokens = True
    assert_same(tokenizer, found, [*STRANGE, *lines[-2000:]])


@pytest.fixture(scope="session", params=["unigram", "bpe"])
def pair(request, lines):
    """A fast tokenizer and the sentencepiece model that it was converted from."""
    model = train(lines, model_type=request.param, vocab_size=2000)
    tokenizer = to_fast_tokenizer(model)
    apply_bert_conventions(tokenizer)
    tokenizer.encode_special_tokens = True
    return tokenizer, model


def test_the_ids_are_the_same_on_ten_thousand_real_lines(lines, pair):
    tokenizer, model = pair
    assert_same(tokenizer, model, lines)


@settings(max_examples=300)
@given(text=st.text(max_size=60))
def test_the_ids_are_the_same_on_any_text(pair, text):
    tokenizer, model = pair
    differing = differing_lines(tokenizer, model, [text])
    assert [line for line in differing if not is_tie(tokenizer, model, line)] == []


def test_the_differences_are_those_that_the_readme_lists(lines):
    """These are limits of the tokenizers library. If one disappears, remove its entry from data_prep/README.md."""
    kept = train(lines[:3000], normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=False)
    assert differing_lines(to_fast_tokenizer(kept), kept, ["\x01"]) == ["\x01"]
    folded = train(lines[:3000], byte_fallback=True)
    assert differing_lines(to_fast_tokenizer(folded), folded, ["\x01"]) == []
    cased = train(["lower case"] * 99, byte_fallback=True, normalization_rule_name="nfkc", vocab_size=290)
    assert differing_lines(to_fast_tokenizer(cased), cased, ["<0x41>", "<0x4>"]) == ["<0x41>"]


@pytest.mark.parametrize("lowercase", [False, True])
def test_a_name_of_a_special_piece_in_unknown_characters_stays_text(lowercase):
    rules = "nfkc_cf" if lowercase else "nfkc"
    model = train(["only these words"] * 99, vocab_size=30, normalization_rule_name=rules, pad_id=3)
    tokenizer = to_fast_tokenizer(model)
    apply_bert_conventions(tokenizer)
    tokenizer.encode_special_tokens = True
    assert differing_lines(tokenizer, model, ["[CLS] only [PAD]s [MASK]", "<s> <unk>", "[UNK][UNK]"]) == []


def test_other_files_and_other_types_of_models_are_refused(lines):
    with pytest.raises(ValueError, match="here: not a sentencepiece model"):
        to_fast_tokenizer(b"noise", "here")
    with pytest.raises(ValueError, match="here: a word model, expected unigram or bpe"):
        to_fast_tokenizer(train(lines[:500], model_type="word"), "here")


def test_pieces_with_the_roles_of_berts_special_tokens_get_their_names(lines):
    tokenizer = to_fast_tokenizer(train(lines[:2000], **SETTINGS["other names"]))
    apply_bert_conventions(tokenizer)
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2, 3, 5]
    assert tokenizer.token_to_id("<ctl>") == 4
    assert tokenizer.encode("a <ctl> b").ids[0] == 1
    bare = to_fast_tokenizer(train(lines[:2000], pad_id=-1))
    size = bare.get_vocab_size()
    apply_bert_conventions(bare)
    assert [bare.token_to_id(name) for name in ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")] == [
        0,
        1,
        2,
        size,
        size + 1,
    ]
