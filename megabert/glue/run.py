"""The whole of it: check everything, run the jobs, write the table."""

import json
import os
import re
from pathlib import Path

import torch

from megabert.data.manifest import write_atomically
from megabert.glue.jobs import Context, Job, Runner, Slot, plan_jobs
from megabert.glue.protocol import MNLI, Protocol, read_protocol
from megabert.glue.readers import check_data, locate
from megabert.glue.report import as_markdown, as_results, draw, summarize
from megabert.glue.request import Request
from megabert.glue.starting import prepare
from megabert.glue.submission import write_submission
from megabert.glue.tasks import GLUE, Task, choose_tasks, read_task
from megabert.kernels.resolve import local_devices


def run(request: Request) -> int:
    """Fine-tune and report. Returns 0, or 1 if a job failed. Raises ValueError before any training for whatever cannot work."""
    protocol = read_protocol(request.protocol)
    tasks = chosen_tasks(request)
    part, parts = read_shard(request.shard)
    without_mnli = lacking_mnli(tasks, protocol, request.allow_no_mnli)
    folder = locate(request.data, tasks)
    out = Path(request.out)
    check_data(tasks, folder, request.submission)
    # The parts of an array would write the same files at the same time: each has its own copy of the start.
    start = prepare(Path(request.checkpoint), out / (f"start-{part}" if parts > 1 else "start"))
    context = Context(out=out, data=folder, start=start, ops=request.ops)
    jobs = plan_jobs(tasks, protocol, request.baselines, request.submission)
    print(f"{len(jobs)} jobs: protocol {protocol.name}, checkpoint {request.checkpoint} (sha256 {start.sha256[:16]})")
    runner = Runner(jobs, context, lambda line: print(line, flush=True))
    runner.run(slots(request.workers, len(jobs)), lambda number: number % parts == part)
    if parts > 1:
        return report_part(runner, part, parts)
    summary = summarize(jobs, runner.results)
    results = as_results(request.checkpoint, start, protocol, without_mnli, summary)
    table = as_markdown(results, tasks)
    write_atomically(out / "results.json", json.dumps(results, indent=1).encode())
    write_atomically(out / "results.md", table.encode())
    draw(results, out / "results.png")
    print(f"\n{table}")
    if request.submission:
        lacking = write_submission(jobs, runner.results, context)
        print(
            f"{out}/submission.zip" + (f": lacks {', '.join(lacking)}, which the server wants too" if lacking else "")
        )
    failed = [name for name, result in runner.results.items() if result["status"] == "failed"]
    if failed:
        print(
            f"{len(failed)} of {len(jobs)} jobs failed; the same command runs these again. Logs: {context.jobs}/NAME.log"
        )
    return 1 if failed else 0


def chosen_tasks(request: Request) -> list[Task]:
    """GLUE's by name, and the user's own by file. Raises ValueError for two of one name."""
    own = [read_task(Path(name.strip())) for name in request.task_file.split(",") if name.strip()]
    tasks = choose_tasks(request.tasks or ("" if own else "all")) + own
    if not tasks:
        raise ValueError(f"--tasks {request.tasks}: names no task; expected all, or some of {', '.join(GLUE)}.")
    if "ax" in (names := [task.name for task in tasks]) and not (MNLI in names and request.submission):
        raise ValueError("--tasks ax: it has only a test set, which MNLI's model labels. Add mnli, and --submission.")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--task-file: two tasks have the name {min(twice)}.")
    return tasks


def lacking_mnli(tasks: list[Task], protocol: Protocol, allowed: bool) -> list[str]:
    """The tasks that should start from MNLI's encoder and cannot. Raises ValueError if there are any, unless it is allowed."""
    if any(task.name == MNLI for task in tasks):
        return []
    lacking = [task.name for task in tasks if protocol.plan(task).start == MNLI]
    if lacking and not allowed:
        raise ValueError(
            f"protocol {protocol.name}: {', '.join(lacking)} start from the encoder that MNLI left, and mnli is not among the tasks: "
            "scores would be far lower (RTE by some 20 points). Add mnli, or say --allow-no-mnli; the table will then say so."
        )
    return lacking


def read_shard(shard: str) -> tuple[int, int]:
    """3/8 -> (3, 8). Raises ValueError for anything else."""
    if not shard:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shard {shard}: expected PART/PARTS, such as 0/8 to 7/8.")
    return int(match[1]), int(match[2])


def slots(workers: int, num_jobs: int) -> list[Slot]:
    """One per GPU; without one, one per core, for small models gain more from that than from threads."""
    devices = local_devices()
    cores = len(os.sched_getaffinity(0))
    if workers < 0:
        raise ValueError(f"--workers is {workers}, expected 0 (one per GPU or core) or more.")
    count = max(1, min(workers or (cores if devices[0] == torch.device("cpu") else len(devices)), num_jobs))
    return [Slot(devices[number % len(devices)], max(1, cores // count)) for number in range(count)]


def report_part(runner: Runner, part: int, parts: int) -> int:
    """Say what a part of an array did; the table comes from a run without --shard, when all are done."""
    mine: list[Job] = [job for number, job in enumerate(runner.jobs) if number % parts == part]
    status = [runner.results.get(job.name, {}).get("status", "waits for MNLI") for job in mine]
    print(f"part {part} of {parts}: " + ", ".join(f"{status.count(kind)} {kind}" for kind in dict.fromkeys(status)))
    return 1 if "failed" in status else 0
