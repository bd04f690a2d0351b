"""Independent jobs, each a process of its own with a result file: run side by side, and again only where they are not done.

OUT/jobs/NAME.json  the request and the scores, or why it failed    NAME.log  what it said
OUT/jobs/NAME.npz   labels of the test sets, where wanted           NAME/     the encoder, where another task starts from it
"""

import dataclasses
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megabert.data.manifest import write_atomically
from megabert.glue import metrics
from megabert.glue.baselines import predict_tfidf
from megabert.glue.finetune import Place, build_model, encode, finetune, load_tokenizer, predict
from megabert.glue.protocol import MNLI, Protocol, Settings
from megabert.glue.readers import file_hashes, read_split
from megabert.glue.starting import Start, fingerprint, save_encoder
from megabert.glue.tasks import GLUE, Examples, Task

PRETRAINED, RANDOM_INIT, TFIDF = "pretrained", "random_init", "tfidf"
SUBSET_SEED = 0  # of max_train_examples: every seed trains on the same part


@dataclass(frozen=True, kw_only=True)
class Job:
    """One fine-tuning. candidate: which settings of a sweep; from_mnli: starts from MNLI's encoder; unlabelled: sets to label."""

    task: Task
    settings: Settings
    candidate: int
    seed: int
    contender: str = PRETRAINED
    from_mnli: bool = False
    keep_encoder: bool = False
    unlabelled: tuple[tuple[str, str], ...] = ()
    """(GLUE task, split) of each"""
    counting: tuple[str, ...] = ()
    """the metrics whose mean is the score; none named: all of the task's"""

    @property
    def name(self) -> str:
        if self.contender == TFIDF:
            return f"{self.task.name}-{TFIDF}"
        return f"{self.task.name}-{self.contender}-c{self.candidate}-s{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Context:
    """What all jobs of one command share."""

    out: Path
    data: Path
    start: Start
    ops: str

    @property
    def jobs(self) -> Path:
        return self.out / "jobs"


class Slot(NamedTuple):
    """Where one job at a time runs."""

    device: torch.device
    threads: int


def plan_jobs(tasks: list[Task], protocol: Protocol, baselines: bool, submission: bool) -> list[Job]:
    """Every job, MNLI's first. Others start from MNLI's encoder where the protocol says so and MNLI is among the tasks."""
    has_mnli = any(task.name == MNLI for task in tasks)
    jobs = []
    for task in sorted((task for task in tasks if task.dev), key=lambda task: task.name != MNLI):
        plan = protocol.plan(task)
        from_mnli = plan.start == MNLI and has_mnli
        unlabelled = [(task.name, split) for split in task.test.values()] if submission and task.name in GLUE else []
        if submission and task.name == MNLI and GLUE["ax"] in tasks:
            unlabelled.append(("ax", "test"))
        keep = task.name == MNLI and any(protocol.plan(other).start == MNLI for other in tasks)
        for candidate, settings in enumerate(plan.candidates):
            for seed in plan.seeds:
                job = Job(
                    task=task, settings=settings, candidate=candidate, seed=seed, from_mnli=from_mnli, keep_encoder=keep,
                    unlabelled=tuple(unlabelled), counting=plan.metrics,
                )  # fmt: skip
                jobs.append(job)
                if baselines:
                    bare = {"from_mnli": False, "keep_encoder": False, "unlabelled": ()}
                    jobs.append(dataclasses.replace(job, contender=RANDOM_INIT, **bare))
        if baselines:
            job = Job(
                task=task, settings=plan.candidates[0], candidate=0, seed=0, contender=TFIDF, counting=plan.metrics
            )
            jobs.append(job)
    return jobs


def read_result(context: Context, job: Job) -> dict[str, Any] | None:
    path = context.jobs / f"{job.name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


class Runner:
    """Runs jobs in processes. hashes: of each task's data files, read once; results: of the jobs that ended, by name."""

    def __init__(self, jobs: list[Job], context: Context, say: Callable[[str], None]):
        self.jobs, self.context, self.say = jobs, context, say
        self.hashes = {job.task.name: _data_hashes(job.task, context.data) for job in jobs}
        self.results: dict[str, dict[str, Any]] = {}
        context.jobs.mkdir(parents=True, exist_ok=True)

    def run(self, slots: list[Slot], mine: Callable[[int], bool] = lambda number: True) -> None:
        """Run what is not done, one job per slot at a time; jobs of others (not mine) only count if they are done."""
        for job in self.jobs:
            self._reuse(job)
        pending = [job for number, job in enumerate(self.jobs) if mine(number) and job.name not in self.results]
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
                    if self._reuse(job) or self._fail_without_start(job):
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
        return [job for job in self.jobs if job.keep_encoder]

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
                sha256 = self.results[start.name]["encoder"]
            else:
                sha256 = "none"
        request = {
            "job": json.loads(json.dumps(dataclasses.asdict(job))), "start": sha256, "data": self.hashes[job.task.name],
            "ops": self.context.ops,
        }  # fmt: skip
        return start, request

    def _reuse(self, job: Job) -> bool:
        """Take the result of an earlier run, if it was for the same request and all it left is still there."""
        ready = self._ready(job)
        if ready is None:
            return False
        result = read_result(self.context, job)
        if result is None or result["status"] != "done" or result["request"] != ready[1]:
            return False
        if job.keep_encoder and not (self.context.jobs / job.name).is_dir():
            return False
        self.results[job.name] = result
        return True

    def _fail_without_start(self, job: Job) -> bool:
        if not job.from_mnli or any(self.results[other.name]["status"] == "done" for other in self._mnli_jobs()):
            return False
        self._write_failure(job, "its start, MNLI's encoder, is missing: MNLI failed")
        return True

    def _collect(self, job: Job, exitcode: int | None) -> None:
        result = read_result(self.context, job)
        if exitcode == 0 and result is not None:
            self.results[job.name] = result
            self.say(f"{job.name}: {_scores_as_text(result['scores'])} ({result['seconds']:.0f} s)")
            return
        if exitcode is not None and exitcode < 0:
            reason = f"killed by {signal.Signals(-exitcode).name}"
        else:
            lines = (self.context.jobs / f"{job.name}.log").read_text(errors="replace").split("\n")
            reason = next((line.strip() for line in reversed(lines) if line.strip()), f"exit code {exitcode}")
        self._write_failure(job, reason)

    def _write_failure(self, job: Job, reason: str) -> None:
        result = {"status": "failed", "error": reason}
        write_atomically(self.context.jobs / f"{job.name}.json", json.dumps(result, indent=1).encode())
        self.results[job.name] = result
        self.say(f"{job.name}: FAILED: {reason}")


def _data_hashes(task: Task, data: Path) -> dict[str, str]:
    return file_hashes(task, data, ["train", *task.dev.values()])


def _scores_as_text(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def work(job: Job, context: Context, slot: Slot, start: Path, request: dict[str, Any]) -> None:
    """The whole life of a job's process: it ends with 0 after its result is written, and with its starter."""
    log = os.open(context.jobs / f"{job.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(log, 1)
    os.dup2(log, 2)
    starter = multiprocessing.parent_process()
    assert starter is not None, "runs in a process of its own"
    threading.Thread(target=_end_with, args=(starter,), daemon=True).start()
    torch.set_num_threads(slot.threads)
    result = run_job(job, context, slot, start)
    write_atomically(
        context.jobs / f"{job.name}.json",
        json.dumps({"request": request, "status": "done", **result}, indent=1).encode(),
    )


def _end_with(starter: Any) -> None:
    starter.join()
    os._exit(1)


def run_job(job: Job, context: Context, slot: Slot, start: Path) -> dict[str, Any]:
    """Train and score in this process."""
    task, settings = job.task, job.settings
    train = part_of(read_split(task, context.data, "train"), settings.max_train_examples)
    devs = {
        suffix: part_of(read_split(task, context.data, split), settings.max_dev_examples)
        for suffix, split in task.dev.items()
    }
    if job.contender == TFIDF:
        predictions, seconds = predict_tfidf(train, devs, task.is_regression)
        speed: dict[str, Any] = {"seconds": seconds}
    else:
        place = Place(slot.device, context.ops)
        model = build_model(start, task, settings, place, job.seed, job.contender == PRETRAINED)
        two_types = model.config.type_vocab_size > 1
        limit = min(
            settings.max_seq_len,
            model.config.max_position_embeddings if model.config.position == "learned" else 1 << 30,
        )
        tokenizer = load_tokenizer(start, limit)
        trained = finetune(model, encode(train, tokenizer, two_types), settings, place, job.seed)
        speed = {**trained._asdict(), "examples_per_s": trained.examples / trained.seconds}

        def label(examples: Examples) -> np.ndarray:
            return predict(model, encode(examples, tokenizer, two_types), settings, place)

        predictions = {suffix: label(examples) for suffix, examples in devs.items()}
        if job.unlabelled:
            sets: dict[str, Any] = {
                f"{name}/{split}": label(read_split(GLUE[name], context.data, split)) for name, split in job.unlabelled
            }
            np.savez_compressed(context.jobs / f"{job.name}.npz", **sets)
        if job.keep_encoder:
            save_encoder(model, start, context.jobs / job.name)
            speed["encoder"] = fingerprint(context.jobs / job.name)
    scores = score_all(task, predictions, devs)
    sizes = {"train_examples": len(train.first), "dev_examples": sum(len(examples.first) for examples in devs.values())}
    counting = [value for name, value in scores.items() if not job.counting or name.split()[0] in job.counting]
    return {"scores": scores, "score": sum(counting) / len(counting), **sizes, **speed}


def part_of(examples: Examples, most: int) -> Examples:
    """A random part of at most so many examples, 0 for all, in their order."""
    if not most or len(examples.first) <= most:
        return examples
    chosen = sorted(np.random.default_rng(SUBSET_SEED).permutation(len(examples.first))[:most].tolist())
    parts = [None if column is None else [column[i] for i in chosen] for column in examples]
    return Examples(*parts)  # type: ignore[arg-type]


def score_all(task: Task, predictions: dict[str, np.ndarray], devs: dict[str, Examples]) -> dict[str, float]:
    """Every metric on every evaluation set: {"accuracy": ...} or {"accuracy matched": ...}."""
    return {
        f"{metric} {suffix}".strip(): metrics.score(metric, predictions[suffix], np.array(examples.labels))
        for suffix, examples in devs.items()
        for metric in task.metrics
    }
