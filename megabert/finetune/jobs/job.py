"""Independent jobs: one fine-tuning each, with a result and what it leaves behind. runner.py runs them, each in a process of its own.

OUT/jobs/NAME.json  the request and the scores, or why it failed    NAME.log   what it said
OUT/jobs/NAME.npz   labels of the test sets, where wanted           NAME/      the model, where another task starts from it
OUT/jobs/NAME.lock  which process has the job
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from megabert.files.hashing import file_sha256
from megabert.finetune.base_model import Start, fingerprint, load_model, save_model
from megabert.finetune.protocol import MNLI, Protocol, Settings
from megabert.finetune.tasks import metrics
from megabert.finetune.tasks.baselines import predict_tfidf
from megabert.finetune.tasks.readers import read_split
from megabert.finetune.tasks.task import GLUE, Examples, Task
from megabert.finetune.training import Place, build_model, encode, finetune, load_tokenizer, predict
from megabert.model.modeling_megabert import MegaBertForSequenceClassification

PRETRAINED, RANDOM_INIT, TFIDF = "pretrained", "random_init", "tfidf"
SUBSET_SEED = 0  # of max_train_examples: every seed trains on the same part


@dataclass(frozen=True, kw_only=True)
class Job:
    """One fine-tuning. candidate: which settings of a sweep; from_mnli: starts from MNLI's encoder; keep_model: others may."""

    task: Task
    settings: Settings
    candidate: int
    seed: int
    contender: str = PRETRAINED
    from_mnli: bool = False
    keep_model: bool = False
    unlabelled: tuple[tuple[Task, str], ...] = ()
    """test sets to label: a task and its split, each"""
    counting: tuple[str, ...] = ()
    """the metrics whose mean is the score; none named: all of the task's"""

    @property
    def name(self) -> str:
        if self.contender == TFIDF:
            return f"{self.task.name}-{TFIDF}"
        return f"{self.task.name}-{self.contender}-c{self.candidate}-s{self.seed}"

    @property
    def training(self) -> dict[str, Any]:
        """Of the job all that decides what is trained and scored, as JSON has it: not which test sets are labelled."""
        task = {name: getattr(self.task, name) for name in ("name", "texts", "label", "labels", "metrics", "dev")}
        parts = {
            "task": task,
            "settings": dataclasses.asdict(self.settings),
            "seed": self.seed,
            "contender": self.contender,
        }
        return json.loads(json.dumps(parts))

    def score(self, scores: dict[str, float]) -> float:
        """The mean of the metrics that count."""
        counting = [value for name, value in scores.items() if not self.counting or name.split()[0] in self.counting]
        return sum(counting) / len(counting)


@dataclass(frozen=True, kw_only=True)
class Context:
    """What all jobs of one command share."""

    out: Path
    data: Path
    start: Start
    ops: Literal["auto", "torch", "fused"]

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
        unlabelled = [(task, split) for split in task.test.values()] if submission else []
        if submission and task.name == MNLI and GLUE["ax"] in tasks:
            unlabelled.append((GLUE["ax"], "test"))
        # Whether or not such a task is among these: it may be the next time, and would have MNLI trained again.
        keep = task.name == MNLI and any(other.start == MNLI for other in protocol.plans.values())
        for candidate, settings in enumerate(plan.candidates):
            for seed in plan.seeds:
                job = Job(
                    task=task, settings=settings, candidate=candidate, seed=seed, from_mnli=from_mnli, keep_model=keep,
                    unlabelled=tuple(unlabelled), counting=plan.metrics,
                )  # fmt: skip
                jobs.append(job)
                if baselines:
                    bare = {"from_mnli": False, "keep_model": False, "unlabelled": ()}
                    jobs.append(dataclasses.replace(job, contender=RANDOM_INIT, **bare))
        if baselines:
            job = Job(
                task=task, settings=plan.candidates[0], candidate=0, seed=0, contender=TFIDF, counting=plan.metrics
            )
            jobs.append(job)
    return jobs


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
        tokenizer = tokenizer_for(model, start, settings)
        trained = finetune(model, encode(train, tokenizer, has_types(model)), settings, place, job.seed)
        speed = {**trained._asdict(), "examples_per_s": trained.examples / trained.seconds}
        predictions = {
            suffix: predict(model, encode(examples, tokenizer, has_types(model)), settings, place)
            for suffix, examples in devs.items()
        }
        speed |= write_labels(job, context, slot, model, start)
        if job.keep_model:
            save_model(model, start, context.jobs / job.name)
            speed["model"] = fingerprint(context.jobs / job.name)
    scores = score_all(task, predictions, devs)
    sizes = {"train_examples": len(train.first), "dev_examples": sum(len(examples.first) for examples in devs.values())}
    return {"scores": scores, "score": job.score(scores), **sizes, **speed}


def label_again(job: Job, context: Context, slot: Slot) -> dict[str, Any]:
    """Label the test sets with a model that the job kept, in this process."""
    kept = context.jobs / job.name
    model = load_model(kept, job.task, job.settings, Place(slot.device, context.ops))
    return write_labels(job, context, slot, model, kept)


def write_labels(
    job: Job, context: Context, slot: Slot, model: MegaBertForSequenceClassification, folder: Path
) -> dict[str, Any]:
    """Write the labels of the job's test sets. Returns what its result says of them: the file's hash; nothing without a set.

    folder: with the model's tokenizer.
    """
    if not job.unlabelled:
        return {}
    place, tokenizer = Place(slot.device, context.ops), tokenizer_for(model, folder, job.settings)
    sets: dict[str, Any] = {}
    for task, split in job.unlabelled:
        encoded = encode(read_split(task, context.data, split), tokenizer, has_types(model))
        sets[f"{task.name}/{split}"] = predict(model, encoded, job.settings, place)
    path = context.jobs / f"{job.name}.npz"
    np.savez_compressed(path, **sets)
    return {"labels_sha256": file_sha256(path)}


def has_types(model: MegaBertForSequenceClassification) -> bool:
    """Whether it tells a pair's texts apart by their type."""
    return model.config.type_vocab_size > 1


def tokenizer_for(model: MegaBertForSequenceClassification, folder: Path, settings: Settings) -> Tokenizer:
    """The folder's tokenizer, cutting to what the settings want and the model has positions for."""
    learned = model.config.max_position_embeddings if model.config.position == "learned" else settings.max_seq_len
    return load_tokenizer(folder, min(settings.max_seq_len, learned))


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
