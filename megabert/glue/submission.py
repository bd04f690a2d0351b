"""The test sets' labels in the files that GLUE's server takes (https://gluebenchmark.com/submit), and the zip of them."""

import zipfile
from typing import Any

import numpy as np

from megabert.glue.jobs import PRETRAINED, Context, Job
from megabert.glue.tasks import GLUE, Task

# (task, split) -> the server's name of the file.
FILES = {
    "cola/test": "CoLA", "sst2/test": "SST-2", "mrpc/test": "MRPC", "stsb/test": "STS-B", "qqp/test": "QQP", "qnli/test": "QNLI",
    "mnli/test_matched": "MNLI-m", "mnli/test_mismatched": "MNLI-mm", "rte/test": "RTE", "wnli/test": "WNLI", "ax/test": "AX",
}  # fmt: skip
SCORE_RANGE = (0.0, 5.0)  # STS-B's


def write_submission(jobs: list[Job], results: dict[str, dict[str, Any]], context: Context) -> list[str]:
    """Write OUT/submission/*.tsv and OUT/submission.zip, from each task's best job. Returns the files that are lacking.

    The server takes a zip only if it has all eleven.
    """
    folder = context.out / "submission"
    folder.mkdir(exist_ok=True)
    written = []
    for task in dict.fromkeys(job.task.name for job in jobs):
        done = [
            job
            for job in jobs
            if job.task.name == task
            and job.contender == PRETRAINED
            and job.unlabelled
            and results.get(job.name, {}).get("status") == "done"
        ]
        if done:
            best = max(done, key=lambda job: results[job.name]["score"])
            with np.load(context.jobs / f"{best.name}.npz") as sets:
                for key in sets.files:
                    (folder / f"{FILES[key]}.tsv").write_text(as_tsv(GLUE[key.split("/")[0]], sets[key]))
                    written.append(FILES[key])
    with zipfile.ZipFile(context.out / "submission.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(written):
            archive.write(folder / f"{name}.tsv", f"{name}.tsv")
    return [name for name in FILES.values() if name not in written]


def as_tsv(task: Task, predictions: np.ndarray) -> str:
    """index and prediction: names of labels where the data has names, else numbers."""
    if task.is_regression:
        values = [f"{value:.3f}" for value in np.clip(predictions, *SCORE_RANGE)]
    else:
        values = [str(number) if task.numbered else task.labels[number] for number in predictions]
    lines = [f"{index}\t{value}" for index, value in enumerate(values)]
    return "\n".join(["index\tprediction", *lines]) + "\n"
