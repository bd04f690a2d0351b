"""Where the curves of a run go beside metrics.jsonl: TensorBoard, a CSV file, Weights & Biases. Rank 0 only."""

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch.utils.tensorboard import SummaryWriter

CSV = "metrics.csv"


class Tracker(Protocol):
    def record(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, folder: Path, step: int):
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)

    def record(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()


class CsvFile:
    """metrics.csv: a line for each number, step,name,value, so that any number may come at any step."""

    def __init__(self, folder: Path, step: int):
        path = folder / CSV
        kept = []
        if path.is_file():
            with open(path, newline="") as file:
                kept = [row for row in csv.reader(file) if len(row) == 3 and row[0].isdigit() and int(row[0]) <= step]
        self.file = open(path, "w", newline="")
        self.writer = csv.writer(self.file)
        self.writer.writerows([("step", "name", "value"), *kept])
        self.file.flush()

    def record(self, step: int, values: dict[str, float]) -> None:
        self.writer.writerows((step, name, value) for name, value in values.items())
        self.file.flush()

    def close(self) -> None:
        self.file.close()


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
