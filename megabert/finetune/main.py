"""The whole of it: check everything, run the jobs, write the table."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from megabert.files.atomic import write_atomically
from megabert.files.lock import Lock, LockHeldError, acquire, acquire_read_write
from megabert.finetune.base_model import prepare
from megabert.finetune.jobs.job import TFIDF, Context, Job, Slot, plan_jobs, tokenizer_for
from megabert.finetune.jobs.runner import Runner
from megabert.finetune.options import Request
from megabert.finetune.protocol import MNLI, Protocol, read_protocol
from megabert.finetune.results.report import as_markdown, as_results, draw, summarize
from megabert.finetune.results.submission import write_submission
from megabert.finetune.tasks.readers import check_data, locate
from megabert.finetune.tasks.task import GLUE, Task, choose_tasks, read_task
from megabert.finetune.training import Place, build_model, uses_bf16
from megabert.kernels.resolve import local_devices, resolve

CLAIM = "glue.lock"  # in OUT; says who fine-tunes there
LEAVES_S = 2.0  # a command that was killed takes its jobs along


def run(request: Request) -> int:
    """Fine-tune and report. Returns 0, or 1 if a job failed or is lacking. Raises ValueError before any training for what cannot work."""
    tasks = chosen_tasks(request)
    protocol = read_protocol(request.protocol, tasks)
    part, parts = read_shard(request.shard)
    without_mnli = lacking_mnli(tasks, protocol, request.allow_no_mnli)
    folder = locate(request.data, tasks)
    out = Path(request.out)
    check_data(tasks, folder, request.submission)
    jobs = plan_jobs(tasks, protocol, request.baselines, request.submission)
    places = slots(request.workers, len(jobs))
    out.mkdir(parents=True, exist_ok=True)
    with alone(out, part if parts > 1 else None):
        # The parts of an array would write the same files at the same time: each has its own copy of the start.
        start = prepare(Path(request.checkpoint), out / (f"start-{part}" if parts > 1 else "start"))
        context = Context(out=out, data=folder, start=start, ops=request.ops)
        check_start(context, jobs, places)
        print(
            f"{len(jobs)} jobs: protocol {protocol.name}, checkpoint {request.checkpoint} (sha256 {start.sha256[:16]})"
        )
        runner = Runner(jobs, context, lambda line: print(line, flush=True))
        runner.run(places, lambda number: number % parts == part)
        if parts > 1:
            return report_part(runner, part, parts)
        runner.label(places)
        return report(request, tasks, protocol, without_mnli, runner)


@contextmanager
def alone(out: Path, part: int | None) -> Iterator[None]:
    """Have OUT for this command alone; a part of an array shares it with the others, and has its own start alone.

    Raises ValueError if another command is there.
    """
    claims: list[Lock] = []
    try:
        claims.append(acquire_read_write(out / CLAIM, exclusive=part is None, timeout_s=LEAVES_S))
        if part is not None:
            claims.append(acquire(out / f"start-{part}.lock", LEAVES_S))
        yield
    except LockHeldError as taken:
        died = "" if taken.is_local else f" If that machine died, remove {taken.path}."
        raise ValueError(
            f"{out}: process {taken.pid} on {taken.host} is fine-tuning there. Wait for it, end it, or choose another --out.{died}"
        ) from taken
    finally:
        for claim in claims:
            claim.release()


def check_start(context: Context, jobs: list[Job], places: list[Slot]) -> None:
    """Raise ValueError for a tokenizer, an encoder or operations that no job could use."""
    trained = [job for job in jobs if job.contender != TFIDF]
    if not trained:
        return
    job, cpu = trained[0], Place(torch.device("cpu"), "torch")
    model = build_model(context.start.folder, job.task, job.settings, cpu, job.seed)
    tokenizer_for(model, context.start.folder, job.settings)
    for device in dict.fromkeys(slot.device for slot in places):
        for bf16 in {uses_bf16(job.settings, device) for job in trained}:
            resolve(context.ops, device, model.config, bf16)


def report(request: Request, tasks: list[Task], protocol: Protocol, without_mnli: list[str], runner: Runner) -> int:
    """Write what came out, and print the table. Returns 1 if a job failed or is lacking, else 0."""
    context, jobs = runner.context, runner.jobs
    out = context.out
    summary = summarize(jobs, runner.results)
    results = as_results(request.checkpoint, context.start, protocol, without_mnli, summary)
    table = as_markdown(results, tasks)
    write_atomically(out / "results.json", json.dumps(results, indent=1).encode())
    write_atomically(out / "results.md", table.encode())
    draw(results, out / "results.png")
    print(f"\n{table}")
    if request.submission:
        lacking = write_submission(jobs, runner.results, context)
        if any(task.name in GLUE for task in tasks):
            lacks = f": lacks {', '.join(lacking)}, which the server wants too" if lacking else ""
            print(f"{out}/submission.zip{lacks}")
        if own := [task.name for task in tasks if task.name not in GLUE and task.test]:
            print(f"{out}/predictions: {', '.join(own)}")
    failed = [name for name, result in runner.results.items() if result["status"] == "failed"]
    if failed:
        print(
            f"{len(failed)} of {len(jobs)} jobs failed; the same command runs these again. Logs: {context.jobs}/NAME.log"
        )
    return 1 if len(runner.results) - len(failed) < len(jobs) else 0


def chosen_tasks(request: Request) -> list[Task]:
    """GLUE's by name, and the user's own by file. Raises ValueError for two of one name."""
    own = [read_task(Path(name.strip())) for name in request.task_file.split(",") if name.strip()]
    if request.task_file and not own:
        raise ValueError(f"--task-file {request.task_file}: names no file.")
    tasks = choose_tasks(request.tasks or ("" if own else "all")) + own
    if request.submission and not any(task.test for task in tasks):
        raise ValueError("--submission: none of these tasks has a test set; a task file names its own as test.")
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
    status = [
        runner.results.get(job.name, {}).get("status", "left (it waits for MNLI, or another command has it)")
        for job in mine
    ]
    print(f"part {part} of {parts}: " + ", ".join(f"{status.count(kind)} {kind}" for kind in dict.fromkeys(status)))
    return 1 if "failed" in status else 0
