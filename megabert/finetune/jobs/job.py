"""Run one fine-tuning job: train with its settings, score the model, and write its files.

OUT/jobs/NAME.json   the request and the scores, or the reason of a failure
OUT/jobs/NAME.log    output of the job's process
OUT/jobs/NAME.npz    predictions on the test sets, if asked for
OUT/jobs/NAME/       the fine-tuned model, if another task starts from it, or until the best of a task is exported
OUT/jobs/NAME.lock   which process runs the job
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
from megabert.finetune.base_model import BaseModel, fingerprint, load_model, save_model
from megabert.finetune.protocol import MNLI, Protocol, Settings
from megabert.finetune.tasks import metrics
from megabert.finetune.tasks.baselines import predict_tfidf
from megabert.finetune.tasks.readers import read_split
from megabert.finetune.tasks.task import GLUE, Examples, Task
from megabert.finetune.training import Backend, build_model, encode, finetune, load_tokenizer, predict
from megabert.model.modeling_megabert import MegaBertForSequenceClassification

PRETRAINED, RANDOM_INIT, TFIDF = "pretrained", "random_init", "tfidf"
# max_train_examples and max_dev_examples choose the same subset for every seed of the training.
SUBSET_SEED = 0


@dataclass(frozen=True, kw_only=True)
class FinetuneJob:
    """One fine-tuning of one contender on one task."""

    task: Task
    settings: Settings
    candidate: int
    """index of the settings in the sweep"""
    seed: int
    contender: str = PRETRAINED
    """PRETRAINED, RANDOM_INIT or TFIDF"""
    from_mnli: bool = False
    """whether it starts from the encoder that was fine-tuned on MNLI"""
    keep_model: bool = False
    """whether other jobs may start from its model"""
    is_exported: bool = False
    """whether its model is exported if it is the task's best"""
    test_sets: tuple[tuple[Task, str], ...] = ()
    """task and split of each test set to label"""
    score_metrics: tuple[str, ...] = ()
    """the metrics whose mean is the score; empty: all of the task's"""

    @property
    def name(self) -> str:
        if self.contender == TFIDF:
            return f"{self.task.name}-{TFIDF}"
        return f"{self.task.name}-{self.contender}-c{self.candidate}-s{self.seed}"

    @property
    def saves_model(self) -> bool:
        return self.keep_model or self.is_exported

    @property
    def identity(self) -> dict[str, Any]:
        """Everything in the job that determines training and scores, as JSON; not which test sets it labels."""
        task = {name: getattr(self.task, name) for name in ("name", "texts", "label", "labels", "metrics", "dev")}
        parts = {
            "task": task,
            "settings": dataclasses.asdict(self.settings),
            "seed": self.seed,
            "contender": self.contender,
        }
        return json.loads(json.dumps(parts))

    def score(self, scores: dict[str, float]) -> float:
        """Return the mean of the metrics that count."""
        counted = [
            value for name, value in scores.items() if not self.score_metrics or name.split()[0] in self.score_metrics
        ]
        return sum(counted) / len(counted)


@dataclass(frozen=True, kw_only=True)
class JobContext:
    """What all jobs of one command share."""

    out: Path
    data: Path
    base: BaseModel
    ops: Literal["auto", "torch", "fused"]

    @property
    def jobs(self) -> Path:
        return self.out / "jobs"


class WorkerSlot(NamedTuple):
    """The device and the number of CPU threads of one job at a time."""

    device: torch.device
    threads: int


def plan_jobs(
    tasks: list[Task], protocol: Protocol, baselines: bool, submission: bool, keep_models: bool = False
) -> list[FinetuneJob]:
    """List every job, MNLI's first. keep_models: whether each task's best model is exported.

    A task starts from MNLI's encoder if the protocol asks for it and MNLI is among the tasks.
    """
    has_mnli = any(task.name == MNLI for task in tasks)
    jobs = []
    for task in sorted((task for task in tasks if task.dev), key=lambda task: task.name != MNLI):
        plan = protocol.plan_for(task)
        test_sets = [(task, split) for split in task.test.values()] if submission else []
        if submission and task.name == MNLI and GLUE["ax"] in tasks:
            test_sets.append((GLUE["ax"], "test"))
        # Kept even if no task of this command starts from MNLI: a task that is added later would train MNLI again.
        keep = task.name == MNLI and any(other.start == MNLI for other in protocol.plans.values())
        for candidate, settings in enumerate(plan.candidates):
            for seed in plan.seeds:
                job = FinetuneJob(
                    task=task,
                    settings=settings,
                    candidate=candidate,
                    seed=seed,
                    from_mnli=plan.start == MNLI and has_mnli,
                    keep_model=keep,
                    is_exported=keep_models,
                    test_sets=tuple(test_sets),
                    score_metrics=plan.metrics,
                )
                jobs.append(job)
                if baselines:
                    plain = {"from_mnli": False, "keep_model": False, "is_exported": False, "test_sets": ()}
                    jobs.append(dataclasses.replace(job, contender=RANDOM_INIT, **plain))
        if baselines:
            job = FinetuneJob(
                task=task,
                settings=plan.candidates[0],
                candidate=0,
                seed=0,
                contender=TFIDF,
                score_metrics=plan.metrics,
            )
            jobs.append(job)
    return jobs


def run_job(job: FinetuneJob, context: JobContext, slot: WorkerSlot, start: Path) -> dict[str, Any]:
    """Train and score in this process. start: folder of the model to start from. Returns the job's result."""
    task, settings = job.task, job.settings
    train = random_subset(read_split(task, context.data, "train"), settings.max_train_examples)
    devs = {
        suffix: random_subset(read_split(task, context.data, split), settings.max_dev_examples)
        for suffix, split in task.dev.items()
    }
    if job.contender == TFIDF:
        predictions, seconds = predict_tfidf(train, devs, task.is_regression)
        result: dict[str, Any] = {"seconds": seconds}
    else:
        backend = Backend(slot.device, context.ops)
        model = build_model(start, task, settings, backend, job.seed, job.contender == PRETRAINED)
        tokenizer, token_types = tokenizer_for(model, start, settings), has_token_types(model)
        stats = finetune(model, encode(train, tokenizer, token_types), settings, backend, job.seed)
        predictions = {
            suffix: predict(model, encode(examples, tokenizer, token_types), settings, backend)
            for suffix, examples in devs.items()
        }
        result = {**stats._asdict(), "examples_per_s": stats.examples / stats.seconds}
        result |= label_test_sets(job, context, slot, model, start)
        if job.saves_model:
            save_model(model, start, context.jobs / job.name)
            result["model"] = fingerprint(context.jobs / job.name)
    scores = score_all(task, predictions, devs)
    num_dev = sum(len(examples.first) for examples in devs.values())
    sizes = {"train_examples": len(train.first), "dev_examples": num_dev}
    return {"scores": scores, "score": job.score(scores), **sizes, **result}


def label_with_kept_model(job: FinetuneJob, context: JobContext, slot: WorkerSlot) -> dict[str, Any]:
    """Label the test sets with the model that an earlier run of the job kept, without training it again."""
    folder = context.jobs / job.name
    model = load_model(folder, job.task, job.settings, Backend(slot.device, context.ops))
    return label_test_sets(job, context, slot, model, folder)


def label_test_sets(
    job: FinetuneJob, context: JobContext, slot: WorkerSlot, model: MegaBertForSequenceClassification, folder: Path
) -> dict[str, Any]:
    """Write predictions on the job's test sets. folder: with the model's tokenizer.

    Returns the part of the job's result about them: the file's hash; nothing for a job without test sets.
    """
    if not job.test_sets:
        return {}
    backend, tokenizer = Backend(slot.device, context.ops), tokenizer_for(model, folder, job.settings)
    predictions: dict[str, Any] = {}
    for task, split in job.test_sets:
        encoded = encode(read_split(task, context.data, split), tokenizer, has_token_types(model))
        predictions[f"{task.name}/{split}"] = predict(model, encoded, job.settings, backend)
    path = context.jobs / f"{job.name}.npz"
    np.savez_compressed(path, **predictions)
    return {"labels_sha256": file_sha256(path)}


def has_token_types(model: MegaBertForSequenceClassification) -> bool:
    """Return whether the model has embeddings that tell the two texts of a pair apart."""
    return model.config.type_vocab_size > 1


def tokenizer_for(model: MegaBertForSequenceClassification, folder: Path, settings: Settings) -> Tokenizer:
    """Load the folder's tokenizer, truncating to the settings' length and to the model's learned positions."""
    learned = model.config.max_position_embeddings if model.config.position == "learned" else settings.max_seq_len
    return load_tokenizer(folder, min(settings.max_seq_len, learned))


def random_subset(examples: Examples, max_examples: int) -> Examples:
    """Return a random subset of at most max_examples, in the original order; 0: all examples."""
    if not max_examples or len(examples.first) <= max_examples:
        return examples
    chosen = sorted(np.random.default_rng(SUBSET_SEED).permutation(len(examples.first))[:max_examples].tolist())
    columns = [None if column is None else [column[i] for i in chosen] for column in examples]
    return Examples(*columns)  # type: ignore[arg-type]


def score_all(task: Task, predictions: dict[str, np.ndarray], devs: dict[str, Examples]) -> dict[str, float]:
    """Compute every metric on every evaluation set, as {"accuracy": ...} or {"accuracy matched": ...}."""
    return {
        f"{metric} {suffix}".strip(): metrics.score(metric, predictions[suffix], np.array(examples.labels))
        for suffix, examples in devs.items()
        for metric in task.metrics
    }
