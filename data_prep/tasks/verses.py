"""Write the task verse-paraphrase: are a verse of the King James Version and one of the World English Bible the same?

Both translations are in the public domain. pysword reads them from Debian's packages sword-text-kjv and sword-text-web.
The negative of a verse is the most similar other verse of the same chapter, by TF-IDF. Pairs are selected so that each
interval of similarity has as many positives as negatives: a threshold on the similarity is no better than chance.
The words that differ still give some information. The task is not MRPC.
"""

import functools
import importlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer

from data_prep.tasks.held_out import hash_fraction
from data_prep.tasks.tsv import Row, write_splits

OLD, NEW = "engKJV2006eb", "engWEB2015eb"
PYSWORD = "pysword==0.2.8"
# Cosine similarity of TF-IDF. Verses below the minimum are often numbered differently, those above the maximum are
# nearly the same text.
MIN_SIMILARITY, MAX_SIMILARITY, INTERVAL = 0.1, 0.7, 0.02
# At most this many pairs of each label are taken from an interval of similarities.
MAX_PER_INTERVAL = 150
HELD_OUT_SHARE = 0.2


class Chapter(NamedTuple):
    """old, new: the verses in both translations, equally many."""

    name: str
    old: list[str]
    new: list[str]


class Pair(NamedTuple):
    """similarity: cosine of TF-IDF; chapter: decides whether the pair is held out."""

    old: str
    new: str
    label: str
    similarity: float
    chapter: str


def write_task(sword: Path, folder: Path) -> None:
    """Write train.tsv and dev.tsv to folder/verse-paraphrase.

    sword: folder with mods.d/ and modules/ of both translations. Raises ValueError if one or pysword is missing.
    """
    rows = [
        Row((pair.old, pair.new), pair.label, hash_fraction(pair.chapter) < HELD_OUT_SHARE)
        for pair in balance(pairs(list(chapters(sword))))
    ]
    write_splits(folder / "verse-paraphrase", ("sentence1", "sentence2"), rows)


def chapters(sword: Path) -> Iterator[Chapter]:
    """Yield the chapters with equally many verses in both translations. Others may be numbered differently."""
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
    """Return chapter -> verses. bible: a pysword.bible.SwordBible."""
    # pysword has no cache: for every verse it decompresses the whole book, which takes minutes instead of seconds for
    # both translations. This replaces a private method, so PYSWORD pins the version.
    bible._decompressed_text = functools.lru_cache(2)(bible._decompressed_text)
    return {
        f"{book.osis_name} {number}": [" ".join(text.split()) for text in bible.get_iter([book.name], [number])]
        for books in bible.get_structure().get_books().values()
        for book in books
        for number in range(1, book.num_chapters + 1)
    }


def pairs(found: list[Chapter]) -> Iterator[Pair]:
    """Yield every verse with its translation, and with the most similar other verse of its chapter."""
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
    """Select equally many pairs of each label in every interval of similarity. A hash decides which."""
    intervals: dict[int, dict[str, list[Pair]]] = defaultdict(lambda: {"same": [], "different": []})
    for pair in sorted(found, key=lambda pair: hash_fraction("\t".join(pair[:3]))):
        if MIN_SIMILARITY <= pair.similarity < MAX_SIMILARITY and pair.old and pair.new:
            intervals[int((pair.similarity - MIN_SIMILARITY) / INTERVAL)][pair.label].append(pair)
    chosen = []
    for labels in intervals.values():
        count = min(MAX_PER_INTERVAL, *map(len, labels.values()))
        chosen += [pair for some in labels.values() for pair in some[:count]]
    return sorted(chosen, key=lambda pair: hash_fraction("\t".join(pair[:3])))
