"""Check all inputs of the fine-tuning command, run its jobs, and report the results."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

from megabert.files.atomic import write_atomically
from megabert.files.lock import LockHeldError, acquire, acquire_read_write
from megabert.finetune.base_model import prepare_base_model
from megabert.finetune.jobs.job import TFIDF, FinetuneJob, JobContext, WorkerSlot, plan_jobs, tokenizer_for
from megabert.finetune.jobs.runner import Runner, best_jobs, is_done
from megabert.finetune.options import FinetuneOptions
from megabert.finetune.protocol import MNLI, Protocol, read_protocol
from megabert.finetune.results.kept_models import check_model_folders, export_model, is_exportable, model_folder
from megabert.finetune.results.report import as_markdown, as_results, plot_scores, summarize, write_results
from megabert.finetune.results.submission import write_submission
from megabert.finetune.tasks.readers import check_data, locate_data
from megabert.finetune.tasks.task import GLUE, Task, glue_tasks, read_task
from megabert.finetune.training import Backend, build_model, uses_bf16
from megabert.kernels.devices import local_devices, why_gpu_is_unused
from megabert.kernels.resolve import resolve

# The name of the lock file in OUT.
LOCK = "glue.lock"
# The jobs of a killed command end within this time.
LOCK_TIMEOUT_S = 2.0


def run_finetuning(options: FinetuneOptions) -> int:
    """Fine-tune and report. Returns 0, or 1 if a job failed or did not run.

    Raises ValueError, before any training, for inputs that cannot work.
    """
    tasks = selected_tasks(options)
    protocol = read_protocol(options.protocol, tasks)
    part, parts = parse_shard(options.shard)
    without_mnli = tasks_without_mnli(tasks, protocol, options.allow_no_mnli)
    folder = locate_data(options.data, tasks)
    out = Path(options.out)
    check_data(tasks, folder, options.submission)
    jobs = plan_jobs(tasks, protocol, options.baselines, options.submission, options.keep_models)
    if options.keep_models:
        check_model_folders(out, tasks)
    slots = worker_slots(options.workers, len(jobs))
    out.mkdir(parents=True, exist_ok=True)
    with lock_output(out, part if parts > 1 else None):
        # Each part of an array has its own base model: they would write the same files at the same time.
        name = f"start-{part}" if parts > 1 else "start"
        base = prepare_base_model(Path(options.checkpoint), out / name)
        context = JobContext(out=out, data=folder, base=base, ops=options.ops)
        check_base_model(context, jobs, slots)
        print(
            f"{len(jobs)} jobs: protocol {protocol.name}, checkpoint {options.checkpoint} (sha256 {base.sha256[:16]})"
        )
        runner = Runner(jobs, context, lambda line: print(line, flush=True))
        runner.run(slots, lambda index: index % parts == part)
        if parts > 1:
            return report_part(runner, part, parts)
        runner.remove_models()
        runner.complete_best(slots, lambda job, result: is_exportable(context, job, result))
        code = report(options, tasks, protocol, without_mnli, runner)
        export_best_models(runner)
        return code


@contextmanager
def lock_output(out: Path, part: int | None) -> Iterator[None]:
    """Lock OUT for this command; parts of an array share it, and each locks its base model.

    Raises ValueError if another command holds the lock.
    """
    with ExitStack() as stack:
        try:
            shared = acquire_read_write(out / LOCK, exclusive=part is None, timeout_s=LOCK_TIMEOUT_S)
            stack.callback(shared.release)
            if part is not None:
                stack.callback(acquire(out / f"start-{part}.lock", LOCK_TIMEOUT_S).release)
        except LockHeldError as error:
            died = "" if error.is_local else f" If that machine died, remove {error.path}."
            raise ValueError(
                f"{out}: process {error.pid} on {error.host} is fine-tuning there. Wait for it, end it, or choose "
                f"another --out.{died}"
            ) from error
        yield


def check_base_model(context: JobContext, jobs: list[FinetuneJob], slots: list[WorkerSlot]) -> None:
    """Raise ValueError for a tokenizer, an encoder or operations that no job could use."""
    neural = [job for job in jobs if job.contender != TFIDF]
    if not neural:
        return
    job, backend = neural[0], Backend(torch.device("cpu"), "torch")
    model = build_model(context.base.folder, job.task, job.settings, backend, job.seed)
    tokenizer_for(model, context.base.folder, job.settings)
    for device in dict.fromkeys(slot.device for slot in slots):
        for bf16 in {uses_bf16(job.settings, device) for job in neural}:
            resolve(context.ops, device, model.config, bf16)


def report(
    options: FinetuneOptions, tasks: list[Task], protocol: Protocol, without_mnli: list[str], runner: Runner
) -> int:
    """Write the results and print the table. Returns 1 if a job failed or did not run, else 0."""
    context, jobs = runner.context, runner.jobs
    out = context.out
    summary = summarize(jobs, runner.results)
    results = as_results(options.checkpoint, context.base, protocol, without_mnli, summary)
    table = as_markdown(results, tasks)
    write_results(out / "results.json", results)
    write_atomically(out / "results.md", table.encode())
    plot_scores(results, out / "results.png")
    print(f"\n{table}")
    if options.submission:
        report_submission(tasks, runner)
    failed = [name for name, result in runner.results.items() if result["status"] == "failed"]
    if failed:
        print(f"{len(failed)} of {len(jobs)} jobs failed; the same command runs them again.", end=" ")
        print(f"Logs: {context.jobs}/NAME.log")
    return 1 if len(runner.results) - len(failed) < len(jobs) else 0


def report_submission(tasks: list[Task], runner: Runner) -> None:
    """Write the predictions on the test sets, and print where they are."""
    out = runner.context.out
    missing = write_submission(runner.jobs, runner.results, runner.context)
    if any(task.name in GLUE for task in tasks):
        incomplete = f": lacks {', '.join(missing)}, which the server also requires" if missing else ""
        print(f"{out}/submission.zip{incomplete}")
    if own := [task.name for task in tasks if task.name not in GLUE and task.test]:
        print(f"{out}/predictions: {', '.join(own)}")


def export_best_models(runner: Runner) -> None:
    """Export the model of each task's best job, if asked for, and print where it is and what the check measured."""
    out, done = runner.context.out, [job for job in runner.jobs if is_done(runner.results, job)]
    for job in [job for job in best_jobs(runner.jobs, runner.results) if job.is_exported]:
        result = runner.results[job.name]
        count = sum((other.task, other.contender) == (job.task, job.contender) for other in done)
        measured = export_model(runner.context, job, result, count)
        if not job.keep_model:
            shutil.rmtree(runner.context.jobs / job.name, ignore_errors=True)
        print(
            f"{model_folder(out, job.task)}: {job.name}, the best of {count} by its score {100 * result['score']:.2f}; "
            f"loads in transformers {measured['transformers']} without megabert, logits differ by at most "
            f"{measured['max_difference']:.1e}"
        )


def report_part(runner: Runner, part: int, parts: int) -> int:
    """Print what one part of an array did. Returns 1 if a job failed, else 0.

    The table is written by a command without --shard, when all parts are done.
    """
    other = "not run (waits for MNLI, or another command runs it)"
    jobs = [job for index, job in enumerate(runner.jobs) if index % parts == part]
    status = [runner.results.get(job.name, {}).get("status", other) for job in jobs]
    print(f"part {part} of {parts}: " + ", ".join(f"{status.count(kind)} {kind}" for kind in dict.fromkeys(status)))
    return 1 if "failed" in status else 0


def selected_tasks(options: FinetuneOptions) -> list[Task]:
    """Return GLUE's tasks by name and the user's by file. Raises ValueError for two tasks of one name."""
    own = [read_task(Path(name.strip())) for name in options.task_file.split(",") if name.strip()]
    if options.task_file and not own:
        raise ValueError(f"--task-file {options.task_file}: names no file.")
    tasks = glue_tasks(options.tasks or ("" if own else "all")) + own
    if options.submission and not any(task.test for task in tasks):
        raise ValueError("--submission: none of these tasks has a test set; a task file names its test set under test.")
    if "ax" in (names := [task.name for task in tasks]) and not (MNLI in names and options.submission):
        raise ValueError("--tasks ax: it has only a test set, which MNLI's model labels. Add mnli, and --submission.")
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--task-file: two tasks have the name {min(twice)}.")
    return tasks


def tasks_without_mnli(tasks: list[Task], protocol: Protocol, allowed: bool) -> list[str]:
    """Return the tasks that should start from MNLI's encoder, if MNLI is not among the tasks.

    Raises ValueError if there are any and this is not allowed.
    """
    if any(task.name == MNLI for task in tasks):
        return []
    names = [task.name for task in tasks if protocol.plan_for(task).start == MNLI]
    if names and not allowed:
        raise ValueError(
            f"protocol {protocol.name}: {', '.join(names)} start from the encoder that was fine-tuned on MNLI, and "
            "mnli is not among the tasks: scores would be far lower (RTE by some 20 points). Add mnli, or pass "
            "--allow-no-mnli, which the table will mention."
        )
    return names


def parse_shard(shard: str) -> tuple[int, int]:
    """Parse PART/PARTS: 3/8 -> (3, 8), and nothing -> (0, 1). Raises ValueError for anything else."""
    if not shard:
        return 0, 1
    match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", shard)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(f"--shard {shard}: expected PART/PARTS, such as 0/8 to 7/8.")
    return int(match[1]), int(match[2])


def worker_slots(workers: int, num_jobs: int) -> list[WorkerSlot]:
    """Return a slot per GPU; without one, a slot per core: small models gain more from that than from threads."""
    devices = local_devices()
    if problem := why_gpu_is_unused():
        print(f"fine-tuning on the CPU: {problem}", flush=True)
    cores = len(os.sched_getaffinity(0))
    default = cores if devices[0] == torch.device("cpu") else len(devices)
    count = max(1, min(workers or default, num_jobs))
    return [WorkerSlot(devices[index % len(devices)], max(1, cores // count)) for index in range(count)]
