"""One small fine-tuning of a checkpoint, for a pretraining run that asks how it is doing (training/telemetry/probe.py).

python -m megabert.finetune.jobs.probe --checkpoint runs/x/checkpoints/step-00001000 --task sst2 --data glue_dir --out score.json
"""

import dataclasses
import os
import shutil
import stat
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megabert.config import cli
from megabert.files.checkpoint_format import read_state
from megabert.files.probe_score import write_score
from megabert.finetune.protocol import Plan, read_protocol
from megabert.finetune.tasks.readers import check_data, locate
from megabert.finetune.tasks.task import Task, choose_tasks, read_task

START = "start"  # the checkpoint in our folder layout, beside the score; overwritten each time


@dataclass(frozen=True)
class Options:
    task: str = ""
    """one of GLUE's tasks, or a YAML file of your own"""
    data: str = "data/glue"
    """as in launch/finetune_glue.py"""
    protocol: str = "quick"
    """as in launch/finetune_glue.py; its first candidate and first seed"""
    max_examples: int = 1000
    """examples to train on, and to score"""
    checkpoint: str = ""
    """a pretraining run's"""
    out: str = ""
    """file for the score"""
    ops: Literal["auto", "torch", "fused"] = "auto"
    """as run.ops of a recipe"""
    check: bool = False
    """look at the task and its data only"""


def main() -> None:
    options = cli.read_flags(Options, "probe", __doc__ or "")
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=_end_with_starter, daemon=True).start()
    task = the_task(options.task)
    data = locate(options.data, [task])
    plan = read_protocol(options.protocol, [task]).plan(task)
    check_data([task], data, submission=False)
    if not options.check:
        os.nice(10)  # whatever else the machine does goes first
        score(options, task, data, plan)


def score(options: Options, task: Task, data: Path, plan: Plan) -> None:
    """Fine-tune, and write the score."""
    # Imported here: with --check the training waits, and torch takes seconds to load.
    import torch

    from megabert.finetune.base_model import prepare
    from megabert.finetune.jobs.job import Context, Job, Slot, run_job

    checkpoint, out = Path(options.checkpoint), Path(options.out)
    tokens = read_state(checkpoint).tokens
    start = prepare(checkpoint, out.parent / START)
    budget = {"max_train_examples": options.max_examples, "max_dev_examples": options.max_examples}
    settings = dataclasses.replace(plan.candidates[0], **budget)
    job = Job(task=task, settings=settings, candidate=0, seed=plan.seeds[0], counting=plan.metrics)
    slot = Slot(torch.device("cpu"), torch.get_num_threads())
    result = run_job(job, Context(out=out.parent, data=data, start=start, ops=options.ops), slot, start.folder)
    shutil.rmtree(start.folder)
    write_score(out, {**result, "task": task.name, "tokens": tokens})


def the_task(name: str) -> Task:
    """Raises ValueError for more than one."""
    if name.endswith((".yaml", ".yml")):
        return read_task(Path(name))
    tasks = choose_tasks(name)
    if len(tasks) != 1 or not tasks[0].dev:
        raise ValueError(f"task {name}: expected one task that has labels to score.")
    return tasks[0]


def _end_with_starter() -> None:
    sys.stdin.read()  # a pipe whose other end nobody writes to: it closes when the training process ends, however it does
    os._exit(1)


if __name__ == "__main__":
    cli.run(main, "probe")
