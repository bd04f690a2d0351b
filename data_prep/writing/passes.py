"""Run the two passes and the merge between them, whole or in equal parts that may run on several machines."""

from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from data_prep.sources.base import INPUT_SPLIT_BYTES, InputSplit
from data_prep.workers import Progress
from data_prep.writing import merged_runs, shard_writer, sorted_runs
from data_prep.writing.merged_runs import ShardCounts, ShardReads
from data_prep.writing.shard_options import Options
from data_prep.writing.sorted_runs import TaskSummary, WriteSettings

R = TypeVar("R")

# A source is divided into about this many tasks, each of at most TASK_BYTES: enough to keep every core busy to the end.
# The tasks must not depend on --workers, so that a command can continue with another number of them.
TASKS = 256
TASK_BYTES = 256 << 20


class Pool(Protocol):
    """What runs tasks: WorkerPool or RayPool.

    counters: bytes that are read so far, of the input and of the text in it. run: calls function(*task) for each task,
    and on_result with each result, or with None while there is none.
    """

    def counters(self) -> tuple[int, int]: ...

    def run(
        self, function: Callable[..., R], tasks: Iterable[tuple], on_result: Callable[[R | None], object]
    ) -> None: ...


class Part(NamedTuple):
    """Part `number` of `total` equal parts of a pass."""

    number: int = 0
    total: int = 1


def group_into_tasks(splits: list[InputSplit]) -> list[list[InputSplit]]:
    """Group input splits, in their order, into tasks."""
    task_bytes = min(TASK_BYTES, max(INPUT_SPLIT_BYTES, sum(split.size for split in splits) // TASKS))
    tasks: list[list[InputSplit]] = []
    # This size makes the first input split begin a task, even if it is empty.
    size = task_bytes + 1
    for split in splits:
        # The hub does not tell the size of a shard, so each becomes a task of its own.
        cost = task_bytes if split.kind == "hub" else split.size
        if size + cost > task_bytes:
            tasks.append([])
            size = 0
        tasks[-1].append(split)
        size += cost
    return tasks


def write_sorted_runs(settings: WriteSettings, tasks: dict[int, list[InputSplit]], pool: Pool) -> None:
    """Do some tasks of the first pass, or what is left of them. tasks: by their numbers."""
    left = [n for n in tasks if not sorted_runs.summary_path(settings, n).is_file()]
    splits = [split for task in tasks.values() for split in task]
    total = sum(split.size for split in splits)
    progress = Progress("reading", total, "shard" if splits and splits[0].kind == "hub" else "B")
    progress.start_at(total - sum(split.size for n in left for split in tasks[n]))
    try:
        pool.run(
            sorted_runs.write_sorted_runs,
            ((settings, n, tasks[n]) for n in left),
            lambda _: progress.show(*pool.counters()),
        )
    finally:
        progress.close()


def read_summaries(settings: WriteSettings, tasks: int) -> list[TaskSummary]:
    return [sorted_runs.read_summary(settings, n) for n in range(tasks)]


def missing_summaries(settings: WriteSettings, tasks: int) -> list[int]:
    return [n for n in range(tasks) if not sorted_runs.summary_path(settings, n).is_file()]


def shard_counts(options: Options, dtype: np.dtype, summaries: list[TaskSummary]) -> ShardCounts:
    """Return the number of shards of each part: enough training shards, and none larger than allowed."""
    sizes = {part: dtype.itemsize * sum(summary.elements[part] for summary in summaries) for part in sorted_runs.PARTS}
    train, heldout = (-(-size // (options.shard_mb << 20)) for size in sizes.values())
    train = max(options.min_shards, train)
    if not options.heldout:
        return {"train": train}
    # Held-out shards have the same size limit as training shards. There is at least one.
    return {"train": train, "heldout": max(1, heldout, round(train * options.heldout))}


def merge_groups(settings: WriteSettings, reads: ShardReads, counts: ShardCounts, pool: Pool, part: Part) -> None:
    """Do a part of the merge, or what is left of it."""
    mine = reads.groups[part.number :: part.total]
    left = [group for group in mine if not merged_runs.group_path(settings, group.number).is_file()]
    tasks = [(settings, group, counts) for group in left]
    _run_with_bar("merging", "group", merged_runs.merge_runs, tasks, len(mine), pool)


def missing_groups(settings: WriteSettings, reads: ShardReads) -> list[int]:
    return [group.number for group in reads.groups if not merged_runs.group_path(settings, group.number).is_file()]


def write_shards(settings: WriteSettings, reads: ShardReads, counts: ShardCounts, pool: Pool, part: Part) -> None:
    """Do a part of the second pass, or what is left of it."""
    mine = all_shards(counts)[part.number :: part.total]
    left = [shard for shard in mine if not shard_writer.record_path(settings, *shard).is_file()]
    tasks = [(settings, reads.files, *shard, counts) for shard in left]
    _run_with_bar("writing", "shard", shard_writer.write_shard, tasks, len(mine), pool)


def all_shards(counts: ShardCounts) -> list[tuple[str, int]]:
    return [(part, number) for part, total in counts.items() for number in range(total)]


def missing_shards(settings: WriteSettings, counts: ShardCounts) -> list[str]:
    shards = all_shards(counts)
    return [shard_writer.shard_name(*s) for s in shards if not shard_writer.record_path(settings, *s).is_file()]


def _run_with_bar(
    title: str, unit: str, function: Callable[..., str], tasks: list[tuple], total: int, pool: Pool
) -> None:
    """Run tasks, which return the name of what they wrote, and show how many are done. total: with earlier ones."""
    progress = Progress(title, total, unit)
    progress.start_at(total - len(tasks))
    written = 0

    def show(name: str | None) -> None:
        nonlocal written
        written += name is not None
        progress.show(written)

    try:
        pool.run(function, tasks, show)
    finally:
        progress.close()
