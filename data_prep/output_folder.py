"""Lock the folder that shards are written to, and keep or remove the unfinished work in it."""

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.request_file import belongs_to_request, lock_output, remove_request, was_written_for, write_request
from data_prep.writing.length_statistics import PLOT
from megabert.data.shards.manifest import CHUNKS, MANIFEST, TOKEN_COUNTS
from megabert.files.lock import LockHeldError, acquire

LOCK = "lock"
# The plan that separate_tasks.py writes.
PLAN = "plan.jsonl"
# What datatrove_writer.py writes beside the sorted runs of a pipeline.
PIPELINE = "datatrove.json"
WRITTEN_SHARD = re.compile(r"(train|heldout)-\d{5}\.tar")

# Version of everything in out/.work: request file, sorted runs, task summaries and shard records. Unfinished work of
# another version is removed and done again. Increase it whenever one of these formats changes.
WORK_FORMAT = 5


def check_replaceable(out: Path, request: str, replace: bool) -> None:
    """Raise ValueError if a folder holds finished shards of another request, which only --replace replaces."""
    if (out / MANIFEST).is_file() and not (replace or was_written_for(out, request)):
        raise ValueError(
            f"{out}: holds finished shards of another source, tokenizer or other settings. Choose another --out, or "
            "pass --replace."
        )


@contextmanager
def locked_work_folder(out: Path, request: str, replace: bool = False) -> Iterator[Path]:
    """Yield the folder of opened_work_folder(), and remove it when the block ends without an exception."""
    with opened_work_folder(out, request, replace) as work:
        yield work
        shutil.rmtree(work)


@contextmanager
def opened_work_folder(out: Path, request: str, replace: bool = False) -> Iterator[Path]:
    """Lock out/.work and yield it. Unfinished work of the same request in it is kept, other work is removed.

    replace: whether shards without a manifest may be replaced. Raises ValueError if another command holds the lock, or
    if `out` holds shards without a manifest that were not written for this request.
    """
    work = out / ".work"
    known = (out / MANIFEST).exists() or was_written_for(out, request) or replace
    if not work.exists() and not known and (foreign := list_shards(out)):
        raise ValueError(
            f"{foreign[0]}: exists, but its folder has no {MANIFEST}, so it will not be replaced. Choose another "
            "--out, remove the file, or pass --replace."
        )
    lock = lock_output(out, f".work/{LOCK}", "write_shards.py")
    try:
        if not belongs_to_request(work, WORK_FORMAT, request):
            if (work / PIPELINE).is_file():
                raise ValueError(
                    f"{work}: holds sorted runs of a datatrove pipeline. Finish them with FinishShards, remove the "
                    "folder, or choose another --out."
                )
            remove_results(out)
            _remove_work(work)
            write_request(work, WORK_FORMAT, request)
        # Commands that were killed leave their temporary files behind.
        for temporary in work.rglob("*.tmp"):
            temporary.unlink(missing_ok=True)
        for name in ("runs", "shards"):
            (work / name).mkdir(exist_ok=True)
        yield work
    finally:
        lock.release()


def remove_finished_work(out: Path) -> None:
    """Remove the work folder of a command that was killed after it had written the manifest."""
    work = out / ".work"
    if not work.is_dir():
        return
    try:
        lock = acquire(work / LOCK)
    except LockHeldError:
        # The command is still running and removes the folder itself.
        return
    try:
        shutil.rmtree(work)
    finally:
        lock.release()


def remove_results(out: Path) -> None:
    """Remove the results of an earlier request. The manifest goes first: without it the folder counts as unfinished."""
    for path in [*(out / name for name in (MANIFEST, CHUNKS, TOKEN_COUNTS, PLOT)), *list_shards(out)]:
        path.unlink(missing_ok=True)
    remove_request(out)


def _remove_work(work: Path) -> None:
    remove_request(work)
    (work / PLAN).unlink(missing_ok=True)
    for name in ("runs", "shards"):
        shutil.rmtree(work / name, ignore_errors=True)


def list_shards(out: Path) -> list[Path]:
    return sorted(path for path in out.glob("*.tar") if WRITTEN_SHARD.fullmatch(path.name))
