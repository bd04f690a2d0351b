"""The fast tokenizer gives sentencepiece's own ids, whatever the model's settings and whatever the text."""

import io
import random
import unicodedata
from importlib.util import find_spec
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources.docstrings import docstrings
from data_prep.tokenizer.from_sentencepiece import differing_lines, to_fast_tokenizer, user_defined_symbols
from data_prep.train_tokenizer import finish
from megabert.data.shards.tokenizer import encode

STRANGE = [
    "", " ", "   ", "a  b", " lead", "trail ", "\ttab\nline\r\nx", "\r\n\r\n", "   multiple   spaces   ",
    "\u4f60\u597d \U0001f600", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "caf\u00e9 na\u00efve", "\u00c9COLE", "x" * 3000, "ab" * 2000, "\u2581", "\u2581a", "a\u2581b", "a\u2581",
    " \u2581 a \u2581 ", "\u2581\u2581a  \u2581", "[MASK]", "a [MASK] b[CLS][SEP]", "<s> </s> <unk> <pad> [UNK]",
    "<0x41> <0xE4>", "a\0b", "\0", " \x01 a", "a \x01 b", "a\x7f\x80\x85b", "\u00a0a\u00a0", "\u3000a\u3000", "\u200ba\u200bb",
    "\ufb01 \u00bd \u2460 \uff21\uff22\uff23 \uff11\uff12 \uff5e", "\u0130stanbul \u1e9e \u00df \u03c2", "\ufeffbom", "\ufffd",
    "\U0010ffff", "\ufdd0", "\u0646\u0635", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0e44\u0e17\u0e22", "e\u0301 a\u030a",
    "https://a.b/c?d=e&f=g", "I'm you're 1,000.50 -- ...", "<sym> a<sym>b zz  <sym>", "1234 5678",
]  # fmt: skip

# What is told to the trainer, beside the model's type.
SETTINGS = {
    "nmt_nfkc_cf": {},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "nfkc_cf": {"normalization_rule_name": "nfkc_cf"},
    "identity": {"normalization_rule_name": "identity"},
    "byte fallback": {"byte_fallback": True},
    "no dummy prefix": {"add_dummy_prefix": False},
    "spaces kept": {"remove_extra_whitespaces": False},
    "spaces kept, no prefix, bytes": {"remove_extra_whitespaces": False, "add_dummy_prefix": False, "byte_fallback": True},
    "pieces of spaces": {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "split digits": {"split_digits": True},
    "pieces across spaces": {"split_by_whitespace": False},
    "spaces behind": {"treat_whitespace_as_suffix": True},
    "any script": {"split_by_unicode_script": False, "split_by_number": False},
    "user's symbols": {"user_defined_symbols": ["<sym>", "zz"]},
    "other names": {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3, "pad_piece": "<blank>", "control_symbols": ["<ctl>", "<mask>"]},
}  # fmt: skip


def is_tie(tokenizer, model: bytes, line: str) -> bool:
    """Whether a unigram model gives both ways to cut up a line one score, as a + b + b and b + b + a have.

    sentencepiece adds up in 32 bits and tokenizers in 64, so that another of the two may win by the last bit.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if to_fast_tokenizer(model).model.__class__.__name__ == "BPE":
        return False  # merges have an order and no score
    scores = [sum(map(processor.get_score, ids)) for ids in (encode(tokenizer, [line])[0], processor.encode(line))]
    return abs(scores[0] - scores[1]) < 1e-5 * abs(scores[0])


def assert_same(tokenizer, model: bytes, lines: list[str]) -> None:
    different = differing_lines(tokenizer, model, lines)
    assert [line for line in different if not is_tie(tokenizer, model, line)] == []
    assert len(different) <= len(lines) // 500


def learn(lines, **options) -> bytes:
    model = io.BytesIO()
    options = {
        "vocab_size": 700,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "normalization_rule_name": "nmt_nfkc_cf",
    } | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    return model.getvalue()


@pytest.fixture(scope="session")
def lines(texts) -> list[str]:
    """More than 10,000 real lines, and some in other scripts."""
    more = Path(str(find_spec("sklearn").submodule_search_locations[0]), "linear_model")
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
def test_the_same_ids_whatever_the_settings(lines, model, name):
    found = learn(lines[-3000:], model_type=model, **SETTINGS[name])
    tokenizer = to_fast_tokenizer(found)
    finish(tokenizer)
    tokenizer.encode_special_tokens = True
    assert_same(tokenizer, found, [*STRANGE, *lines[-2000:]])


@pytest.fixture(scope="session", params=["unigram", "bpe"])
def pair(request, lines):
    """A fast tokenizer and the model that it was made of."""
    model = learn(lines, model_type=request.param, vocab_size=2000)
    tokenizer = to_fast_tokenizer(model)
    finish(tokenizer)
    tokenizer.encode_special_tokens = True
    return tokenizer, model


def test_the_same_ids_on_ten_thousand_real_lines(lines, pair):
    assert_same(*pair, lines)


@settings(max_examples=300)
@given(text=st.text(max_size=60))
def test_the_same_ids_on_any_composed_text(pair, text):
    """Composed, and marks that no letter has taken up apart: README.md says why."""
    composed = unicodedata.normalize("NFKC", text)
    apart = "".join(c for c in composed if not unicodedata.combining(c) and unicodedata.category(c)[0] != "M")
    assert [line for line in differing_lines(*pair, [apart]) if not is_tie(*pair, line)] == []


def test_what_differs_is_what_the_readme_says(lines):
    """Each of these is a limit of the tokenizers library. If one is gone, so may be its sentence in README.md."""
    folded = learn(lines[:3000], byte_fallback=True)
    cased = learn(lines[:3000], byte_fallback=True, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=False)
    for model, decomposed in (
        (folded, ["E\u0301cole", "Vie\u0323\u0302t", "\uff76\uff9e", "\u1100\u1161"]),
        (cased, ["Vie\u0323\u0302t", "\uff76\uff9e", "\u1100\u1161"]),
    ):
        assert differing_lines(to_fast_tokenizer(model), model, decomposed) == decomposed
        composed = [unicodedata.normalize("NFKC", text) for text in decomposed]
        assert differing_lines(to_fast_tokenizer(model), model, composed) == []
    assert differing_lines(to_fast_tokenizer(cased), cased, ["\x01"]) == ["\x01"]
    assert differing_lines(to_fast_tokenizer(folded), folded, ["\x01"]) == []
    upper = learn(lines[:3000], user_defined_symbols=["ZZ"])
    assert differing_lines(to_fast_tokenizer(upper), upper, user_defined_symbols(upper)) == ["ZZ"]


def test_what_is_no_such_model_is_refused(lines):
    with pytest.raises(ValueError, match="here: not a sentencepiece model"):
        to_fast_tokenizer(b"noise", "here")
    with pytest.raises(ValueError, match="here: a word model, expected unigram or bpe"):
        to_fast_tokenizer(learn(lines[:500], model_type="word"), "here")


def test_pieces_that_do_what_berts_do_get_their_names(lines):
    tokenizer = to_fast_tokenizer(learn(lines[:2000], **SETTINGS["other names"]))
    finish(tokenizer)
    names = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    assert [tokenizer.token_to_id(name) for name in names] == [0, 1, 2, 3, 5]
    assert tokenizer.token_to_id("<ctl>") == 4
    assert tokenizer.encode("a <ctl> b").ids[0] == 1
    bare = to_fast_tokenizer(learn(lines[:2000], pad_id=-1))
    size = bare.get_vocab_size()
    finish(bare)
    assert [bare.token_to_id(name) for name in ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")] == [
        0,
        1,
        2,
        size,
        size + 1,
    ]
