"""Divide the work of write_shards.py into steps and parts that separate machines run on one shared folder.

--step plan lists the source and writes .work/plan.jsonl; runs, merge and shards each consist of any number of equal
parts, --task 0/N to (N-1)/N, which may run at the same time; finish writes the manifest. Each command may be repeated:
what is done stays done. The result has the same bytes as that of one command.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from data_prep import output_folder
from data_prep.finished import read_result_of
from data_prep.request_file import request_hash
from data_prep.sources import LeftOut, source_state
from data_prep.sources.base import InputSplit
from data_prep.sources.tokens.ids import IdRule
from data_prep.workers import WorkerPool
from data_prep.writing import passes
from data_prep.writing.merged_runs import ShardCounts, ShardReads, plan_reads
from data_prep.writing.passes import Part
from data_prep.writing.shard_options import Options, ShardRequest, resolve_request, what_is_asked
from data_prep.writing.sorted_runs import TaskSummary
from megabert.data.shards.manifest import MANIFEST
from megabert.data.shards.tokenizer import find_tokenizer
from megabert.files.atomic import write_atomically

# A message names at most this many missing parts.
SHOWN = 3
# The keys of the plan's first line, and of every other.
HEADER, TASK = {"format", "asked", "request", "tasks", "ids", "left_out"}, {"splits", "state"}


class ShardPlan(NamedTuple):
    """A request, and the number of tasks of its first pass."""

    request: ShardRequest
    tasks: int


class FirstPass(NamedTuple):
    """What follows from the summaries of the first pass."""

    summaries: list[TaskSummary]
    counts: ShardCounts
    reads: ShardReads


def plan_path(out: Path) -> Path:
    return out / ".work" / output_folder.PLAN


def write_plan(options: Options) -> None:
    """List the source and write the plan. Work of the same request is kept, other work removed."""
    request = resolve_request(options)
    out = Path(options.out)
    if _is_written(out, request.request_hash):
        return
    output_folder.check_replaceable(out, request.request_hash, options.replace)
    tasks = passes.group_into_tasks(request.splits)
    header = {
        "format": output_folder.WORK_FORMAT,
        "asked": _hash_of(options),
        "request": request.request_hash,
        "tasks": len(tasks),
        "ids": request.ids,
        "left_out": asdict(request.left_out),
    }
    lines = [header, *({"splits": task, "state": source_state(task)} for task in tasks)]
    with output_folder.opened_work_folder(out, request.request_hash, options.replace):
        write_atomically(plan_path(out), "".join(json.dumps(line) + "\n" for line in lines).encode())
    print(f"{out}: planned, {len(tasks):,} tasks in step runs; up to as many parts (--task 0/N) make it faster")


def is_finished(options: Options) -> bool:
    """Return whether the shards are finished, so that a step that is repeated has nothing left to do."""
    out = Path(options.out)
    if not (out / MANIFEST).is_file():
        return False
    has_plan = plan_path(out).is_file()
    request = read_plan(options).request if has_plan else resolve_request(options)
    return _is_written(out, request.request_hash)


def do_part(options: Options) -> None:
    """Do one part of the step runs, merge or shards."""
    plan = read_plan(options)
    number, total = map(int, options.task.split("/"))
    part, settings = Part(number, total), plan.request.settings
    with WorkerPool(options.workers) as pool:
        if options.step == "runs":
            try:
                passes.write_sorted_runs(settings, dict(_tasks_of(options, part)), pool)
            except ValueError:
                # A file that something writes to looks damaged. If it was changed, this says so.
                dict(_tasks_of(options, part))
                raise
            # The state is compared once more, because the files may have been changed while they were read.
            dict(_tasks_of(options, part))
        else:
            first = read_first_pass(plan)
            if options.step == "merge":
                passes.merge_groups(settings, first.reads, first.counts, pool, part)
            else:
                check_merged(plan, first)
                passes.write_shards(settings, first.reads, first.counts, pool, part)
    print(f"{options.out}: step {options.step}, part {options.task}: done")


def read_plan(options: Options) -> ShardPlan:
    """Read the plan. Raises ValueError if there is none, or if it is one for other options."""
    path = plan_path(Path(options.out))
    try:
        with open(path) as file:
            header = _parse_line(path, file.readline(), HEADER)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file. Run the same command with --step plan first.") from error
    if header["format"] != output_folder.WORK_FORMAT:
        raise _unreadable(path)
    if header["asked"] != _hash_of(options):
        raise ValueError(
            f"{path}: is for another source, tokenizer or other settings. Give every step the same, or run --step plan "
            "again."
        )
    tokenizer_path, tokenizer = find_tokenizer(options.tokenizer) if options.tokenizer else (None, None)
    ids = IdRule(header["ids"][0], tuple(header["ids"][1]), header["ids"][2]) if header["ids"] else None
    left_out = LeftOut(**header["left_out"])
    request = ShardRequest(options, [], tokenizer_path, tokenizer, ids, header["request"], left_out)
    return ShardPlan(request, header["tasks"])


def read_first_pass(plan: ShardPlan) -> FirstPass:
    """Raise ValueError if a task of the first pass is not done."""
    settings = plan.request.settings
    _check_none_missing(settings.out, "runs", passes.missing_summaries(settings, plan.tasks))
    summaries = passes.read_summaries(settings, plan.tasks)
    counts = passes.shard_counts(plan.request.options, settings.dtype, summaries)
    return FirstPass(summaries, counts, plan_reads(settings, summaries, counts))


def check_merged(plan: ShardPlan, first: FirstPass) -> None:
    """Raise ValueError if a group is not merged."""
    settings = plan.request.settings
    _check_none_missing(settings.out, "merge", passes.missing_groups(settings, first.reads))


def check_shards(plan: ShardPlan, counts: ShardCounts) -> None:
    """Raise ValueError if a shard is not written."""
    settings = plan.request.settings
    _check_none_missing(settings.out, "shards", passes.missing_shards(settings, counts))


def splits_of_plan(out: Path) -> Iterator[InputSplit]:
    for line in _lines_of(out):
        yield from _splits_of(line)


def _is_written(out: Path, request: str) -> bool:
    """Return whether the folder holds the shards of a request, and remove what a killed finish left beside them."""
    if read_result_of(out, request) is None:
        return False
    output_folder.remove_finished_work(out)
    print(f"{out / MANIFEST}: already written from this source with these settings")
    return True


def _tasks_of(options: Options, part: Part) -> Iterator[tuple[int, list[InputSplit]]]:
    """Yield the tasks of a part. Raises ValueError if a file of them was changed since the plan was made."""
    for number, line in enumerate(_lines_of(Path(options.out))):
        if number % part.total == part.number:
            splits = _splits_of(line)
            if json.loads(json.dumps(source_state(splits))) != line["state"]:
                raise ValueError(
                    f"{options.source}: was changed after the plan was made (such as {splits[0].paths[0]}), or this "
                    "machine sees other files. Run --step plan again."
                )
            yield number, splits


def _lines_of(out: Path) -> Iterator[dict[str, Any]]:
    path = plan_path(out)
    with open(path) as file:
        next(file)
        for line in file:
            yield _parse_line(path, line, TASK)


def _parse_line(path: Path, line: str, keys: set[str]) -> dict[str, Any]:
    try:
        parsed: Any = json.loads(line)
    except ValueError as error:
        raise _unreadable(path) from error
    if not isinstance(parsed, dict) or parsed.keys() != keys:
        raise _unreadable(path)
    return parsed


def _unreadable(path: Path) -> ValueError:
    return ValueError(f"{path}: is damaged, or another version of MegaBERT wrote it. Run --step plan again.")


def _splits_of(line: dict[str, Any]) -> list[InputSplit]:
    return [InputSplit(kind, tuple(paths), *numbers) for kind, paths, *numbers in line["splits"]]


def _hash_of(options: Options) -> str:
    tokenizer = find_tokenizer(options.tokenizer)[1] if options.tokenizer else None
    return request_hash(options=what_is_asked(options), tokenizer=tokenizer and asdict(tokenizer))


def _check_none_missing(out: Path, step: str, missing: Sequence[object]) -> None:
    if missing:
        shown = ", ".join(map(str, missing[:SHOWN])) + (", ..." if len(missing) > SHOWN else "")
        raise ValueError(
            f"{out}: {len(missing):,} results of step {step} are missing ({shown}). Run --step {step} again for all "
            "parts; what is done stays done."
        )
