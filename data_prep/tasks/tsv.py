"""Write labelled examples to the TSV files that a task file names."""

from pathlib import Path
from typing import NamedTuple

from megabert.files.atomic import write_atomically

# File name -> whether it has the rows that are held out.
SPLITS = {"train.tsv": False, "dev.tsv": True}


class Row(NamedTuple):
    """A labelled example. held_out: whether it belongs to dev.tsv."""

    texts: tuple[str, ...]
    label: str
    held_out: bool


def write_splits(folder: Path, columns: tuple[str, ...], rows: list[Row]) -> None:
    """Write train.tsv and dev.tsv, in the order of the rows, and print which task file they belong to.

    folder: has the task's name. A tab or a line break in a text becomes a space. If this is interrupted, no older file
    remains beside a new one: rows that one source trains on, another may hold out.
    """
    task_file = Path(__file__).with_name(f"{folder.name}.yaml")
    if task_file.is_relative_to(Path.cwd()):
        task_file = task_file.relative_to(Path.cwd())
    folder.mkdir(parents=True, exist_ok=True)
    for name in SPLITS:
        (folder / name).unlink(missing_ok=True)
    for name, held_out in SPLITS.items():
        chosen = [row for row in rows if row.held_out == held_out]
        lines = ["\t".join((*(" ".join(text.split()) for text in row.texts), row.label)) for row in chosen]
        write_atomically(folder / name, "\n".join(["\t".join((*columns, "label")), *lines, ""]).encode())
    count = sum(row.held_out for row in rows)
    print(f"{folder}: {len(rows) - count:,} rows to train on, {count:,} held out; --task-file {task_file}")
