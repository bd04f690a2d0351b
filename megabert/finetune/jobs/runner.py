"""Run fine-tuning jobs in parallel processes, and reuse the results of jobs that are done already."""

import multiprocessing
import multiprocessing.connection
import os
import shutil
import sys
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from megabert.files.hashing import file_sha256
from megabert.files.lock import LockHeldError, acquire
from megabert.finetune.base_model import fingerprint
from megabert.finetune.jobs.job import (
    PRETRAINED,
    FinetuneJob,
    JobContext,
    WorkerSlot,
    label_with_kept_model,
    run_job,
)
from megabert.finetune.record import read_record, write_record
from megabert.finetune.tasks.readers import file_hashes
from megabert.kernels.devices import make_current
from megabert.process.exit_codes import EXIT_BUSY
from megabert.process.subprocesses import exit_with_parent, use_short_socket_paths, why_ended

# Of OUT/jobs/NAME.json. A job whose file has another version is run again.
FORMAT_VERSION = 2

Result = dict[str, Any]


class Runner:
    """Runs the jobs of one command.

    results: name of a job that ended -> its result; data_hashes: task -> hashes of its training and evaluation files;
    test_hashes: name of a job -> hashes of the test sets that it labels.
    """

    def __init__(self, jobs: list[FinetuneJob], context: JobContext, log: Callable[[str], None]):
        self.jobs, self.context, self.log = jobs, context, log
        self.results: dict[str, Result] = {}
        self.logged: set[str] = set()
        self.data_hashes = {
            job.task.name: file_hashes(job.task, context.data, ["train", *job.task.dev.values()]) for job in jobs
        }
        tasks = {(task.name, split): task for job in jobs for task, split in job.test_sets}
        hashes = {key: file_hashes(task, context.data, [key[1]]) for key, task in tasks.items()}
        self.test_hashes = {
            job.name: {f"{task.name}/{split}": hashes[task.name, split] for task, split in job.test_sets}
            for job in jobs
        }
        context.jobs.mkdir(parents=True, exist_ok=True)

    def run(self, slots: list[WorkerSlot], selected: Callable[[int], bool] = lambda index: True) -> None:
        """Run the selected jobs that are not done, one per slot at a time; of the others, only use stored results."""
        for job in self.jobs:
            self._reuse_result(job)
        pending = [job for index, job in enumerate(self.jobs) if selected(index) and job.name not in self.results]
        self._run_jobs(pending, slots, self._reuse_result)

    def complete_best(self, slots: list[WorkerSlot], is_complete: Callable[[FinetuneJob, Result], bool]) -> None:
        """Run each task's best job again if its predictions on the test sets are missing, or if it is not complete.

        Predictions are missing if the job ran before --submission was given, a test set changed, or their file is lost.
        A job that kept its model only predicts; others train again. Then another job may be best, so this repeats.
        """

        def is_whole(job: FinetuneJob) -> bool:
            return self._has_test_labels(job) and is_complete(job, self.results[job.name])

        while incomplete := [job for job in best_jobs(self.jobs, self.results) if not is_whole(job)]:
            for job in incomplete:
                del self.results[job.name]
            self._run_jobs(incomplete, slots, lambda job: False)

    def remove_models(self) -> None:
        """Remove the models that jobs saved for export, except those of each task's best job so far."""
        best = [job.name for job in best_jobs(self.jobs, self.results)]
        for job in self.jobs:
            if job.is_exported and not job.keep_model and job.name in self.results and job.name not in best:
                shutil.rmtree(self.context.jobs / job.name, ignore_errors=True)

    def _run_jobs(
        self, pending: list[FinetuneJob], slots: list[WorkerSlot], reuse_result: Callable[[FinetuneJob], bool]
    ) -> None:
        """Run jobs in processes. reuse_result: called before a job starts, which another command may have run."""
        free, pending = list(slots), list(pending)
        running: dict[Any, tuple[FinetuneJob, ForkServerProcess, WorkerSlot]] = {}
        try:
            while pending or running:
                for job in list(pending):
                    if not free:
                        break
                    start = self._start_model(job)
                    if start is None:
                        continue
                    pending.remove(job)
                    if reuse_result(job) or self._fail_without_mnli(job):
                        continue
                    slot = free.pop(0)
                    process = start_process(job, self.context, slot, start[0], self._request(job, start[1]))
                    running[process.sentinel] = (job, process, slot)
                if not running:
                    # The pending jobs wait for jobs of other commands.
                    break
                for sentinel in multiprocessing.connection.wait(list(running)):
                    job, process, slot = running.pop(sentinel)
                    process.join()
                    free.append(slot)
                    self._record_result(job, process.exitcode)
        finally:
            for _, process, _ in running.values():
                process.kill()
                process.join()

    def _mnli_jobs(self) -> list[FinetuneJob]:
        return [job for job in self.jobs if job.keep_model]

    def _start_model(self, job: FinetuneJob) -> tuple[Path, str] | None:
        """Return folder and hash of the model that a job starts from; None while MNLI's jobs are not all done."""
        if not job.from_mnli:
            return self.context.base
        ended = {other.name: self.results.get(other.name) for other in self._mnli_jobs()}
        if any(result is None for result in ended.values()):
            return None
        done = [(result["score"], name) for name, result in ended.items() if result and result["status"] == "done"]
        if not done:
            return self.context.base.folder, "none"
        _, name = max(done)
        return self.context.jobs / name, self.results[name]["model"]

    def _request(self, job: FinetuneJob, start_sha256: str) -> dict[str, Any]:
        """Return everything that determines a job's result. A stored result with another request is not reused."""
        return {
            "training": job.identity,
            "start": start_sha256,
            "data": self.data_hashes[job.task.name],
            "ops": self.context.ops,
            "labelling": self.test_hashes[job.name],
        }

    def _log_once(self, line: str) -> None:
        if line not in self.logged:
            self.logged.add(line)
            self.log(line)

    def _reuse_result(self, job: FinetuneJob) -> bool:
        """Use the stored result of a job, if its training was the same and a model that others start from is intact."""
        start = self._start_model(job)
        result = read_result(self.context, job, self._log_once)
        if start is None or result is None or not is_same_training(result, self._request(job, start[1])):
            return False
        others_start_here = job.keep_model and any(other.from_mnli for other in self.jobs)
        if others_start_here and not kept_model_is_intact(self.context.jobs / job.name, result):
            self._log_once(
                f"{self.context.jobs / job.name}: the model there is missing or was changed. The job runs again."
            )
            return False
        self.results[job.name] = result | {"score": job.score(result["scores"])}
        return True

    def _has_test_labels(self, job: FinetuneJob) -> bool:
        """Return whether a job that is done labelled the present test sets, if it has any, and its file is intact."""
        if not job.test_sets:
            return True
        result, path = self.results[job.name], self.context.jobs / f"{job.name}.npz"
        if result["request"]["labelling"] != self.test_hashes[job.name]:
            return False
        if path.is_file() and file_sha256(path) == result["labels_sha256"]:
            return True
        self._log_once(f"{path}: the predictions there are missing or were changed. The job runs again.")
        return False

    def _fail_without_mnli(self, job: FinetuneJob) -> bool:
        if not job.from_mnli or any(self.results[other.name]["status"] == "done" for other in self._mnli_jobs()):
            return False
        self._record_failure(job, "MNLI failed, whose model it starts from")
        return True

    def _record_result(self, job: FinetuneJob, exitcode: int | None) -> None:
        """Record how the process of a job ended."""
        result = read_result(self.context, job, self._log_once)
        if exitcode == 0 and result is not None:
            self.results[job.name] = result | {"score": job.score(result["scores"])}
            scores = ", ".join(f"{name} {value:.4f}" for name, value in result["scores"].items())
            self.log(f"{job.name}: {scores} ({result['seconds']:.0f} s)")
            self.remove_models()
        elif exitcode == EXIT_BUSY:
            self.log(f"{job.name}: another command is running it")
        else:
            path = self.context.jobs / f"{job.name}.log"
            output = path.read_text(errors="replace") if path.is_file() else ""
            self._record_failure(job, why_ended(exitcode, output))

    def _record_failure(self, job: FinetuneJob, reason: str) -> None:
        result = {"status": "failed", "error": reason}
        write_result(self.context, job, result)
        self.results[job.name] = result
        self.log(f"{job.name}: FAILED: {reason}")


def write_result(context: JobContext, job: FinetuneJob, result: Result) -> None:
    write_record(result_path(context, job), result, FORMAT_VERSION)


def result_path(context: JobContext, job: FinetuneJob) -> Path:
    return context.jobs / f"{job.name}.json"


def read_result(context: JobContext, job: FinetuneJob, log: Callable[[str], None]) -> Result | None:
    """Return the stored result of a job that is done, or None if there is none.

    log: called with the reason if a file is unusable.
    """
    try:
        result = read_record(result_path(context, job), FORMAT_VERSION)
    except FileNotFoundError:
        return None
    except ValueError as error:
        log(f"{error} It does not count, and the job runs again.")
        return None
    return result if result.get("status") == "done" else None


def is_same_training(result: Result, request: dict[str, Any]) -> bool:
    """Return whether a stored result is of the requested training and scores, whichever test sets it labelled."""
    stored = result["request"]
    return isinstance(stored, dict) and stored | {"labelling": None} == request | {"labelling": None}


def kept_model_is_intact(folder: Path, result: Result) -> bool:
    """Return whether the model that a job kept in a folder is the one that its result records."""
    try:
        return fingerprint(folder) == result.get("model")
    except (OSError, ValueError):
        return False


def best_jobs(jobs: list[FinetuneJob], results: dict[str, Result]) -> list[FinetuneJob]:
    """Return, for each task, the job with the best score on the evaluation sets; of equal ones the first."""
    best: dict[str, FinetuneJob] = {}
    for job in jobs:
        if job.contender == PRETRAINED and is_done(results, job):
            best_so_far = best.setdefault(job.task.name, job)
            if results[job.name]["score"] > results[best_so_far.name]["score"]:
                best[job.task.name] = job
    return list(best.values())


def is_done(results: dict[str, Result], job: FinetuneJob) -> bool:
    return results.get(job.name, {}).get("status") == "done"


def start_process(
    job: FinetuneJob, context: JobContext, slot: WorkerSlot, start: Path, request: dict[str, Any]
) -> ForkServerProcess:
    """Start the process of a job."""
    use_short_socket_paths()
    processes = multiprocessing.get_context("forkserver")
    # Importing torch takes seconds: the server does it once for all jobs.
    processes.set_forkserver_preload([__name__])
    process = processes.Process(target=job_process, args=(job, context, slot, start, request))
    process.start()
    return process


def job_process(job: FinetuneJob, context: JobContext, slot: WorkerSlot, start: Path, request: dict[str, Any]) -> None:
    """Run a job in a process of its own, with its output in the job's log."""
    exit_with_parent()
    output = os.open(context.jobs / f"{job.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        lock = acquire(context.jobs / f"{job.name}.lock")
    except LockHeldError:
        sys.exit(EXIT_BUSY)
    # The log is emptied only now: until then it may be that of another command's process.
    os.ftruncate(output, 0)
    torch.set_num_threads(slot.threads)
    run_and_write(job, context, slot, start, request)
    lock.release()


def run_and_write(
    job: FinetuneJob, context: JobContext, slot: WorkerSlot, start: Path, request: dict[str, Any]
) -> None:
    """Run a job and write its result; if it kept the model of this very training, only label the test sets again."""
    make_current(slot.device)
    stored = read_result(context, job, print) if job.saves_model else None
    if stored and is_same_training(stored, request) and kept_model_is_intact(context.jobs / job.name, stored):
        result = stored | label_with_kept_model(job, context, slot)
    else:
        result = run_job(job, context, slot, start)
    check_data_is_the_same(job, context.data, request)
    write_result(context, job, result | {"request": request, "status": "done"})


def check_data_is_the_same(job: FinetuneJob, folder: Path, request: dict[str, Any]) -> None:
    """Raise ValueError if a data file of the job changed after its hash was taken."""
    data = file_hashes(job.task, folder, ["train", *job.task.dev.values()])
    tests = {f"{task.name}/{split}": file_hashes(task, folder, [split]) for task, split in job.test_sets}
    if (data, tests) != (request["data"], request["labelling"]):
        raise ValueError(f"{folder}: files of {job.task.name} were changed while the command ran. Run it again.")
