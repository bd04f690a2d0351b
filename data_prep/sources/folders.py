"""List the files below a folder, following links; nothing is left out without being counted."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.sources.base import HIDDEN, READ_ALREADY, LeftOut, is_hidden


def files_below(folder: Path, is_source: Callable[[Path], bool], left_out: LeftOut) -> Iterator[Path]:
    """Yield the files below a folder in the order of their paths, and the folders that are a source as a whole.

    Hidden files and folders, and what a link names once more, are left out. Raises ValueError for anything
    that cannot be read: a link without a target, a pipe, a folder without permission.
    """
    seen: dict[tuple[int, int], Path] = {}
    stack = [folder]
    while stack:
        path = stack.pop()
        state = kind_of(path)
        identity = state.st_dev, state.st_ino
        if identity in seen:
            left_out.add(READ_ALREADY, f"{path}, which is {seen[identity]}")
            continue
        seen[identity] = path
        if stat.S_ISREG(state.st_mode) or is_source(path):
            yield path
        else:
            stack.extend(reversed(_visible(path, left_out)))


def kind_of(path: Path) -> os.stat_result:
    """Return the state of a file or folder. Raises ValueError for anything else, and for what cannot be read."""
    try:
        state = path.stat()
    except OSError as error:
        is_link = "a link whose target cannot be read" if path.is_symlink() else "cannot be read"
        raise ValueError(f"{path}: {is_link}: {error.strerror}. Mend it, or remove it.") from error
    if not stat.S_ISREG(state.st_mode) and not stat.S_ISDIR(state.st_mode):
        raise ValueError(
            f"{path}: is a pipe or a device, expected a file or a folder, which can be read twice and in parts. Write "
            "its content to a file, or remove it from the source."
        )
    return state


def _visible(folder: Path, left_out: LeftOut) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"{folder}: cannot be listed: {error.strerror}. Mend it, or remove it.") from error
    for name in filter(is_hidden, names):
        left_out.add(HIDDEN, str(folder / name))
    return [folder / name for name in names if not is_hidden(name)]
