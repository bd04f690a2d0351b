"""Build normalizers of the tokenizers library that give the text of sentencepiece's normalizer.

sentencepiece replaces the longest rule that matches at each place. `Precompiled` of the tokenizers library takes a
grapheme of up to five bytes for one character, and applies the shortest rule that matches at its beginning: it makes
an "e" of "E" + U+0301. Here it sees single characters only, and NFC composes what has a rule:

    text                    E     U+0301    q     U+0301
    boundary, separator     E  |  U+0301    q  #  U+0301
    Precompiled             e  |  U+0301    q  #  U+0301
    | removed, NFC          U+00E9          q  #  U+0301
    # removed               U+00E9          q     U+0301
"""

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import Any

from tokenizers import Regex, normalizers

from data_prep.tokenizer.charsmap import (
    CODE_POINTS,
    RuleGroups,
    canonical_decompositions,
    composing_characters,
    group_rules,
)

# Reserved characters that no text contains and that are graphemes of their own. Two of them stand together, so that one
# in a text is kept.
BOUNDARY, SEPARATOR = "\ufff0" * 2, "\ufff1" * 2
# Private characters from here downwards stand, in pairs, for a result while the other steps run.
LAST_PLACEHOLDER = 0x10FFFD
# What joins the character before it to a grapheme, besides marks: joiners, vowels of Thai and Lao, voicing marks of
# half-width kana, Hangul after Hangul, skin tones, tags.
JOINING = (0x200C, 0x200D, 0xE33, 0xEB3, 0xFF9E, 0xFF9F, *range(0x1160, 0x1200), *range(0xAC00, 0xD7A4),
           *range(0xD7B0, 0xD7FC), *range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080))  # fmt: skip
# Marks of Unicode 15 to 17, which tokenizers knows and the unicodedata of Python 3.11 does not: first, last.
NEWER_MARKS = (
    (0x897, 0x897), (0xCF3, 0xCF3), (0xECE, 0xECE), (0x1ACF, 0x1ADD), (0x1AE0, 0x1AEB), (0x10D69, 0x10D6D),
    (0x10EFA, 0x10EFF), (0x11241, 0x11241), (0x113B8, 0x113C0), (0x113C2, 0x113C2), (0x113C5, 0x113C5),
    (0x113C7, 0x113CA), (0x113CC, 0x113D0), (0x113D2, 0x113D2), (0x113E1, 0x113E2), (0x11B60, 0x11B67),
    (0x11F00, 0x11F01), (0x11F03, 0x11F03), (0x11F34, 0x11F3A), (0x11F3E, 0x11F42), (0x11F5A, 0x11F5A),
    (0x13440, 0x13440), (0x13447, 0x13455), (0x1611E, 0x1612F), (0x1E08F, 0x1E08F), (0x1E4EC, 0x1E4EF),
    (0x1E5EE, 0x1E5EF), (0x1E6E3, 0x1E6E3), (0x1E6E6, 0x1E6E6), (0x1E6EE, 0x1E6EF), (0x1E6F5, 0x1E6F5),
)  # fmt: skip
# A character with more bytes makes a grapheme of more than five bytes, which is taken apart.
MAX_BYTES_BEFORE_JOINING = 3


def normalize_by_rules(charsmap: bytes, symbols: Collection[str], alphabet: set[str] | None) -> list[Any]:
    """Return the steps that apply a precompiled_charsmap.

    symbols: texts that are never changed. alphabet: the characters of all pieces, if all others are the same unknown
    piece; rules between others are left out. None if each of them is encoded in bytes.
    """
    by_step = group_rules(charsmap)

    def matters(key: str, result: str) -> bool:
        return alphabet is None or not alphabet.isdisjoint(key + result + by_step.map_each(key))

    results = {key: result for key, result in by_step.replaced.items() if matters(key, result)}
    results |= {text: text for text in symbols if _is_changed(by_step, text)}
    placeholders = {text: 2 * chr(LAST_PLACEHOLDER - n) for n, text in enumerate(dict.fromkeys(results.values()))}
    steps = list(_insert_placeholders(by_step, results, placeholders))
    if by_step.composed:
        steps.append(normalizers.Replace(Regex(_boundary_pattern(by_step)), BOUNDARY))
    removed = next((c for c in ("\x01", "\x02") if by_step.rules.get(c) == ""), None)
    steps.append(normalizers.Replace(Regex(_separator_pattern(by_step)), removed or SEPARATOR))
    steps.append(normalizers.Precompiled(by_step.precompiled))
    if removed is None:
        steps.append(normalizers.Replace(SEPARATOR, ""))
    if by_step.composed:
        steps += [normalizers.NFC(), normalizers.Replace(BOUNDARY, "")]
    steps += [normalizers.Replace(mark, result) for mark, result in by_step.late.items() if matters(mark, result)]
    return steps + [normalizers.Replace(character, text) for text, character in placeholders.items()]


def _is_changed(by_step: RuleGroups, symbol: str) -> bool:
    """Return whether a rule applies in a symbol, or may apply to its end and what follows."""
    keys = {symbol[a:b] for a in range(len(symbol)) for b in range(a + 1, len(symbol) + 1)}
    return not keys.isdisjoint(by_step.rules) or not keys.isdisjoint(by_step.replaced)


def _insert_placeholders(by_step: RuleGroups, results: dict[str, str], placeholders: dict[str, str]) -> Iterator[Any]:
    """Yield steps that replace each key of `results` by the placeholder of its result, long keys before short ones."""
    following: dict[str, set[str]] = defaultdict(set)
    if results.keys() & by_step.replaced.keys():
        for key in by_step.rules:
            following[key[:-1]].add(key[-1])
    groups: dict[tuple[int, str, str], list[str]] = defaultdict(list)
    for key, result in results.items():
        longer = set() if key == result else following[key]
        groups[-len(key), result, f"(?!{one_of(longer)})" if longer else ""].append(key)
    for (_, result, not_longer), keys in sorted(groups.items()):
        pattern = f"(?:{'|'.join(sequences(keys))}){not_longer}"
        yield normalizers.Replace(Regex(pattern), placeholders[result])


@cache
def _boundary_pattern(by_step: RuleGroups) -> str:
    r"""Match before each mark that NFC must not move, or join with the character before.

    These are the marks that end no composed rule. \G continues at the last match, so that the text is read once.
    """
    firsts, seconds = composing_characters()
    moving = firsts | seconds
    characters = {c for c in by_step.rules if len(c) == 1} | moving | canonical_decompositions().keys()
    marks = one_of(c for c in characters if by_step.is_mark(c))
    ends = {c: unicodedata.normalize("NFD", by_step.map_each(c)[-1:]) for c in characters}
    joins = one_of(c for c, end in ends.items() if not end or not moving.isdisjoint(end))
    steps = [rf"[^{marks[1:]}++", rf"(?<!{joins}){marks}"]
    tails: dict[str, set[str]] = defaultdict(set)
    # Sorted: the order of a set of strings is another one in every process, and the same command writes the same bytes.
    for key in sorted(by_step.composed):
        tails[key[:-1]].add(key[-1])
    heads: dict[tuple[int, frozenset[str]], list[str]] = defaultdict(list)
    for head, tail in tails.items():
        heads[len(head), frozenset(tail)].append(head)
    steps += [f"(?<={'|'.join(sequences(texts))}){one_of(tail)}" for (_, tail), texts in heads.items()]
    return rf"\G(?>{'|'.join(steps)})*+\K(?={marks})"


@cache
def _separator_pattern(by_step: RuleGroups) -> str:
    """Match before each character that forms a grapheme with one before it for which there is a rule."""
    before = {key[0] for key in by_step.rules if len(key[0].encode()) <= MAX_BYTES_BEFORE_JOINING}
    joining = one_of(_joining_characters())
    newline = r"|(?<!\r)\n" if "\r" in before else ""
    skipped = rf"[^{joining[1:-1]}\n]++" if newline else f"[^{joining[1:]}++"
    wanted = rf"(?:{joining}|\n)" if newline else joining
    return rf"\G(?>{skipped}{newline}|(?<!{one_of(before)}){joining})*+\K(?={wanted})"


@cache
def _joining_characters() -> frozenset[str]:
    marks = {c for c in map(chr, CODE_POINTS) if unicodedata.category(c)[0] == "M"}
    newer = {chr(c) for first, last in NEWER_MARKS for c in range(first, last + 1)}
    return frozenset(marks | newer | set(map(chr, JOINING)))


def sequences(texts: Iterable[str]) -> list[str]:
    """Return patterns that match exactly these texts, which have the same length: a class for each character."""
    rests: dict[str, list[str]] = defaultdict(list)
    for text in texts:
        rests[text[0]].append(text[1:])
    firsts: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for first, rest in rests.items():
        firsts[tuple(sorted(rest))].append(first)
    found = []
    for rest, characters in firsts.items():
        found += [one_of(characters) + tail for tail in (sequences(rest) if rest[0] else [""])]
    return found


def one_of(characters: Iterable[str]) -> str:
    """Return the pattern of a character class, made of ranges."""
    numbers = sorted(set(map(ord, characters)))
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][1] == number - 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return "[" + "".join(rf"\x{{{a:x}}}-\x{{{b:x}}}" for a, b in ranges) + "]"
