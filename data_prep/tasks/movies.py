"""movie-sentiment and movie-rating: 10,605 movie-review snippets, from the source distribution of vaderSentiment 3.3.2.

Each has the mean rating of human raters, -4 to 4: that is movie-rating. For movie-sentiment, positive or negative, those within 0.5
of neutral are left out, which leaves 10,072. They resemble SST-2 and STS-B's regression, and are neither. The data is Hutto and
Gilbert's (ICWSM 2014); it is fetched from the package at run time, never kept here.
"""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.tasks.tsv import Row, write_splits

PACKAGE = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
NEUTRAL = 0.5  # ratings nearer to 0 than this have no label
TEST_SHARE = 0.2  # there is no official split: a hash of the id decides


def fetch(folder: Path) -> Path:
    """Find the source distribution in `folder`, fetching it with pip if it is missing.

    Raises ValueError if it cannot be fetched or is not the pinned file.
    """
    path = folder / SDIST
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "-q",
                "--no-deps",
                "--no-binary",
                ":all:",
                "-d",
                scratch,
                PACKAGE,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                said = done.stderr.strip().splitlines() or ["it said nothing"]
                raise ValueError(f"{PACKAGE}: pip could not fetch it: {said[-1]}. Put {SDIST} into {folder}.")
            os.replace(Path(scratch, SDIST), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path}: sha256 {digest}, expected {SHA256}. Remove it, and fetch it again.")
    return path


def write(folder: Path) -> None:
    """Write movie-sentiment/ and movie-rating/, train.tsv and dev.tsv in each, into `folder`."""
    rated = list(read(fetch(folder)))
    write_splits(
        folder / "movie-rating", ("sentence",), [Row((text,), repr(rating), held) for text, rating, held in rated]
    )
    clear = [
        Row((text,), "positive" if rating > 0 else "negative", held)
        for text, rating, held in rated
        if abs(rating) >= NEUTRAL
    ]
    write_splits(folder / "movie-sentiment", ("sentence",), clear)


def read(path: Path) -> Iterator[tuple[str, float, bool]]:
    """Read (text, rating, whether it is held out for scoring) from the source distribution."""
    with tarfile.open(path) as outer:
        inner = outer.extractfile(INNER)
        assert inner is not None, "the pinned file has this member"
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tar:
            file = tar.extractfile(FILE)
            assert file is not None, "and this one in it"
            lines = file.read().decode("utf-8", "replace").splitlines()
    for line in lines:
        number, rating, text = line.split("\t", 2)
        yield text.strip(), float(rating), hashlib.sha256(number.encode()).digest()[0] < 256 * TEST_SHARE
