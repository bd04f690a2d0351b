"""verse-paraphrase: a verse of the King James Version and one of the World English Bible; are they the same verse?

Both are in the public domain; pysword reads them as Debian's packages sword-text-kjv and sword-text-web have them. A negative is, of the
other verses of the chapter, the one whose words are most alike. Which pairs count is so chosen that positives and negatives have as many
of each similarity of words, so that a threshold on that is no better than chance; which words differ still tells. It is no MRPC.
"""

import functools
import hashlib
import importlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

from data_prep.tasks.tsv import Row, write_splits

OLD, NEW = "engKJV2006eb", "engWEB2015eb"
PYSWORD = "pysword==0.2.8"
LEAST, MOST, STEP = (
    0.1,
    0.7,
    0.02,
)  # cosine of TF-IDF: less shows parallel numbering gone wrong, more is nearly the same text
MOST_PER_STEP = 150  # of each label
HELD_OUT_SHARE = 0.2


class Chapter(NamedTuple):
    """old, new: its verses in both translations, as many."""

    name: str
    old: list[str]
    new: list[str]


class Pair(NamedTuple):
    """similarity: of the words; chapter: which decides the split."""

    old: str
    new: str
    label: str
    similarity: float
    chapter: str


def write(sword: Path, folder: Path) -> None:
    """Write verse-paraphrase/train.tsv and dev.tsv into `folder`.

    sword: with mods.d/ and modules/ of both translations. Raises ValueError if one is missing, or pysword.
    """
    rows = [
        Row((pair.old, pair.new), pair.label, _number(pair.chapter) < HELD_OUT_SHARE)
        for pair in balance(pairs(list(chapters(sword))))
    ]
    write_splits(folder / "verse-paraphrase", ("sentence1", "sentence2"), rows)


def chapters(sword: Path) -> Iterator[Chapter]:
    """The chapters that have as many verses in both: the others may be numbered in two ways."""
    try:
        modules = importlib.import_module("pysword.modules").SwordModules(str(sword))
    except ImportError as missing:
        raise ValueError(f"verse-paraphrase needs pysword: pip install {PYSWORD}") from missing
    for name in (OLD, NEW):
        if not (sword / "mods.d" / f"{name}.conf").is_file():
            raise ValueError(f"{sword}/mods.d/{name}.conf: no such file (Debian: sword-text-kjv and sword-text-web).")
    modules.parse_modules()
    old, new = (_read(modules.get_bible_from_module(name)) for name in (OLD, NEW))
    for name, verses in old.items():
        if len(verses) == len(new.get(name, [])):
            yield Chapter(name, verses, new[name])


def _read(bible: Any) -> dict[str, list[str]]:
    """Chapter -> its verses."""
    bible._decompressed_text = functools.lru_cache(2)(bible._decompressed_text)  # else a whole book for every verse
    return {
        f"{book.osis_name} {number}": [" ".join(text.split()) for text in bible.get_iter([book.name], [number])]
        for books in bible.get_structure().get_books().values()
        for book in books
        for number in range(1, book.num_chapters + 1)
    }


def pairs(found: list[Chapter]) -> Iterator[Pair]:
    """Every verse with itself, and with the verse of its chapter that is most alike by its words."""
    vectorizer = TfidfVectorizer(sublinear_tf=True)
    vectorizer.fit(verse for chapter in found for verse in chapter.old + chapter.new)
    for chapter in found:
        old, new = (csr_matrix(vectorizer.transform(verses)) for verses in (chapter.old, chapter.new))
        similar = (old @ new.T).toarray()
        own = similar.diagonal().copy()
        np.fill_diagonal(similar, -1.0)
        for number, nearest in enumerate(similar.argmax(axis=1)):
            text = chapter.old[number]
            yield Pair(text, chapter.new[number], "same", float(own[number]), chapter.name)
            yield Pair(text, chapter.new[nearest], "different", float(similar[number, nearest]), chapter.name)


def balance(found: Iterable[Pair]) -> list[Pair]:
    """As many pairs of each label in every step of similarity, in an order that a hash decides."""
    steps: dict[int, dict[str, list[Pair]]] = defaultdict(lambda: {"same": [], "different": []})
    for pair in sorted(found, key=lambda pair: _number("\t".join(pair[:3]))):
        if LEAST <= pair.similarity < MOST and pair.old and pair.new:
            steps[int((pair.similarity - LEAST) / STEP)][pair.label].append(pair)
    chosen = []
    for labels in steps.values():
        count = min(MOST_PER_STEP, *map(len, labels.values()))
        chosen += [pair for some in labels.values() for pair in some[:count]]
    return sorted(chosen, key=lambda pair: _number("\t".join(pair[:3])))


def _number(text: str) -> float:
    """From 0 to 1, the same everywhere."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big") / (1 << 48)
