"""Made-up data in the layouts of GLUE's tasks, for tests of parsing; nothing can be learned from it."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from megabert.finetune.tasks.task import GLUE, Task

# Header and row of each file as in GLUE's archive; {t} marks a text, {y} the label, {i} the number of the row.
INFERENCE = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
MNLI_ROW = "{i}\tp\tid\tg\tb\tb\tp\tp\t{t}\t{t}"
TSV = {
    "cola": {"train": ("", "gj04\t{y}\t\t{t}"), "test": ("index sentence", "{i}\t{t}")},
    "sst2": {"train": ("sentence label", "{t}\t{y}"), "test": ("index sentence", "{i}\t{t}")},
    "mrpc": {
        "train": ("Quality #1_ID #2_ID #1_String #2_String", "{y}\t1\t2\t{t}\t{t}"),
        "test": ("index #1_ID #2_ID #1_String #2_String", "{i}\t1\t2\t{t}\t{t}"),
    },
    "stsb": {
        "train": (
            "index genre filename year old_index source1 source2 sentence1 sentence2 score",
            "{i}\tg\tf\t2012\t1\ts\ts\t{t}\t{t}\t{y}",
        ),
        "test": (
            "index genre filename year old_index source1 source2 sentence1 sentence2",
            "{i}\tg\tf\t2012\t1\ts\ts\t{t}\t{t}",
        ),
    },
    "qqp": {
        "train": ("id qid1 qid2 question1 question2 is_duplicate", "{i}\t1\t2\t{t}\t{t}\t{y}"),
        "test": ("id question1 question2", "{i}\t{t}\t{t}"),
    },
    "mnli": {
        "train": (f"{INFERENCE} sentence1 sentence2 label1 gold_label", MNLI_ROW + "\tentailment\t{y}"),
        "validation": (
            f"{INFERENCE} sentence1 sentence2 label1 label2 label3 label4 label5 gold_label",
            MNLI_ROW + "\tl1\tl2\tl3\tl4\tl5\t{y}",
        ),
        "test": (f"{INFERENCE} sentence1 sentence2", MNLI_ROW),
    },
    "qnli": {
        "train": ("index question sentence label", "{i}\t{t}\t{t}\t{y}"),
        "test": ("index question sentence", "{i}\t{t}\t{t}"),
    },
    "rte": {
        "train": ("index sentence1 sentence2 label", "{i}\t{t}\t{t}\t{y}"),
        "test": ("index sentence1 sentence2", "{i}\t{t}\t{t}"),
    },
    "wnli": {
        "train": ("index sentence1 sentence2 label", "{i}\t{t}\t{t}\t{y}"),
        "test": ("index sentence1 sentence2", "{i}\t{t}\t{t}"),
    },
    "ax": {"test": ("index sentence1 sentence2", "{i}\t{t}\t{t}")},
}  # fmt: skip
# Text that breaks other readers: a quote that is never closed, and letters beyond ASCII.
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
    """Write the data in GLUE's own layout."""
    for name, formats in TSV.items():
        task = GLUE[name]
        for split in splits(task):
            layout = task.tsv[split]
            header, line = formats.get(split.split("_")[0]) or formats["test" if split.startswith("test") else "train"]
            lines = ["\t".join(name.replace("_", " ") if "#" in name else name for name in header.split())][
                : bool(header)
            ]
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
    """Write the data in the hub's layout. reverse: number the labels in reverse order, as the metadata records."""
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
