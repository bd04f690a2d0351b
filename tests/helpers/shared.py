"""Folders that the test processes of one run share: the first that needs one makes it, and the others wait."""

import os
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest


def make_once(tmp_path_factory: pytest.TempPathFactory, name: str, write: Callable[[Path], object]) -> Path:
    """Return the folder of this name, which `write` filled once. A test that changes it must copy it first.

    If `write` fails, the next test that needs the folder tries again in another one.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    link = root / f"made-{name}"
    with filelock.FileLock(root / f"made-{name}.lock"):
        if not link.exists():
            folder = tmp_path_factory.mktemp(name)
            write(folder)
            link.symlink_to(folder)
    return link.resolve()
