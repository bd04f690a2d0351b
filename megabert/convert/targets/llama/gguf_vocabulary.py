"""Describe a tokenizer.json in GGUF's terms: WordPiece as llama.cpp's bert, unigram as its t5, BPE as its gpt2."""

import base64
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer

from megabert.data.shards.tokenizer import special_tokens

# llama.cpp's types of tokens.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5
# The score of a token that must not occur in the encoding of a text.
NEVER = -1e12
SPACE = "\u2581"
# ByteLevel in tokenizer.json, as it may be written.
GPT2_SPLITS = [
    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True, "trim_offsets": trim} for trim in (True, False)
]
# The names of sentencepiece's own rules.
RULES = ("nmt_nfkc_cf", "nmt_nfkc", "nfkc_cf", "nfkc", "identity")


class Vocabulary(NamedTuple):
    """tokens, types, scores: one for each row of the model. charsmap: sentencepiece's rules, empty for none.

    settings: further keys below tokenizer.ggml. specials: id of each role, such as cls. splits: llama.cpp's name for
    the way in which words are told apart. merges: those of BPE, "a b" each.
    """

    model: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    charsmap: bytes
    settings: dict[str, bool]
    specials: dict[str, int]
    splits: str = "default"
    merges: list[str] = []  # noqa: RUF012 # never changed


def check_vocabulary(raw: dict[str, Any]) -> list[str]:
    """Return what a user should know. Raises ValueError if llama.cpp cannot tokenize with this tokenizer.json."""
    kind = raw["model"]["type"]
    if kind == "BPE":
        return _check_bpe(raw)
    if kind not in ("WordPiece", "Unigram"):
        raise ValueError(f"--for gguf: the tokenizer is {kind}, which llama.cpp does not know. Leave gguf out.")
    if raw["model"].get("byte_fallback"):
        raise ValueError(
            "--for gguf: the tokenizer falls back to bytes, which llama.cpp does not do for unigram vocabularies. "
            "Leave gguf out."
        )
    normalizer = raw.get("normalizer") or {}
    if kind == "WordPiece":
        named = normalizer.get("type") == "BertNormalizer" and (raw.get("pre_tokenizer") or {}).get("type")
        if named != "BertPreTokenizer" or not (normalizer["clean_text"] and normalizer["handle_chinese_chars"]):
            raise ValueError(
                "--for gguf: the WordPiece tokenizer does not split words as BERT's does, and llama.cpp knows no other "
                "way. Leave gguf out."
            )
    return []


def _check_bpe(raw: dict[str, Any]) -> list[str]:
    """As check_vocabulary(), for BPE: llama.cpp splits words by a list of known expressions, and normalizes nothing."""
    model = raw["model"]
    if raw.get("pre_tokenizer") not in GPT2_SPLITS or model.get("byte_fallback") or model.get("ignore_merges"):
        raise ValueError(
            "--for gguf: the BPE tokenizer does not split words into bytes as GPT-2's and ModernBERT's do, and no "
            "other way is written. Leave gguf out."
        )
    steps = _steps(raw)
    if steps - {"NFC"}:
        raise ValueError(
            f"--for gguf: the BPE tokenizer normalizes texts by {', '.join(sorted(steps))}, and llama.cpp changes "
            "none before BPE, not even case. Leave gguf out, or train on a tokenizer with --lowercase false."
        )
    if not steps:
        return []
    return ["llama.cpp does not compose accents (NFC) before BPE: ids are equal for texts that are composed already"]


def composes(raw: dict[str, Any]) -> bool:
    """Return whether texts must be composed (NFC) before llama.cpp gives the tokenizer's ids."""
    return raw["model"]["type"] == "BPE" and _steps(raw) == {"NFC"}


def _steps(raw: dict[str, Any]) -> set[str]:
    normalizer = raw.get("normalizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    return {step["type"] for step in steps}


def describe_vocabulary(raw: dict[str, Any], rows: int, lines: list[str]) -> Vocabulary:
    """Describe the tokenizer. rows: of the model's table; lines: with which the rules of sentencepiece are told apart.

    Only the comparison of ids with llama.cpp's own shows that the description is right.
    """
    tokenizer = Tokenizer.from_str(json.dumps(raw | {"truncation": None, "padding": None}))
    added = {token["id"]: token for token in raw["added_tokens"]}
    names = dict(enumerate([""] * rows)) | {i: t for t, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    specials = {role: tokenizer.token_to_id(token) for role, token in special_tokens(tokenizer).items()}
    types = [_type_of(i, names[i], added, specials["unk"]) for i in range(rows)]
    known = {role: number for role, number in specials.items() if number is not None}
    tokens = [names[i] or f"[unused{i}]" for i in range(rows)]
    if raw["model"]["type"] == "WordPiece":
        words = [_as_phrase(token) if kind == NORMAL else token for token, kind in zip(tokens, types, strict=True)]
        lowercase = bool(raw["normalizer"]["lowercase"])
        accents = raw["normalizer"]["strip_accents"]
        settings = {
            "normalizer.lowercase": lowercase,
            "normalizer.strip_accents": lowercase if accents is None else bool(accents),
        }
        return Vocabulary("bert", words, types, [0.0] * rows, b"", settings, known)
    if raw["model"]["type"] == "BPE":
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in raw["model"]["merges"]]
        settings = {"add_bos_token": True, "add_eos_token": True, "add_sep_token": False, "add_space_prefix": False}
        return Vocabulary("gpt2", tokens, types, [], b"", settings, known, "modern-bert", merges)
    scores = [score for _, score in raw["model"]["vocab"]]
    scores = [scores[i] if types[i] == NORMAL and i < len(scores) else NEVER for i in range(rows)]
    settings = {
        "add_space_prefix": tokenizer.encode("a", add_special_tokens=False).tokens[0].startswith(SPACE),
        "remove_extra_whitespaces": "  " not in _normalizer_of(tokenizer)("a  b").replace(SPACE, " "),
        "add_bos_token": True,
        "add_eos_token": True,
    }
    return Vocabulary("t5", tokens, types, scores, _find_charsmap(raw, tokenizer, lines), settings, known)


def _type_of(number: int, name: str, added: dict[int, dict[str, Any]], unknown: int | None) -> int:
    if number == unknown:
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    return NORMAL if name else UNUSED


def _as_phrase(token: str) -> str:
    """Mark the tokens that begin a word, as llama.cpp expects, and not those that continue it."""
    return token.removeprefix("##") if token.startswith("##") else SPACE + token


def _normalizer_of(tokenizer: Tokenizer) -> Callable[[str], str]:
    return (lambda text: text) if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str


def _find_charsmap(raw: dict[str, Any], tokenizer: Tokenizer, lines: list[str]) -> bytes:
    """Find the rules of sentencepiece that normalize the lines as the tokenizer does, or else take the tokenizer's own.

    A tokenizer of ours has steps around its `Precompiled` (data_prep/tokenizer/normalizer.py), which llama.cpp does not
    know, but which give what the whole map of sentencepiece gives.
    """
    theirs = _normalizer_of(tokenizer)
    wanted = [_without_spaces(theirs(line)) for line in lines]
    for rule in RULES:
        normalizer = sentencepiece.SentencePieceNormalizer(rule_name=rule)
        if [_without_spaces(normalizer.normalize(line)) for line in lines] == wanted:
            spec = sentencepiece_model_pb2.NormalizerSpec()
            spec.ParseFromString(normalizer.serialized_normalizer_spec())
            return spec.precompiled_charsmap
    steps = (raw.get("normalizer") or {}).get("normalizers") or [raw.get("normalizer") or {}]
    own = [step["precompiled_charsmap"] for step in steps if step.get("type") == "Precompiled"]
    return base64.b64decode(own[0]) if own else b""


def _without_spaces(text: str) -> str:
    return "".join(text.replace(SPACE, " ").split())
