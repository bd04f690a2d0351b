"""Texts of every script, and trainer settings, that tokenizers and their conversions must agree on."""

import io
from itertools import pairwise

import sentencepiece

STRANGE = [
    "", " ", "   ", "a  b", " lead", "trail ", "\ttab\nline\r\nx", "\r\n\r\n", "   multiple   spaces   ",
    "\u4f60\u597d \U0001f600", "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "caf\u00e9 na\u00efve", "\u00c9COLE", "x" * 3000, "ab" * 2000, "\u2581", "\u2581a", "a\u2581b", "a\u2581",
    " \u2581 a \u2581 ", "\u2581\u2581a  \u2581", "[MASK]", "a [MASK] b[CLS][SEP]", "<s> </s> <unk> <pad> [UNK]",
    "<0x41> <0xE4>", "a\0b", "\0", " \x01 a", "a \x01 b", "a\x7f\x80\x85b", "\u00a0a\u00a0", "\u3000a\u3000",
    "\u200ba\u200bb", "\ufb01 \u00bd \u2460 \uff21\uff22\uff23 \uff11\uff12 \uff5e",
    "\u0130stanbul \u1e9e \u00df \u03c2", "\ufeffbom", "\ufffd", "\U0010ffff", "\ufdd0", "\u0646\u0635",
    "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0e44\u0e17\u0e22", "e\u0301 a\u030a",
    "https://a.b/c?d=e&f=g", "I'm you're 1,000.50 -- ...", "<sym> a<sym>b zz  <sym>", "1234 5678",
]  # fmt: skip

# Arguments of SentencePieceTrainer.train, besides the type of the model.
SETTINGS = {
    "nmt_nfkc_cf": {},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "nfkc": {"normalization_rule_name": "nfkc"},
    "nfkc_cf": {"normalization_rule_name": "nfkc_cf"},
    "identity": {"normalization_rule_name": "identity"},
    "byte fallback": {"byte_fallback": True},
    "no dummy prefix": {"add_dummy_prefix": False},
    "spaces kept": {"remove_extra_whitespaces": False},
    "spaces kept, no prefix, bytes": {
        "remove_extra_whitespaces": False, "add_dummy_prefix": False, "byte_fallback": True,
    },
    "pieces of spaces": {"remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
    "split digits": {"split_digits": True},
    "pieces across spaces": {"split_by_whitespace": False},
    "spaces behind": {"treat_whitespace_as_suffix": True},
    "any script": {"split_by_unicode_script": False, "split_by_number": False},
    "user's symbols": {"user_defined_symbols": ["<sym>", "zz"]},
    "other names": {
        "unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3, "pad_piece": "<blank>",
        "control_symbols": ["<ctl>", "<mask>"],
    },
}  # fmt: skip


def train(lines: list[str], **options: object) -> bytes:
    """Train a small sentencepiece model. Returns the bytes of its file."""
    model = io.BytesIO()
    options = {
        "vocab_size": 700,
        "hard_vocab_limit": False,
        "minloglevel": 2,
        "normalization_rule_name": "nmt_nfkc_cf",
    } | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **options)
    return model.getvalue()


def lines_of_every_script() -> list[str]:
    """Lines of letters of many scripts, composed and not, with spaces, digits, marks and joiners."""
    # Alphabets; ideographs and Hangul; presentation forms; what lies above the basic plane, with emoji.
    ranges = range(0x20, 0x3100, 0x60), range(0x3100, 0xD700, 0x600), range(0xF900, 0xFF60, 0x60)
    firsts = [first for each in (*ranges, range(0x10000, 0x1FB00, 0x600)) for first in each]
    blocks = [chr(first + 7 * i % 96) for first in firsts for i in range(5)]
    words = ["".join(blocks[i : i + 4]) for i in range(0, len(blocks), 3)]
    pairs = enumerate(pairwise(words))
    lines = [f" {first}{second}  {number}\t{first} 中文 e\u0301\u200d\n" for number, (first, second) in pairs]
    return [line.encode("utf-8", "ignore").decode() for line in lines]
