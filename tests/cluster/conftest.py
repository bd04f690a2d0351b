"""One cluster at a time, also if several test processes run."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock


@pytest.fixture(scope="module", autouse=True)
def only_cluster() -> Iterator[None]:
    with FileLock(Path(tempfile.gettempdir()) / "megabert-test-cluster.lock"):
        yield
