"""Run jobs in processes, side by side, and again only where what they left is not there or not of the same request."""

import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megabert.files.atomic import write_atomically
from megabert.files.hashing import file_sha256
from megabert.files.lock import LockHeldError, acquire
from megabert.finetune.base_model import fingerprint
from megabert.finetune.jobs.job import PRETRAINED, Context, Job, Slot, label_again, run_job
from megabert.finetune.tasks.readers import file_hashes

BUSY = 75  # exit code of a job that another command is running: EX_TEMPFAIL


class Runner:
    """results: of the jobs that ended, by name; data, labelling: hashes of the files of each task, and of each job's test sets."""

    def __init__(self, jobs: list[Job], context: Context, say: Callable[[str], None]):
        self.jobs, self.context, self.say = jobs, context, say
        self.results: dict[str, dict[str, Any]] = {}
        hashes = {job.task.name: file_hashes(job.task, context.data, ["train", *job.task.dev.values()]) for job in jobs}
        sets = {(task.name, split): task for job in jobs for task, split in job.unlabelled}
        tests = {key: file_hashes(task, context.data, [key[1]]) for key, task in sets.items()}
        self.data = hashes
        self.labelling = {
            job.name: {f"{task.name}/{split}": tests[task.name, split] for task, split in job.unlabelled}
            for job in jobs
        }
        context.jobs.mkdir(parents=True, exist_ok=True)

    def run(self, slots: list[Slot], mine: Callable[[int], bool] = lambda number: True) -> None:
        """Run what is not done, one job per slot at a time; jobs of others (not mine) only count if they are done."""
        for job in self.jobs:
            self._reuse(job)
        left = [job for number, job in enumerate(self.jobs) if mine(number) and job.name not in self.results]
        self._run(left, slots, self._reuse)

    def label(self, slots: list[Slot]) -> None:
        """See that each task's best job has labelled the test sets as they are now; where not, run that one again.

        It trains again, unless its model was kept. A job that labels another way was done before this was asked for, or before
        a test set changed, or its file is lost.
        """
        while again := [job for job in best_jobs(self.jobs, self.results) if not self._has_labels(job)]:
            for job in again:
                del self.results[job.name]
            self._run(again, slots, lambda job: False)

    def _run(self, pending: list[Job], slots: list[Slot], is_done: Callable[[Job], bool]) -> None:
        """is_done: asked before a job starts, for another command may have done it meanwhile."""
        free = list(slots)
        running: dict[Any, tuple[Job, Any, Slot]] = {}
        processes = multiprocessing.get_context("forkserver")
        processes.set_forkserver_preload([__name__])  # importing torch takes seconds: once, not in every job
        try:
            while pending or running:
                for job in list(pending):
                    if not free:
                        break
                    ready = self._ready(job)
                    if ready is None:
                        continue
                    pending.remove(job)
                    if is_done(job) or self._fail_without_start(job):
                        continue
                    slot = free.pop(0)
                    process = processes.Process(target=work, args=(job, self.context, slot, *ready))
                    process.start()
                    running[process.sentinel] = (job, process, slot)
                if not running:
                    break  # what is left waits for jobs of others
                for sentinel in multiprocessing.connection.wait(list(running)):
                    job, process, slot = running.pop(sentinel)
                    process.join()
                    free.append(slot)
                    self._collect(job, process.exitcode)
        finally:
            for _, process, _ in running.values():
                process.kill()
                process.join()

    def _mnli_jobs(self) -> list[Job]:
        return [job for job in self.jobs if job.keep_model]

    def _ready(self, job: Job) -> tuple[Path, dict[str, Any]] | None:
        """The folder that a job starts from and its request; None while it has to wait for MNLI."""
        start, sha256 = self.context.start
        if job.from_mnli:
            ended = [(self.results.get(other.name), other) for other in self._mnli_jobs()]
            if any(result is None for result, _ in ended):
                return None
            done = [(result["score"], other.name) for result, other in ended if result and result["status"] == "done"]
            if done:
                start = self.context.jobs / max(done)[1]
                sha256 = self.results[start.name]["model"]
            else:
                sha256 = "none"
        request = {
            "training": job.training, "start": sha256, "data": self.data[job.task.name], "ops": self.context.ops,
            "labelling": self.labelling[job.name],
        }  # fmt: skip
        return start, request

    def _reuse(self, job: Job) -> bool:
        """Take the result of an earlier run, if it was for the same training and another task's start is still there."""
        ready = self._ready(job)
        if ready is None:
            return False
        result = read_result(self.context, job)
        if result is None or result["status"] != "done" or not trains_the_same(result["request"], ready[1]):
            return False
        if any(other.from_mnli for other in self.jobs) and job.keep_model and not kept_whole(self.context, job, result):
            return False
        self.results[job.name] = result | {"score": job.score(result["scores"])}
        return True

    def _has_labels(self, job: Job) -> bool:
        """Whether a finished job labelled the test sets as they are, and its file is there, undamaged."""
        result, path = self.results[job.name], self.context.jobs / f"{job.name}.npz"
        if result["request"]["labelling"] != self.labelling[job.name] or not path.is_file():
            return False
        return file_sha256(path) == result["labels_sha256"]

    def _fail_without_start(self, job: Job) -> bool:
        if not job.from_mnli or any(self.results[other.name]["status"] == "done" for other in self._mnli_jobs()):
            return False
        self._write_failure(job, "its start, MNLI's encoder, is missing: MNLI failed")
        return True

    def _collect(self, job: Job, exitcode: int | None) -> None:
        result = read_result(self.context, job)
        if exitcode == 0 and result is not None:
            self.results[job.name] = result | {"score": job.score(result["scores"])}
            scores = ", ".join(f"{name} {value:.4f}" for name, value in result["scores"].items())
            self.say(f"{job.name}: {scores} ({result['seconds']:.0f} s)")
        elif exitcode == BUSY:
            self.say(f"{job.name}: another command is running it")
        elif exitcode is not None and exitcode < 0:
            self._write_failure(job, f"killed by {signal.Signals(-exitcode).name}")
        else:
            self._write_failure(job, last_line(self.context.jobs / f"{job.name}.log") or f"exit code {exitcode}")

    def _write_failure(self, job: Job, reason: str) -> None:
        result = {"status": "failed", "error": reason}
        write_atomically(self.context.jobs / f"{job.name}.json", json.dumps(result, indent=1).encode())
        self.results[job.name] = result
        self.say(f"{job.name}: FAILED: {reason}")


def read_result(context: Context, job: Job) -> dict[str, Any] | None:
    """What a job wrote; None if it wrote nothing, or only a part of it is there."""
    try:
        result = json.loads((context.jobs / f"{job.name}.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(result, dict) or result.get("status") not in ("done", "failed"):
        return None
    return result if result["status"] == "failed" or {"request", "scores", "seconds"} <= result.keys() else None


def trains_the_same(one: Any, other: dict[str, Any]) -> bool:
    """Whether two requests ask for the same training and scores, whatever they label."""
    return isinstance(one, dict) and one | {"labelling": None} == other | {"labelling": None}


def kept_whole(context: Context, job: Job, result: dict[str, Any]) -> bool:
    """Whether the model that a job kept is there, undamaged."""
    try:
        return fingerprint(context.jobs / job.name) == result.get("model")
    except (OSError, ValueError):
        return False


def best_jobs(jobs: list[Job], results: dict[str, dict[str, Any]]) -> list[Job]:
    """Of each task with test sets to label the job with the best score, if any is done."""
    best: dict[str, Job] = {}
    for job in jobs:
        if job.contender == PRETRAINED and job.unlabelled and results.get(job.name, {}).get("status") == "done":
            so_far = best.setdefault(job.task.name, job)
            if results[job.name]["score"] > results[so_far.name]["score"]:
                best[job.task.name] = job
    return list(best.values())


def last_line(path: Path) -> str:
    """Of a log; nothing if it is empty or lost."""
    lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def work(job: Job, context: Context, slot: Slot, start: Path, request: dict[str, Any]) -> None:
    """The whole life of a job's process: it ends with 0 after its result is written, and with its starter."""
    try:
        claim = acquire(context.jobs / f"{job.name}.lock")
    except LockHeldError:
        sys.exit(BUSY)
    log = os.open(context.jobs / f"{job.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    starter = multiprocessing.parent_process()
    assert starter is not None, "runs in a process of its own"
    threading.Thread(target=_end_with, args=(starter,), daemon=True).start()
    torch.set_num_threads(slot.threads)
    found = read_result(context, job)
    if (
        job.keep_model
        and found is not None
        and found["status"] == "done"
        and trains_the_same(found["request"], request)
        and kept_whole(context, job, found)
    ):
        result = found | label_again(job, context, slot)
    else:
        result = run_job(job, context, slot, start)
    result |= {"request": request, "status": "done"}
    write_atomically(context.jobs / f"{job.name}.json", json.dumps(result, indent=1).encode())
    claim.release()


def _end_with(starter: Any) -> None:
    starter.join()
    os._exit(1)
