"""The folder that shards are written to: one command at a time, and what is there is finished, or ours to go on with."""

import errno
import fcntl
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.writing.length_statistics import PLOT
from megabert.data.shards.manifest import CHUNKS, MANIFEST, TOKEN_COUNTS
from megabert.files.atomic import write_atomically

WRITTEN_SHARD = re.compile(r"(train|heldout)-\d{5}\.tar")


@contextmanager
def locked_work_folder(out: Path, request: str) -> Iterator[Path]:
    """Begin, or go on with, the work of this very request in out/.work; it is removed when all is done.

    What another request left is removed first. Raises ValueError if another command is at work there, or if shards are
    there that are not ours to replace.
    """
    work = out / ".work"
    if not work.exists() and not (out / MANIFEST).exists() and (strangers := _shards(out)):
        raise ValueError(
            f"{strangers[0]}: is there, but no manifest of ours, so it will not be replaced. Choose another --out, "
            "or remove it."
        )
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise ValueError(
                f"{out}: another write_shards.py is at work there. Wait, or choose another --out."
            ) from None
        marker = work / "request"
        if not (marker.is_file() and marker.read_text() == request):
            _remove_earlier_results(out, work)
            write_atomically(marker, request.encode())
        for temporary in work.rglob("*.tmp"):  # of commands that were killed
            temporary.unlink(missing_ok=True)
        for name in ("runs", "shards"):
            (work / name).mkdir(exist_ok=True)
        yield work
        shutil.rmtree(work)


def remove_finished_work(out: Path) -> None:
    """Remove the work of a command that was killed between its manifest and its end."""
    work = out / ".work"
    if work.is_dir():
        with open(work / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            shutil.rmtree(work)


def _remove_earlier_results(out: Path, work: Path) -> None:
    """Remove an earlier request's results. The manifest goes first: from here on the folder is unfinished."""
    for path in [*(out / name for name in (MANIFEST, CHUNKS, TOKEN_COUNTS, PLOT)), *_shards(out), work / "request"]:
        path.unlink(missing_ok=True)
    for name in ("runs", "shards"):
        shutil.rmtree(work / name, ignore_errors=True)


def _shards(out: Path) -> list[Path]:
    return sorted(path for path in out.glob("*.tar") if WRITTEN_SHARD.fullmatch(path.name))
