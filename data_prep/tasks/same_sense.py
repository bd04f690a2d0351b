"""same-sense: two usage examples of one word from WordNet; do they show the same sense? Built as WiC was, and not WiC.

Reads WordNet's own files (data.noun, data.verb, data.adj, data.adv; Debian's package wordnet-base has them), under WordNet's licence. Two
examples of one synset that both show the word are a positive, of two synsets a negative; as many of each per word, and every word is
in one split only.
"""

import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from data_prep.tasks.tsv import Row, write_splits

FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
HELD_OUT_SHARE = 0.15
MOST_PER_WORD = 4  # pairs of each kind: else a few common verbs would be the task


def write(wordnet: Path, folder: Path) -> None:
    """Write same-sense/train.tsv and dev.tsv into `folder`. Raises ValueError if a file of WordNet is missing."""
    for name in FILES:
        if not (wordnet / name).is_file():
            raise ValueError(f"{wordnet / name}: no such file; expected WordNet's data files (Debian: wordnet-base).")
    rows = [
        Row((f"{word}: {first}", f"{word}: {second}"), label, held_out)
        for word, first, second, label, held_out in pairs(senses(wordnet))
    ]
    write_splits(folder / "same-sense", ("sentence1", "sentence2"), rows)


def senses(wordnet: Path) -> dict[str, dict[str, list[str]]]:
    """Word -> synset -> its examples that show the word, or a form that begins alike."""
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in FILES:
        for line in (wordnet / name).read_text(encoding="latin-1").splitlines():
            if line.startswith(" "):
                continue  # the licence
            data, _, gloss = line.partition(" | ")
            fields = data.split()
            words = [fields[4 + 2 * i].partition("(")[0].replace("_", " ").lower() for i in range(int(fields[3], 16))]
            for example in re.findall(r'"([^"]+)"', gloss):
                for word in words:
                    if shows(word, example):
                        found[word][f"{name}:{fields[0]}"].append(example)
    return found


def shows(word: str, example: str) -> bool:
    """Whether an example has the word, perhaps with an ending."""
    stem = word[:-1] if len(word) > 4 and word[-1] in "ey" else word
    return re.search(rf"\b{re.escape(stem)}\w{{0,4}}\b", example.lower()) is not None


def pairs(found: dict[str, dict[str, list[str]]]) -> Iterator[tuple[str, str, str, str, bool]]:
    """(word, example, example, label, held out), each word's pairs in an order that a hash decides."""

    def order(pair: tuple[str, str]) -> bytes:
        return hashlib.sha256("\t".join(pair).encode()).digest()

    for word in sorted(found):
        synsets = [list(dict.fromkeys(examples)) for examples in found[word].values()]
        same = sorted((pair for some in synsets for pair in itertools.combinations(some, 2)), key=order)
        both = itertools.combinations(synsets, 2)
        other = sorted((pair for one, two in both for pair in itertools.product(one, two)), key=order)
        count = min(len(same), len(other), MOST_PER_WORD)
        held_out = hashlib.sha256(word.encode()).digest()[0] < 256 * HELD_OUT_SHARE
        for label, chosen in (("same", same[:count]), ("different", other[:count])):
            for first, second in chosen:
                yield word, first, second, label, held_out
