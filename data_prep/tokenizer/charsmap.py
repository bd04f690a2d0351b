"""Read the normalization rules of a sentencepiece model, and plan which normalizer applies each of them."""

import struct
import unicodedata
from collections.abc import Iterable
from functools import cache, cached_property, lru_cache

import numpy as np
from tokenizers import normalizers

# This bit of a unit of the trie says that a text ends there.
LEAF = 1 << 8
NODES_AT_ONCE = 1 << 14
HANGUL_FIRSTS = (*range(0x1100, 0x1113), *range(0xAC00, 0xD7A4, 28))
HANGUL_SECONDS = (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))
# Those of the planes 0 to 2 and 14 of Unicode. The other planes have no marks and no characters with decompositions.
CODE_POINTS = (*range(0x30000), *range(0xE0000, 0xF0000))


class CharsMap:
    """The rules of a precompiled_charsmap: a double-array trie of their left sides, then the NUL-ended right sides.

    Format: https://github.com/google/sentencepiece, src/normalizer.cc, and third_party/darts_clone/darts.h.
    """

    def __init__(self, data: bytes):
        (size,) = struct.unpack_from("<I", data)
        self._units = np.frombuffer(data, "<u4", size // 4, 4)
        self._texts = data[4 + size :]

    @cached_property
    def rules(self) -> dict[str, str]:
        """All rules, from a text to its replacement."""
        units = self._units.astype(np.int64)
        offsets = (units >> 10) << ((units & 0x200) >> 6)
        labels = np.arange(1, 256)
        rules = {}
        nodes, keys = offsets[:1], [b""]
        while keys:
            next_nodes, next_keys = [nodes[:0]], []
            for at in range(0, len(keys), NODES_AT_ONCE):
                places = nodes[at : at + NODES_AT_ONCE, None] ^ labels
                found = units[np.minimum(places, len(units) - 1)] & 0x8000_00FF == labels
                rows, columns = np.nonzero(found & (places < len(units)))
                children = places[rows, columns]
                below = children ^ offsets[children]
                longer = [keys[at + row] + bytes((column + 1,)) for row, column in zip(rows, columns, strict=True)]
                ends = np.flatnonzero(units[children] & LEAF)
                values = (units[below[ends]] & 0x7FFF_FFFF).tolist()
                rules |= {longer[end]: self._text(value) for end, value in zip(ends, values, strict=True)}
                next_nodes.append(below)
                next_keys += longer
            nodes, keys = np.concatenate(next_nodes), next_keys
        return {key.decode(): text for key, text in rules.items()}

    def without(self, keys: Iterable[str]) -> bytes:
        """Return the bytes of the map without the rules for these texts."""
        units = self._units.copy()
        for key in keys:
            place = 0
            for byte in key.encode():
                unit = int(units[place])
                place ^= (unit >> 10) << ((unit & 0x200) >> 6) ^ byte
            units[place] &= ~np.uint32(LEAF)
        return struct.pack("<I", units.nbytes) + units.tobytes() + self._texts

    def _text(self, begin: int) -> str:
        return self._texts[begin : self._texts.index(b"\0", begin)].decode()


class RuleGroups:
    """Which step applies each rule. Rules for one character that are in none of these groups are left to `Precompiled`.

    composed: pairs and longer texts that NFC composes after `Precompiled`. late: rules that turn a mark into a
    letter; they come after NFC, because the letter would not compose. replaced: the other rules, each of which costs a
    step; among them characters that NFC would change although they have no rule.
    """

    def __init__(self, charsmap: CharsMap):
        self.rules = charsmap.rules
        longer = sorted((key for key in self.rules if len(key) > 1), key=len)
        marks = composing_characters()[1]
        seconds = {character for key in longer for character in key[1:]}
        # What is written is sorted: sets of strings have another order in every process.
        marks_with_rules = sorted(seconds & marks & self.rules.keys())
        self.late = {c: self.rules[c] for c in marks_with_rules if self.rules[c][:1] not in marks}
        self._single = {ord(c): text for c, text in self.rules.items() if len(c) == 1 and c not in self.late}
        changed = self._changed_by_nfc()
        self.composed = self._find_composed(longer) if len(changed) < len(longer) else frozenset()
        self.replaced = {key: self.rules[key] for key in longer if key not in self.composed}
        if self.composed:
            self.replaced |= changed
        else:
            self.late = {}
        self.precompiled = charsmap.without(self.late)

    def map_each(self, text: str) -> str:
        """Apply the rules for one character that come before NFC."""
        return text.translate(self._single)

    def is_mark(self, character: str) -> bool:
        """Return whether NFC may move the result of a character, or join it with the one before."""
        return self.map_each(character)[:1] in composing_characters()[1]

    def _changed_by_nfc(self) -> dict[str, str]:
        """Return the characters whose result NFC would change, with that result."""
        found = sorted({*canonical_decompositions(), *(key for key in self.rules if len(key) == 1)} - self.late.keys())
        results = [self.map_each(c) for c in found]
        return {c: result for c, result, nfc in zip(found, results, _nfc(results), strict=True) if result != nfc}

    def _find_composed(self, longer: list[str]) -> frozenset[str]:
        """longer: the texts of more than one character that have a rule, the short ones first."""
        found: set[str] = set()
        marks = {c for c in set("".join(longer)) if self.is_mark(c)}
        for key, composed in zip(longer, _nfc(map(self.map_each, longer)), strict=True):
            marks_follow = key[0] not in marks and marks.issuperset(key[1:])
            if composed == self.rules[key] and marks_follow and (len(key) == 2 or key[:-1] in found):
                found.add(key)
        return frozenset(found)


@lru_cache(maxsize=8)
def group_rules(precompiled_charsmap: bytes) -> RuleGroups:
    return RuleGroups(CharsMap(precompiled_charsmap))


def _nfc(texts: Iterable[str]) -> list[str]:
    """Compose texts that contain no line end, in one call."""
    return normalizers.NFC().normalize_str("\n".join(texts)).split("\n")


@cache
def composing_characters() -> tuple[frozenset[str], frozenset[str]]:
    """Return the characters that NFC may join with one after them, and those that it may move or join with one before.

    Both are canonical Unicode; NFC of the tokenizers library may know fewer.
    """
    pairs = [parts for parts in canonical_decompositions().values() if len(parts) == 2]
    before = {first for first, _ in pairs} | set(map(chr, HANGUL_FIRSTS))
    after = {second for _, second in pairs} | set(map(chr, HANGUL_SECONDS))
    after |= {c for c in map(chr, CODE_POINTS) if unicodedata.combining(c)}
    return frozenset(before), frozenset(after)


@cache
def canonical_decompositions() -> dict[str, tuple[str, ...]]:
    """Map each character, except Hangul syllables, to the one or two that it is canonically equivalent to."""
    found = ((chr(c), unicodedata.decomposition(chr(c))) for c in CODE_POINTS)
    return {c: tuple(chr(int(part, 16)) for part in parts.split()) for c, parts in found if parts and parts[0] != "<"}
