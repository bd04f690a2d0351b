"""Write a run's curves to experiment trackers besides metrics.jsonl: TensorBoard, a CSV file, Weights & Biases."""

import csv
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from torch.utils.tensorboard import SummaryWriter

from megabert.files.atomic import write_atomically

CSV = "metrics.csv"
RETRY_AFTER_S = 60.0


class BufferedAppender:
    """Appends lines to a file; keeps in memory what cannot be written, and retries it with the next lines."""

    def __init__(self, path: Path):
        # Unbuffered: a buffered file would drop what its write() accepted and then failed to write.
        self.file = open(path, "ab", buffering=0)
        self.unwritten = b""

    def append(self, lines: str) -> None:
        """Write the lines. Raises OSError if a part of them remains unwritten for now."""
        self.unwritten += lines.encode()
        while self.unwritten:
            self.unwritten = self.unwritten[self.file.write(self.unwritten) :]

    def close(self) -> None:
        """Retry once and close the file. Raises OSError if lines are lost."""
        try:
            self.append("")
        finally:
            self.file.close()


class Tracker(Protocol):
    """Receives the metrics of rank 0."""

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Add one point to every curve. May raise OSError; it is then called again with the next metrics."""

    def close(self) -> None: ...


class TensorBoard:
    """TensorBoard event files. If writing fails, as on a full disk, a new file is started a minute later."""

    def __init__(self, folder: Path, step: int):
        self.folder = str(folder / "tensorboard")
        self.writer: SummaryWriter | None = SummaryWriter(self.folder, purge_step=step or None)
        self.error = OSError()
        self.retry_at = 0.0

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        if self.writer is None and time.monotonic() < self.retry_at:
            raise self.error
        try:
            self.writer = self.writer or SummaryWriter(self.folder)
            for name, value in values.items():
                self.writer.add_scalar(name, value, step)
        except OSError as error:
            self.writer, self.error, self.retry_at = None, error, time.monotonic() + RETRY_AFTER_S
            raise

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class CsvFile:
    """metrics.csv: one row step,name,value per number, so that any metric may appear at any step.

    It carries no format version: the header names the columns, and rows of another shape are dropped at a resume.
    """

    def __init__(self, folder: Path, step: int):
        """step: from which the run continues; rows of later steps are dropped."""
        path = folder / CSV
        kept = []
        if path.is_file():
            with open(path, newline="") as file:
                kept = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= step]
        write_atomically(path, _as_csv([("step", "name", "value"), *kept]).encode())
        self.file = BufferedAppender(path)

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self.file.append(_as_csv([(step, name, value) for name, value in values.items()]))

    def close(self) -> None:
        self.file.close()


def _as_csv(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


class WandB:
    """A Weights & Biases run named after the output folder; a resumed run continues it. WANDB_PROJECT etc. apply."""

    def __init__(self, folder: Path, recipe: dict[str, object]):
        import wandb  # pyrefly: ignore[missing-import] # optional: installed only by those who use it

        self.latest = 0
        name = folder.resolve().name
        self.run = wandb.init(id=name, name=name, resume="allow", dir=str(folder), config=recipe)

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        """Log at the newest step if `step` is an earlier one, as a probe's is: wandb drops late points.

        A probe's score then comes with its own step in a curve of its own.
        """
        if step < self.latest:
            values = values | {f"{name}/step": step for name in values if name.startswith("probe/")}
        self.latest = max(self.latest, step)
        self.run.log(values, step=self.latest)

    def close(self) -> None:
        self.run.finish()


def open_trackers(names: Sequence[str], folder: Path, step: int, recipe: dict[str, object]) -> list[Tracker]:
    """Open the recipe's trackers. step: from which the run continues; later points are dropped if possible."""
    constructors = {
        "tensorboard": lambda: TensorBoard(folder, step),
        "csv": lambda: CsvFile(folder, step),
        "wandb": lambda: WandB(folder, recipe),
    }
    return [constructors[name]() for name in names]
