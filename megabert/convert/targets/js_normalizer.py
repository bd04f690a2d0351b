"""Rewrite a tokenizer.json for JavaScript, which ignores sentencepiece's map and lowers a Greek letter in another way.

transformers.js reads `Precompiled` as a fixed clean-up and NFKC: it never lowers a letter. The map is therefore written
as steps that both libraries have: NFKC, `Lowercase`, and a replacement of each character that these two change in
another way than the map does. Without a map, only sigma at the end of a word, which JavaScript lowers to another letter
than elsewhere, is lowered by a replacement of its own.
"""

import json
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, normalizers

from megabert.convert.targets.target import DiffersError

SPACE = "\u2581"
# The first code point of a private-use plane. No character has a meaning there, and no step changes one.
PRIVATE = 0xF0000
INERT = "\u4e00"
SIGMA, LOWER_SIGMA = "\u03a3", "\u03c3"
# This many characters are compared at once.
LINE = 64
UNUSED_CATEGORIES = ("Cn", "Co", "Cs")


def to_js_tokenizer(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json with its map in explicit steps; unchanged if it has none and keeps case."""
    normalizer = raw.get("normalizer") or {}
    steps = normalizer.get("normalizers") or [normalizer]
    kinds = [step.get("type") for step in steps]
    if "Precompiled" not in kinds:
        lowers = "Lowercase" in kinds or any(step.get("lowercase") for step in steps)
        new = [_replace({"String": SIGMA}, LOWER_SIGMA), *steps]
        return raw | {"normalizer": {"type": "Sequence", "normalizers": new}} if lowers else raw
    place = kinds.index("Precompiled")
    # What stands before the map only prepares for pairs of characters, and NFC composes them; NFKC has done so.
    new = [*_explicit_steps(raw), *(step for step in steps[place + 1 :] if step.get("type") != "NFC")]
    return raw | {"normalizer": {"type": "Sequence", "normalizers": new}}


def _explicit_steps(raw: dict[str, Any]) -> list[dict[str, Any]]:
    folded = _fold_characters(raw)
    lowers = folded.get("A") == "a"
    before: dict[str, list[str]] = {}
    after: dict[str, str] = {}
    for character, wanted in folded.items():
        # A mark that the map gives is not composed with the letter before it.
        mark = wanted not in ("", character) and bool(unicodedata.combining(wanted[0]))
        if _is_kept(character, wanted, lowers) and not mark:
            continue
        target = wanted
        if mark or not _is_kept(wanted, wanted, lowers):
            target = after.setdefault(wanted, chr(PRIVATE + len(after)))
        before.setdefault(target, []).append(character)
    steps = [_replace({"Regex": f"[{''.join(characters)}]"}, target) for target, characters in before.items()]
    steps.append({"type": "NFKC"})
    steps += [{"type": "Lowercase"}] if lowers else []
    return steps + [_replace({"String": placeholder}, wanted) for wanted, placeholder in after.items()]


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _is_kept(text: str, wanted: str, lowers: bool) -> bool:
    """Return whether NFKC and lowering give what is wanted, in the Unicode of Python, JavaScript and Rust."""
    python, rust = unicodedata.normalize("NFKC", text), normalizers.NFKC().normalize_str(text)
    if lowers and SIGMA in python:
        return False
    return wanted == _lower(python, lowers) == _lower(rust, lowers)


def _lower(text: str, lowers: bool) -> str:
    return "".join(character.lower() for character in text) if lowers else text


def _fold_characters(raw: dict[str, Any]) -> dict[str, str]:
    """Normalize every character by the tokenizer itself, between two that no mark is composed with."""
    normalize = Tokenizer.from_str(json.dumps(raw)).normalizer.normalize_str
    folded = {}
    for character in _characters():
        text = normalize(f"{INERT}{character}{INERT}").removeprefix(SPACE)
        folded[character] = text[1:-1].replace(SPACE, " ")
    return folded


def _characters() -> list[str]:
    everything = map(chr, range(1, sys.maxunicode + 1))
    return [character for character in everything if unicodedata.category(character) not in UNUSED_CATEGORIES]


def check_same_ids(raw: dict[str, Any], new: dict[str, Any], lines: Iterable[tuple[str, list[int]]]) -> None:
    """Raise DiffersError unless both give the same ids, for the lines and for every character."""
    if new is raw:
        return
    other, tokenizer = (Tokenizer.from_str(json.dumps(content)) for content in (new, raw))
    for one in (other, tokenizer):
        one.no_truncation()
        one.no_padding()
    texts, wanted = map(list, zip(*lines, strict=True))
    characters = _characters()
    every = ["x".join(characters[start : start + LINE]) for start in range(0, len(characters), LINE)]
    wanted += [encoding.ids for encoding in tokenizer.encode_batch(every)]
    for text, encoding, ids in zip([*texts, *every], other.encode_batch([*texts, *every]), wanted, strict=True):
        if encoding.ids != ids:
            raise DiffersError(f"the normalizer cannot be written in steps that JavaScript has: {text[:60]!r} differs")
