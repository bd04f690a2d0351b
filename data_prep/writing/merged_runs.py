"""Merge sorted runs between the two passes, so that each shard finds its documents in few places.

Without it the second pass makes (sorted runs) x (shards) reads. Both numbers grow with the corpus, so the reads become
many and small: 1.6 kB each for 10 TB of text. Here a group of sorted runs becomes one file that has the documents of
each shard in one place, in the order of their hashes, and the sorted runs are removed.
"""

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.writing import sorted_runs
from data_prep.writing.sorted_runs import SortedRun, TaskSummary, WriteSettings, is_first_copy, write_run
from megabert.files.atomic import new_file

# A read of this size costs a disk or a network file system little more than the transfer.
READ_BYTES = 128 << 10
# A machine keeps this many bytes in memory between the passes, where small reads cost nothing.
CACHED_BYTES = 8 << 30

# The number of shards of each part.
ShardCounts = dict[str, int]


class Group(NamedTuple):
    """Sorted runs, as (task, number) of each, that are merged into one file. number: the group's number."""

    number: int
    runs: list[tuple[int, int]]


class ShardReads(NamedTuple):
    """What the second pass reads. files: that each shard reads from; groups: to be merged before, [] for none."""

    files: list[Path]
    groups: list[Group]


def runs_per_group(total_bytes: int, runs: int, shards: int) -> int:
    """Return how many sorted runs to merge into one file, so that a shard reads READ_BYTES of each; 1: no merge."""
    if total_bytes <= CACHED_BYTES or total_bytes >= READ_BYTES * runs * shards:
        return 1
    files = max(1, total_bytes // (READ_BYTES * shards))
    return math.ceil(runs / files)


def plan_reads(settings: WriteSettings, summaries: list[TaskSummary], counts: ShardCounts) -> ShardReads:
    """Decide from the summaries of the first pass what is merged. All machines decide the same."""
    total = settings.dtype.itemsize * sum(sum(summary.elements.values()) for summary in summaries)
    runs = [(task, number) for task, summary in enumerate(summaries) for number in range(summary.runs)]
    together = runs_per_group(total, len(runs), sum(counts.values()))
    if together == 1:
        return ShardReads([sorted_runs.run_path(settings, *run) for run in runs], [])
    groups = [Group(n, runs[at : at + together]) for n, at in enumerate(range(0, len(runs), together))]
    return ShardReads([group_path(settings, group.number) for group in groups], groups)


def group_path(settings: WriteSettings, number: int) -> Path:
    return settings.work / "runs" / f"{number:06d}.merged"


def merge_runs(settings: WriteSettings, group: Group, counts: ShardCounts) -> str:
    """Write the merged file of one group, then remove its sorted runs. A group without a file is merged again.

    Returns the file's name.

    The file has the byte at which each shard's documents begin, train before held-out, and the end; then, for each
    shard, a sorted run of only its documents.
    """
    path = group_path(settings, group.number)
    # The process that wrote the file died before it could report it. The group's sorted runs may be gone by now.
    if path.is_file():
        return path.name
    paths = [sorted_runs.run_path(settings, *run) for run in group.runs]
    size = sum(path.stat().st_size for path in paths)
    # Shards that are read together, so that at most about RUN_BYTES are in memory.
    together = max(1, sum(counts.values()) * sorted_runs.RUN_BYTES // max(1, size))
    with new_file(path) as temporary:
        with open(temporary, "wb") as file:
            begins = np.zeros(sum(counts.values()) + 1, "<i8")
            file.write(begins.data)
            shard = 0
            for part, total in counts.items():
                for first in range(0, total, together):
                    for low, high, documents in _documents_of(settings, paths, part, (first, first + together), total):
                        begins[shard] = file.tell()
                        write_run(file, part, documents, slice(low, high))
                        shard += 1
            begins[shard] = file.tell()
            file.seek(0)
            file.write(begins.data)
            file.flush()
            os.fsync(file.fileno())
    for run in paths:
        run.unlink(missing_ok=True)
    return path.name


def read_shard(
    path: Path, settings: WriteSettings, part: str, number: int, counts: ShardCounts
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the documents of a shard in a sorted run or a merged file: (payload, lengths (n,), hashes (n, 2))."""
    total = counts[part]
    if path.suffix != ".merged":
        low, high = ((1 << 64) * i // total for i in (number, number + 1))
        return SortedRun.open(path, settings.dtype).read(part, low, high)
    place = number + (0 if part == "train" else counts["train"])
    with open(path, "rb", buffering=0) as file:
        begin, end = np.frombuffer(os.pread(file.fileno(), 16, 8 * place), "<i8").tolist()
        data = os.pread(file.fileno(), end - begin, begin)
    return SortedRun(np.frombuffer(data, np.uint8), settings.dtype).read(part, 0, 1 << 64)


def _documents_of(
    settings: WriteSettings, paths: list[Path], part: str, shards: tuple[int, int], total: int
) -> Iterator[tuple[int, int, sorted_runs.SortedDocuments]]:
    """Yield (first document, last document, documents) of each shard of a range that is read at once."""
    edges = [(1 << 64) * i // total for i in range(shards[0], min(shards[1], total) + 1)]
    runs = (SortedRun.open(path, settings.dtype) for path in paths)
    documents = collect(settings, [run.read(part, edges[0], edges[-1]) for run in runs])
    keys = documents.hashes[:, 1]
    inner = [int(np.searchsorted(keys, np.uint64(edge))) for edge in edges[1:-1]]
    places = [0, *inner, len(keys)]
    for low, high in itertools.pairwise(places):
        yield low, high, documents


def collect(
    settings: WriteSettings, pieces: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> sorted_runs.SortedDocuments:
    """Sort the documents of several sorted runs by hash, and drop copies. The payload stays where it is."""
    payload, lengths, hashes = (np.concatenate(column) for column in zip(*pieces, strict=True))
    begins = lengths.cumsum() - lengths
    # Copies of one text are equal, so if they are kept, their order does not matter.
    order = np.lexsort((hashes[:, 0], hashes[:, 1]))
    if settings.deduplicate:
        order = order[is_first_copy(hashes[order])]
    return sorted_runs.SortedDocuments(payload, begins[order], lengths[order], hashes[order])
