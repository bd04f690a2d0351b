"""Where the curves of a run go beside metrics.jsonl: TensorBoard, a CSV file, Weights & Biases. Rank 0 only."""

import csv
import importlib.util
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

CSV = "metrics.csv"
AGAIN_S = 60.0


class Appended:
    """What cannot be written waits in memory for the next attempt; a line that was cut short is then made whole."""

    def __init__(self, path: Path):
        self.file = open(path, "ab", buffering=0)  # a buffer would lose what its write() was given and could not keep
        self.waiting = b""

    def add(self, lines: str) -> None:
        """Raises OSError if a part of them waits."""
        self.waiting += lines.encode()
        while self.waiting:
            self.waiting = self.waiting[self.file.write(self.waiting) :]

    def close(self) -> None:
        """Raises OSError if a part is lost."""
        try:
            self.add("")
        finally:
            self.file.close()


class Tracker(Protocol):
    def record(self, step: int, values: dict[str, float]) -> None:
        """May raise OSError, and is then called again with what comes next."""

    def close(self) -> None: ...


class TensorBoard:
    """Writes from a thread of its own. Where that has failed, as on a full disk, a new file is begun a minute later."""

    def __init__(self, folder: Path, step: int):
        self.folder = str(folder / "tensorboard")
        self.board: SummaryWriter | None = SummaryWriter(self.folder, purge_step=step or None)
        self.problem = OSError()
        self.again = 0.0

    def record(self, step: int, values: dict[str, float]) -> None:
        if self.board is None and time.monotonic() < self.again:
            raise self.problem
        try:
            self.board = self.board or SummaryWriter(self.folder)
            for name, value in values.items():
                self.board.add_scalar(name, value, step)
        except OSError as mistake:
            self.board, self.problem, self.again = None, mistake, time.monotonic() + AGAIN_S
            raise

    def close(self) -> None:
        if self.board is not None:
            self.board.close()


class CsvFile:
    """metrics.csv: a line for each number, step,name,value, so that any number may come at any step."""

    def __init__(self, folder: Path, step: int):
        path = folder / CSV
        kept = []
        if path.is_file():
            with open(path, newline="") as file:
                kept = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text(_as_csv([("step", "name", "value"), *kept]), newline="")
        os.replace(temporary, path)
        self.file = Appended(path)

    def record(self, step: int, values: dict[str, float]) -> None:
        self.file.add(_as_csv([(step, name, value) for name, value in values.items()]))

    def close(self) -> None:
        self.file.close()


def _as_csv(rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


class WandB:
    """A run of the name of its folder, which a resumed run goes on with. WANDB_PROJECT and the rest are wandb's own."""

    def __init__(self, folder: Path, recipe: dict[str, Any]):
        import wandb  # pyrefly: ignore[missing-import] # an optional import: only where it was asked for

        self.latest = 0
        name = folder.resolve().name
        self.run = wandb.init(id=name, name=name, resume="allow", dir=str(folder), config=recipe)

    def record(self, step: int, values: dict[str, float]) -> None:
        """wandb drops what comes late, as the probe of an earlier step: that goes to the current one, and says of which it is."""
        if step < self.latest:
            values = values | {f"{name}/step": step for name in values if name.startswith("probe/")}
        self.latest = max(self.latest, step)
        self.run.log(values, step=self.latest)

    def close(self) -> None:
        self.run.finish()


def why_not(names: Sequence[str]) -> str | None:
    """Say what is missing for these trackers, or None."""
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        return "run.trackers has wandb, which is not installed. Run pip install wandb, or leave it out."
    return None


def open_trackers(names: Sequence[str], folder: Path, step: int, recipe: dict[str, Any]) -> list[Tracker]:
    """Those that the recipe names. step: that the run goes on from; later points are dropped where the tracker can."""
    make = {
        "tensorboard": lambda: TensorBoard(folder, step),
        "csv": lambda: CsvFile(folder, step),
        "wandb": lambda: WandB(folder, recipe),
    }
    return [make[name]() for name in names]
