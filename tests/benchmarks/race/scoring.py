"""Score both sides' models with the same code: loss on the held-out masked tokens, and fine-tuning."""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from race.texts.corpora import REPOSITORY, Corpus, HeldOutRow

from megabert.finetune.base_model import prepare_base_model
from megabert.finetune.jobs.job import has_token_types, random_subset, score_all, tokenizer_for
from megabert.finetune.protocol import read_protocol
from megabert.finetune.tasks.readers import read_split
from megabert.finetune.tasks.task import Task, read_task
from megabert.finetune.training import Backend, build_model, encode, finetune, predict

# The score of a model is the mean over these tasks; the second is on pairs, where words alone say little.
TASKS = ("movie-sentiment", "parameter-type")
TASK_FILES = REPOSITORY / "data_prep/tasks"
TASK_DATA = REPOSITORY / "data/glue"
ROWS = 64
CPU = Backend(torch.device("cpu"))


@torch.no_grad()
def held_out_loss(model: Any, corpus: Corpus) -> float:
    """Return the nats per masked token, in fp32. model: any masked language model of transformers' interface."""
    model.eval().float()
    loss = total = 0.0
    for batch in same_lengths(corpus.held_out):
        inputs = torch.stack([torch.from_numpy(row.input_ids) for row in batch])
        logits = model(input_ids=inputs, attention_mask=torch.ones_like(inputs)).logits
        for row, of_row in zip(batch, logits, strict=True):
            chosen, labels = of_row[torch.from_numpy(row.positions)], torch.from_numpy(row.labels)
            loss += torch.nn.functional.cross_entropy(chosen.float(), labels, reduction="sum").item()
            total += len(row.labels)
    return loss / total if math.isfinite(loss) else math.inf


def same_lengths(rows: list[HeldOutRow]) -> Iterator[list[HeldOutRow]]:
    """Yield batches of rows of one length, so that nothing is padded."""
    by_length: dict[int, list[HeldOutRow]] = {}
    for row in rows:
        by_length.setdefault(len(row.input_ids), []).append(row)
    for some in by_length.values():
        yield from (some[begin : begin + ROWS] for begin in range(0, len(some), ROWS))


def available_tasks(data: Path = TASK_DATA) -> tuple[list[Task], list[str]]:
    """Return the tasks whose data are there, and a line for each of the others."""
    tasks, missing = [], []
    for name in TASKS:
        task = read_task(TASK_FILES / f"{name}.yaml")
        try:
            read_split(task, data, "train")
        except ValueError as error:
            missing.append(
                f"{name}: {error} Run python data_prep/fetch_tasks.py, whose --help says where data come from."
            )
        else:
            tasks.append(task)
    return tasks, missing


def fine_tune(folder: Path, out: Path, tasks: list[Task], seed: int, pretrained: bool, examples: int) -> list[float]:
    """Fine-tune a model, or its twin from random weights, on each task. Returns the scores, 0 to 1.

    out: folder for the model in our layout. examples: most of them to train on, and to score; 0: all.
    """
    base, scores = prepare_base_model(folder, out).folder, []
    for task in tasks:
        settings = dataclasses.replace(
            read_protocol("quickstart", [task]).plan_for(task).candidates[0],
            max_train_examples=examples,
            max_dev_examples=examples,
        )
        train = random_subset(read_split(task, TASK_DATA, "train"), examples)
        devs = {
            suffix: random_subset(read_split(task, TASK_DATA, split), examples) for suffix, split in task.dev.items()
        }
        model = build_model(base, task, settings, CPU, seed, pretrained)
        tokenizer, types = tokenizer_for(model, base, settings), has_token_types(model)
        finetune(model, encode(train, tokenizer, types), settings, CPU, seed)
        predicted = {
            suffix: predict(model, encode(some, tokenizer, types), settings, CPU) for suffix, some in devs.items()
        }
        scores.append(statistics.mean(score_all(task, predicted, devs).values()))
    return scores
