"""Write the task same-sense: do two usage examples of a word from WordNet show the same sense of the word?

It is built like WiC, but is not WiC. The examples come from WordNet's files data.noun, data.verb, data.adj and
data.adv, which Debian's package wordnet-base contains, under WordNet's licence. Two examples of the same synset that
both contain the word are a positive, examples of two synsets a negative. Each word has as many positives as negatives,
and is either in train.tsv or in dev.tsv.
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
# Pairs of each label. Without a limit most pairs would be of a few common verbs.
MAX_PER_WORD = 4


def write_task(wordnet: Path, folder: Path) -> None:
    """Write train.tsv and dev.tsv to folder/same-sense. Raises ValueError if a file of WordNet is missing."""
    for name in FILES:
        if not (wordnet / name).is_file():
            raise ValueError(f"{wordnet / name}: no such file; expected WordNet's data files (Debian: wordnet-base).")
    rows = [
        Row((f"{word}: {first}", f"{word}: {second}"), label, held_out)
        for word, first, second, label, held_out in pairs(senses(wordnet))
    ]
    write_splits(folder / "same-sense", ("sentence1", "sentence2"), rows)


def senses(wordnet: Path) -> dict[str, dict[str, list[str]]]:
    """Return word -> synset -> examples of the synset that contain the word or an inflected form of it.

    Raises ValueError naming the line of a file that is not WordNet's.
    """
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in FILES:
        for number, line in enumerate((wordnet / name).read_text(encoding="latin-1").splitlines(), 1):
            if line.startswith(" "):
                # Lines that begin with a space are those of the licence.
                continue
            data, _, gloss = line.partition(" | ")
            fields = data.split()
            try:
                spelled = [fields[4 + 2 * i] for i in range(int(fields[3], 16))]
            except (IndexError, ValueError) as error:
                raise ValueError(
                    f"{wordnet / name}: line {number} is not in WordNet's format. Copy the file again "
                    "(Debian: wordnet-base)."
                ) from error
            words = [word.partition("(")[0].replace("_", " ").lower() for word in spelled]
            for example in re.findall(r'"([^"]+)"', gloss):
                for word in words:
                    if contains_word(word, example):
                        found[word][f"{name}:{fields[0]}"].append(example)
    return found


def contains_word(word: str, example: str) -> bool:
    """Return whether an example contains the word, perhaps with an ending."""
    stem = word[:-1] if len(word) > 4 and word[-1] in "ey" else word
    return re.search(rf"\b{re.escape(stem)}\w{{0,4}}\b", example.lower()) is not None


def pairs(found: dict[str, dict[str, list[str]]]) -> Iterator[tuple[str, str, str, str, bool]]:
    """Yield (word, example, example, label, held out). A hash decides the order of the pairs of a word."""

    def order(pair: tuple[str, str]) -> bytes:
        return hashlib.sha256("\t".join(pair).encode()).digest()

    for word in sorted(found):
        synsets = [list(dict.fromkeys(examples)) for examples in found[word].values()]
        same = sorted((pair for some in synsets for pair in itertools.combinations(some, 2)), key=order)
        both = itertools.combinations(synsets, 2)
        different = sorted((pair for one, two in both for pair in itertools.product(one, two)), key=order)
        count = min(len(same), len(different), MAX_PER_WORD)
        held_out = hashlib.sha256(word.encode()).digest()[0] < 256 * HELD_OUT_SHARE
        for label, chosen in (("same", same[:count]), ("different", different[:count])):
            for first, second in chosen:
                yield word, first, second, label, held_out
