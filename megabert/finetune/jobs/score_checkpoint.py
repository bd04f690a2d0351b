"""Fine-tune one checkpoint on a small task, in a process that a pretraining run starts (training/telemetry/probe.py).

python -m megabert.finetune.jobs.score_checkpoint --checkpoint CHECKPOINT --task sst2 --out score.json
"""

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megabert.config import cli
from megabert.config.settings import setting
from megabert.files.atomic import write_atomically
from megabert.files.checkpoint_format import read_state
from megabert.finetune.protocol import TaskPlan, read_protocol
from megabert.finetune.tasks.readers import check_data, locate_data
from megabert.finetune.tasks.task import Task, glue_tasks, read_task
from megabert.process.subprocesses import exit_with_parent

# The converted checkpoint, next to the score; overwritten each time.
BASE_MODEL = "start"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Options:
    task: str = ""
    """one of GLUE's tasks, or a YAML file of your own"""
    data: str = "data/glue"
    """as in launch/finetune_glue.py"""
    protocol: str = "quick"
    """as in launch/finetune_glue.py; its first candidate and first seed are used"""
    max_examples: int = setting(1000, "[1, 1e9]")
    """examples to train on, and to score"""
    checkpoint: str = ""
    """checkpoint of a pretraining run"""
    out: str = setting("", is_output=True)
    """file for the score"""
    ops: Literal["auto", "torch", "fused"] = "auto"
    """as run.ops of a recipe"""
    check: bool = False
    """only check the task, its data and the protocol"""


def main() -> None:
    options = cli.read_flags(Options, "probe", __doc__ or "")
    exit_with_parent()
    task = read_probe_task(options.task)
    data = locate_data(options.data, [task])
    plan = read_protocol(options.protocol, [task]).plan_for(task)
    check_data([task], data, submission=False)
    if not options.check:
        # Everything else on the machine has priority.
        os.nice(10)
        write_score(options, task, data, plan)


def write_score(options: Options, task: Task, data: Path, plan: TaskPlan) -> None:
    """Fine-tune the checkpoint and write its score."""
    # Imported here: torch takes seconds to load, and with --check the training waits for this process.
    import torch

    from megabert.finetune.base_model import prepare_base_model
    from megabert.finetune.jobs.job import FinetuneJob, JobContext, WorkerSlot, run_job

    checkpoint, out = Path(options.checkpoint), Path(options.out)
    tokens = read_state(checkpoint).tokens
    base = prepare_base_model(checkpoint, out.parent / BASE_MODEL)
    limits = {"max_train_examples": options.max_examples, "max_dev_examples": options.max_examples}
    settings = dataclasses.replace(plan.candidates[0], **limits)
    job = FinetuneJob(task=task, settings=settings, candidate=0, seed=plan.seeds[0], score_metrics=plan.metrics)
    context = JobContext(out=out.parent, data=data, base=base, ops=options.ops)
    slot = WorkerSlot(torch.device("cpu"), torch.get_num_threads())
    result = run_job(job, context, slot, base.folder)
    shutil.rmtree(base.folder)
    record = {"format_version": FORMAT_VERSION, **result, "task": task.name, "tokens": tokens}
    write_atomically(out, json.dumps(record, indent=1).encode())


def read_probe_task(name: str) -> Task:
    """Return a GLUE task by name, or the task of a YAML file. Raises ValueError for several, or without labels."""
    if name.endswith((".yaml", ".yml")):
        return read_task(Path(name))
    tasks = glue_tasks(name)
    if len(tasks) != 1 or not tasks[0].dev:
        raise ValueError(f"task {name}: expected one task that has labels to score.")
    return tasks[0]


if __name__ == "__main__":
    cli.run(main, "probe")
