"""Write predictions on the test sets in the files that GLUE's server accepts (https://gluebenchmark.com/submit)."""

import io
import zipfile
from typing import Any

import numpy as np

from megabert.files.atomic import write_atomically
from megabert.finetune.jobs.job import FinetuneJob, JobContext
from megabert.finetune.jobs.runner import best_jobs
from megabert.finetune.tasks.task import Task

# task/split -> the server's name of the file.
FILES = {
    "cola/test": "CoLA",
    "sst2/test": "SST-2",
    "mrpc/test": "MRPC",
    "stsb/test": "STS-B",
    "qqp/test": "QQP",
    "qnli/test": "QNLI",
    "mnli/test_matched": "MNLI-m",
    "mnli/test_mismatched": "MNLI-mm",
    "rte/test": "RTE",
    "wnli/test": "WNLI",
    "ax/test": "AX",
}
STSB_RANGE = (0.0, 5.0)


def write_submission(jobs: list[FinetuneJob], results: dict[str, dict[str, Any]], context: JobContext) -> list[str]:
    """Write the predictions of each task's best job on its test sets. Returns the server's files that are missing.

    Those of GLUE's tasks go to OUT/submission/ and OUT/submission.zip, which the server accepts only with all eleven
    files; those of the user's tasks go to OUT/predictions/.
    """
    for_server, own = context.out / "submission", context.out / "predictions"
    written = []
    for job in [job for job in best_jobs(jobs, results) if job.test_sets]:
        with np.load(context.jobs / f"{job.name}.npz") as sets:
            for task, split in job.test_sets:
                name, labels = f"{task.name}/{split}", sets[f"{task.name}/{split}"]
                path = for_server / f"{FILES[name]}.tsv" if name in FILES else own / f"{task.name}.tsv"
                path.parent.mkdir(exist_ok=True)
                write_atomically(path, as_tsv(task, labels).encode())
                written += [FILES[name]] if name in FILES else []
    if not written:
        return []
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(written):
            archive.write(for_server / f"{name}.tsv", f"{name}.tsv")
    write_atomically(context.out / "submission.zip", zipped.getvalue())
    return [name for name in FILES.values() if name not in written]


def as_tsv(task: Task, predictions: np.ndarray) -> str:
    """Return lines of index and prediction, which is a label's name, or its number where the data has numbers."""
    if task.is_regression:
        limits = STSB_RANGE if task.name == "stsb" else (-np.inf, np.inf)
        values = [f"{value:.3f}" for value in np.clip(predictions, *limits)]
    else:
        values = [str(label) if task.numbered else task.labels[label] for label in predictions]
    lines = [f"{index}\t{value}" for index, value in enumerate(values)]
    return "\n".join(["index\tprediction", *lines]) + "\n"
