"""A small made-up set in the layouts of GLUE's tasks: for the tests of parsing only. Nothing can be learnt from it."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from megabert.glue.tasks import GLUE, Task

# Columns of each file as GLUE's archive has them; {t} marks a text, {y} the label, anything else stands as it is.
TSV = {
    "cola": {"train": "gj04\t{y}\t\t{t}", "test": "{i}\t{t}"},
    "sst2": {"train": "{t}\t{y}", "test": "{i}\t{t}"},
    "mrpc": {"train": "{y}\t1\t2\t{t}\t{t}", "test": "{i}\t1\t2\t{t}\t{t}"},
    "stsb": {"train": "{i}\tg\tf\t2012\t1\ts\ts\t{t}\t{t}\t{y}", "test": "{i}\tg\tf\t2012\t1\ts\ts\t{t}\t{t}"},
    "qqp": {"train": "{i}\t1\t2\t{t}\t{t}\t{y}", "test": "{i}\t{t}\t{t}"},
    "mnli": {
        "train": "{i}\tp\tid\tg\tb\tb\tp\tp\t{t}\t{t}\tentailment\t{y}",
        "validation": "{i}\tp\tid\tg\tb\tb\tp\tp\t{t}\t{t}\tl1\tl2\tl3\tl4\tl5\t{y}",
        "test": "{i}\tp\tid\tg\tb\tb\tp\tp\t{t}\t{t}",
    },
    "qnli": {"train": "{i}\t{t}\t{t}\t{y}", "test": "{i}\t{t}\t{t}"},
    "rte": {"train": "{i}\t{t}\t{t}\t{y}", "test": "{i}\t{t}\t{t}"},
    "wnli": {"train": "{i}\t{t}\t{t}\t{y}", "test": "{i}\t{t}\t{t}"},
    "ax": {"test": "{i}\t{t}\t{t}"},
}
# A text with what breaks other readers: a quote that never ends, a carriage return, letters beyond ASCII.
WORDS = ('the "cat sat', "on l\u00e0 mat,", "and 'so on")


def text(number: int, side: int) -> str:
    return f"{WORDS[number % 3]} {number} side {side}"


def label(task: Task, number: int) -> str | float:
    if task.is_regression:
        return number % 6 * 0.8
    return task.labels[number % len(task.labels)]


def splits(task: Task) -> list[str]:
    return [*(["train"] if task.dev else []), *task.dev.values(), *task.test.values()]


def write_tsv(folder: Path, count: int = 12) -> Path:
    """GLUE's own layout."""
    for name, formats in TSV.items():
        task = GLUE[name]
        for split in splits(task):
            layout = task.tsv[split]
            line = formats.get(split.split("_")[0], formats.get("test" if split.startswith("test") else "train", ""))
            lines = ["\t".join(f"column{i}" for i in range(line.count("\t") + 1))] if layout.header else []
            for number in range(count):
                filled = line
                for side in range(len(task.texts)):
                    filled = filled.replace("{t}", text(number, side), 1)
                value = label(task, number)
                if task.numbered:
                    value = task.labels.index(str(value))
                lines.append(filled.replace("{y}", str(value)).replace("{i}", str(number)))
            path = folder / task.folder / layout.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\ufeff" * (name == "mrpc") + "\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_parquet(folder: Path, count: int = 12, reverse: bool = False) -> Path:
    """The hub's layout. reverse: with the labels numbered the other way round, which the metadata says."""
    for task in GLUE.values():
        names = list(reversed(task.labels)) if reverse else list(task.labels)
        kind = {"_type": "ClassLabel", "names": names}
        metadata = {b"huggingface": json.dumps({"info": {"features": {task.label: kind} if names else {}}}).encode()}
        for split in splits(task):
            labels = [label(task, number) for number in range(count)]
            numbers = labels if task.is_regression else [names.index(str(value)) for value in labels]
            if split in task.test.values():
                numbers = [-1] * count
            columns: dict = {name: [text(i, side) for i in range(count)] for side, name in enumerate(task.texts)}
            table = pyarrow.table(columns | {task.label: numbers, "idx": list(range(count))})
            path = folder / task.name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path)
    return folder
