"""Tests that rules of sentencepiece's normalizer give the same text in tokenizers, for all characters and scripts."""

import functools
import os
import random
import subprocess
import sys
import unicodedata
from collections.abc import Iterable

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import normalizers

from data_prep.tokenizer.charsmap import CODE_POINTS
from data_prep.tokenizer.from_sentencepiece import differing_lines, to_fast_tokenizer
from data_prep.tokenizer.normalizer import NEWER_MARKS, normalize_by_rules, sequences
from data_prep.train_tokenizer import apply_bert_conventions
from tests.helpers.foreign.sentencepiece_models import SETTINGS, STRANGE, train

RULES = ["nmt_nfkc", "nmt_nfkc_cf", "nfkc", "nfkc_cf"]
# Without most Chinese characters, Hangul syllables, reserved and private ones, which all behave alike.
BLOCKS = [(1, 0x3500), (0xA000, 0xAD00), (0xD7A0, 0xD800), (0xF8F0, 0x13500), (0x16000, 0x16F00), (0x1C000, 0x1FC00)]
BLOCKS += [(0xE0000, 0xE0200), (0x10FF00, 0x110000)]
CHARACTERS = [chr(c) for first, end in BLOCKS for c in range(first, end) if c not in (0x0A, 0x0D)]
MARKS = [c for c in CHARACTERS if unicodedata.category(c)[0] == "M"]
SENTENCES = [
    "Ti\u1ebfng Vi\u1ec7t c\u00f3 d\u1ea5u thanh v\u00e0 nguy\u00ean \u00e2m",
    "\ud55c\uad6d\uc5b4 \ubb38\uc7a5\uc740 \uc774\ub807\uac8c \uc0dd\uacbc\uc2b5\ub2c8\ub2e4 \u314b\u314f",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0921\u093c\u0958 \u092f\u0939 \u090f\u0915",
    "\u0935\u093e\u0915\u094d\u092f",
    "\u09ac\u09be\u0982\u09b2\u09be \u09ad\u09be\u09b7\u09be \u09a1\u09bc\u09cb",
    "\u0627\u0644\u0644\u0651\u064f\u063a\u064e\u0629\u064f",
    "\u0627\u0644\u0639\u064e\u0631\u064e\u0628\u0650\u064a\u0651\u064e\u0629\u064f \u0622\u0623",
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22\u0e21\u0e35\u0e27\u0e23\u0e23\u0e13\u0e22\u0e38\u0e01\u0e15\u0e4c",
    "\u0e19\u0e49\u0e33",
    "\u05e9\u05c1\u05b8\u05dc\u05d5\u05b9\u05dd \u05e2\u05d5\u05b9\u05dc\u05b8\u05dd",
    "\u05d1\u05bc\u05b0\u05e8\u05b5\u05d0\u05e9\u05c1\u05b4\u05d9\u05ea",
    "\u1fb3 \u1ff7 \u03c4\u1ff7 \u03bb\u03cc\u03b3\u1ff3 \u1f10\u03bd \u1f00\u03c1\u03c7\u1fc7 \u1f26\u03bd",
    "\u30ab\u30bf\u30ab\u30ca \u30ac\u30ae\u30b0\u30b2\u30b4 \uff8a\uff9f\uff8b\uff9e \uff21\u0301",
    "\u00cele caf\u00e9 na\u00efve \u00c9COLE \u00c5ngstr\u00f6m \u0130stanbul \u1e69 q\u0307\u0323",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067\U000e0062\U000e007f \U0001f44d\U0001f3fd",
    "1\ufe0f\u20e3 A\ufe0f \u2764\ufe0f",
]  # fmt: skip


def charsmap_of(rules: str) -> bytes:
    model = train(["some text"] * 9, vocab_size=12, normalization_rule_name=rules)
    return sentencepiece_model_pb2.ModelProto.FromString(model).normalizer_spec.precompiled_charsmap


@functools.cache
def both(rules: str) -> tuple[normalizers.Normalizer, sentencepiece.SentencePieceNormalizer]:
    ours = normalizers.Sequence(normalize_by_rules(charsmap_of(rules), [], None))
    theirs = sentencepiece.SentencePieceNormalizer(
        rule_name=rules, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    )
    return ours, theirs


def assert_same(rules: str, texts: list[str]) -> None:
    ours, theirs = both(rules)
    found, expected = ours.normalize_str("\r".join(texts)), theirs.normalize("\r".join(texts))
    if found != expected:
        assert [ascii(text) for text in texts if ours.normalize_str(text) != theirs.normalize(text)] == []


@pytest.mark.parametrize("rules", RULES)
def test_every_character_alone_and_beside_letters_and_marks(rules):
    assert_same(rules, CHARACTERS)
    assigned = [c for c in CHARACTERS if unicodedata.category(c) not in ("Cn", "Co")]
    assert_same(rules, [f"A{c}" for c in assigned])
    assert_same(rules, [f"{c}\u0301" for c in assigned])
    assert_same(rules, [f"a{c}\u0323\u0301" for c in assigned])


@settings(max_examples=300)
@given(
    st.sampled_from(RULES),
    st.lists(
        st.sampled_from(MARKS)
        | st.characters(exclude_categories=["Cs"], exclude_characters="\ufff0\ufff1")
        | st.sampled_from("aEo\u3131\u314f\u1100\u1161\u11a8\uff8a\uff9f\u0915")
    ),
)
def test_any_text(rules, characters):
    assert_same(rules, ["".join(characters)])


def after_a_letter(ranges: Iterable[tuple[int, int]]) -> list[str]:
    return [f"E{chr(c)}" for first, last in ranges for c in range(first, last + 1)]


@pytest.mark.parametrize("rules", ["nmt_nfkc_cf", "nfkc_cf"])
def test_marks_that_python_does_not_know_are_kept(rules):
    assert_same(rules, after_a_letter(NEWER_MARKS))


@pytest.mark.nightly
def test_characters_that_python_does_not_know_are_kept():
    unknown = [f"E{chr(c)}" for c in range(0x370, 0x20000) if unicodedata.category(chr(c)) == "Cn"]
    assert_same("nmt_nfkc_cf", unknown)


def spellings(sentence: str) -> list[str]:
    forms = [unicodedata.normalize(form, sentence) for form in ("NFC", "NFD", "NFKC", "NFKD")]
    return [*forms, *(form.upper() for form in forms), unicodedata.normalize("NFD", sentence.upper())]


@pytest.fixture(scope="module")
def texts_of_all_scripts() -> list[str]:
    texts = [text for sentence in SENTENCES for text in spellings(sentence)]
    letters = sorted(set("".join(texts)))
    rng = random.Random(0)
    return texts + ["".join(rng.choices([*letters, *MARKS[:112]], k=20)) for _ in range(500)]


@pytest.fixture(scope="module")
def own_rules(tmp_path_factory) -> dict[str, str]:
    """Rules of a user: a ligature of three characters, of two, a deletion, and two that begin alike."""
    path = tmp_path_factory.mktemp("rules") / "rules.tsv"
    path.write_text("41 302 300\t1EA6\n73 73\tDF\n200D\t\n61 62\t78\n61 62 63\t79\n")
    return {"normalization_rule_tsv": str(path), "normalization_rule_name": "user_defined"}


@pytest.mark.parametrize("model", ["unigram", "bpe"])
@pytest.mark.parametrize("name", [*RULES, "identity", "byte fallback", "spaces kept", "symbols", "own rules"])
def test_texts_of_all_scripts_have_the_ids_of_sentencepiece(texts_of_all_scripts, own_rules, model, name):
    cases = SETTINGS | {"own rules": own_rules, "symbols": {"user_defined_symbols": ["ZZ", "<Sym>", "E\u0301"]}}
    lines = [line for sentence in SENTENCES for line in [sentence, *sentence.split() * 2]] * 20
    found = train(lines, model_type=model, vocab_size=900, character_coverage=1.0, **cases[name])
    tokenizer = to_fast_tokenizer(found)
    apply_bert_conventions(tokenizer)
    tokenizer.encode_special_tokens = True
    more = ["ZZ zz <Sym> <sym> E\u0301 E\u0301\u0323", "abc ab abcab", "Messe A\u0302\u0300 A\u0302 a\u200db"]
    strange = [text for text in STRANGE if "<0x" not in text or name != "byte fallback"]
    assert differing_lines(tokenizer, found, texts_of_all_scripts + strange + more) == []


def test_sequences_match_exactly_the_given_texts():
    assert sorted(sequences(["ab", "cb", "ad", "cd", "ef"])) == [
        r"[\x{61}-\x{61}\x{63}-\x{63}][\x{62}-\x{62}\x{64}-\x{64}]",
        r"[\x{65}-\x{65}][\x{66}-\x{66}]",
    ]


@pytest.mark.parametrize("rules", ["nfkc_cf", pytest.param("nmt_nfkc", marks=pytest.mark.nightly)])
def test_every_process_writes_the_same_normalizer(rules):
    """Sets of strings have another order in every process, unless PYTHONHASHSEED is given."""
    script = (
        "import sys; from tokenizers import normalizers; "
        "from data_prep.tokenizer.normalizer import normalize_by_rules; "
        "steps = normalize_by_rules(sys.stdin.buffer.read(), ['a\u0301', 'b'], None); "
        "print(normalizers.Sequence(steps))"
    )
    written = {
        subprocess.run(
            [sys.executable, "-c", script],
            input=charsmap_of(rules),
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(written) == 1
    assert b"Replace" in written.pop()


def test_code_points_that_are_left_out_are_no_marks_and_have_no_decomposition():
    left_out = map(chr, {*range(sys.maxunicode + 1)}.difference(CODE_POINTS))
    assert not any(unicodedata.decomposition(c) or unicodedata.category(c)[0] == "M" for c in left_out)
