"""One table: the pretrained encoder, the same one from random weights, and the classical floor."""

import multiprocessing
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from megabert.glue.baselines import tfidf
from megabert.glue.finetune import FinetuneConfig, Score, run
from megabert.glue.tasks import Examples, Task

TITLES = {
    "pretrained": "fine-tuned, pretrained",
    "random_init": "fine-tuned, from random weights",
    "tfidf": "TF-IDF + logistic regression",
}


class Job(NamedTuple):
    """One fine-tuning: independent of all others."""

    name: str
    folder: Path
    task: Task
    train: Examples
    test: Examples
    config: FinetuneConfig
    threads: int


def run_job(job: Job) -> tuple[str, Score]:
    """Fine-tune and score in this process, on its share of the cores."""
    torch.set_num_threads(job.threads)
    transformers.logging.set_verbosity_error()  # its report of missing heads; what matters is checked in build_classifier
    transformers.logging.disable_progress_bar()
    return job.name, run(job.folder, job.task, job.train, job.test, job.config, pretrained=job.name == "pretrained")


def compare(
    folder: Path, task: Task, train: Examples, test: Examples, settings: dict[str, Any], seeds: list[int]
) -> dict[str, dict[str, Any]]:
    """Score all three on the same split, the jobs side by side: small models gain more from that than from threads.

    Returns {name: {"scores": one per seed, "seconds": total}}.
    """
    cores = len(os.sched_getaffinity(0))
    configs = [FinetuneConfig(seed=seed, **settings) for seed in seeds]
    contenders = [(name, config) for config in configs for name in ("pretrained", "random_init")]
    processes = min(cores, len(contenders))
    jobs = [Job(name, folder, task, train, test, config, cores // processes) for name, config in contenders]
    results: dict[str, dict[str, Any]] = {name: {"scores": [], "seconds": 0.0} for name in TITLES}
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for name, score in pool.imap(run_job, jobs):
            results[name]["scores"].append(score.value)
            results[name]["seconds"] += score.seconds
    floor = tfidf(train, test)
    results["tfidf"] = {"scores": [floor.value], "seconds": floor.seconds}
    return results


def markdown(task: Task, results: dict[str, dict[str, Any]], num_train: int, num_test: int) -> str:
    """The results as a table."""
    lines = [
        f"{task.name}: {num_train:,} training and {num_test:,} test examples",
        "",
        f"| model | {task.metric} | seeds | seconds |",
        "|---|---|---|---|",
    ]
    for name, result in results.items():
        scores = result["scores"]
        lines.append(f"| {TITLES[name]} | {statistics.mean(scores):.3f} | {len(scores)} | {result['seconds']:.0f} |")
    return "\n".join(lines) + "\n"
