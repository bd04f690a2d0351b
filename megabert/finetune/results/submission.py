"""The test sets' labels in the files that GLUE's server takes (https://gluebenchmark.com/submit), and the zip of them."""

import zipfile
from typing import Any

import numpy as np

from megabert.files.atomic import write_atomically
from megabert.finetune.jobs.job import Context, Job
from megabert.finetune.jobs.runner import best_jobs
from megabert.finetune.tasks.task import Task

# (task, split) -> the server's name of the file.
FILES = {
    "cola/test": "CoLA", "sst2/test": "SST-2", "mrpc/test": "MRPC", "stsb/test": "STS-B", "qqp/test": "QQP", "qnli/test": "QNLI",
    "mnli/test_matched": "MNLI-m", "mnli/test_mismatched": "MNLI-mm", "rte/test": "RTE", "wnli/test": "WNLI", "ax/test": "AX",
}  # fmt: skip
SCORE_RANGE = (0.0, 5.0)  # STS-B's


def write_submission(jobs: list[Job], results: dict[str, dict[str, Any]], context: Context) -> list[str]:
    """Write each task's labels of its test sets, from its best job. Returns the server's files that are lacking.

    GLUE's go to OUT/submission/ and into OUT/submission.zip, which the server takes only if it has all eleven; those of the
    user's own tasks to OUT/predictions/.
    """
    for_server, own = context.out / "submission", context.out / "predictions"
    written = []
    for job in best_jobs(jobs, results):
        with np.load(context.jobs / f"{job.name}.npz") as sets:
            for task, split in job.unlabelled:
                name, labels = f"{task.name}/{split}", sets[f"{task.name}/{split}"]
                path = for_server / f"{FILES[name]}.tsv" if name in FILES else own / f"{task.name}.tsv"
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, as_tsv(task, labels).encode())
                written += [FILES[name]] if name in FILES else []
    if not written:
        return []
    with zipfile.ZipFile(context.out / "submission.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(written):
            archive.write(for_server / f"{name}.tsv", f"{name}.tsv")
    return [name for name in FILES.values() if name not in written]


def as_tsv(task: Task, predictions: np.ndarray) -> str:
    """index and prediction: names of labels where the data has names, else numbers."""
    if task.is_regression:
        limits = SCORE_RANGE if task.name == "stsb" else (-np.inf, np.inf)
        values = [f"{value:.3f}" for value in np.clip(predictions, *limits)]
    else:
        values = [str(number) if task.numbered else task.labels[number] for number in predictions]
    lines = [f"{index}\t{value}" for index, value in enumerate(values)]
    return "\n".join(["index\tprediction", *lines]) + "\n"
