"""Hostile documents and labelled data: each reader gives the text that was written, or names the file."""

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.parquet

from data_prep.sources import list_input_splits, read_input_split
from data_prep.sources.base import ReadOptions
from megabert.finetune.tasks.readers import read_split
from megabert.finetune.tasks.task import Task, read_task
from tests.fuzz.mutations import STRINGS, mutate_bytes
from tests.fuzz.outcome import Case

ALPHABET = 'ab c\n\t\r\x00\x0b\x1c\u0085\u2028\ufeff\u0300é漢🎉\u200b\ud7ff\uffff"\\,{}[]<>'
TASK = b"name: mine\ntexts: [first, second]\nlabel: label\nlabels: [bad, good]\nmetrics: [accuracy]\n"
TASK += b"train: train.tsv\ndev: dev.tsv\n"


def text_cases(folder: Path, random: Random) -> Iterator[Case]:
    """Yield files of documents: valid ones with hostile characters, whose texts must come back, and damaged ones."""
    number = 0
    while True:
        number += 1
        texts = ["".join(random.choices(ALPHABET, k=random.randrange(30))) for _ in range(random.randrange(5))]
        suffix = random.choice([".jsonl", ".jsonl.gz", ".parquet"])
        path = folder / f"{number}{suffix}"
        data = _encode(texts, suffix)
        whole = random.random() < 0.4
        path.write_bytes(data if whole else mutate_bytes(data, random))

        def read(path: Path = path) -> list[str]:
            options = ReadOptions()
            splits = list_input_splits(str(path), options)
            return [text for split in splits for text in read_input_split(split, options)]

        def is_right(found: Any, texts: Sequence[str] = tuple(texts), whole: bool = whole) -> bool:
            return found == [*texts] if whole else not any("\ufffd" in text for text in found)

        yield Case(f"{path.name} of {texts!r}, whole: {whole}", read, is_right, (str(path),))
        path.unlink()


def task_cases(folder: Path, random: Random) -> Iterator[Case]:
    """Yield task files and labelled data with hostile bytes."""
    rows = [
        f"a {number}\tb {random.choice(['x', 'é', '漢'])}\t{random.choice(['bad', 'good'])}" for number in range(20)
    ]
    table = ("\n".join(["first\tsecond\tlabel", *rows]) + "\n").encode()
    files = {"task.yaml": TASK, "train.tsv": table, "dev.tsv": table}
    while True:
        damaged = random.choice(list(files))
        for name, data in files.items():
            (folder / name).write_bytes(mutate_bytes(data, random) if name == damaged else data)

        def read() -> tuple[Task, Any]:
            task = read_task(folder / "task.yaml")
            return task, [read_split(task, folder, split) for split in ("train", "validation")]

        def is_right(result: Any) -> bool:
            task, splits = result
            labels = [label for examples in splits for label in examples.labels or []]
            texts = [
                text for examples in splits for column in (examples.first, examples.second) for text in column or []
            ]
            known = not task.labels or all(label in range(len(task.labels)) for label in labels)
            return known and not any("\ufffd" in text or "\x00" in text for text in texts)

        describe = f"{damaged}: {(folder / damaged).read_bytes()[:400]!r}"
        yield Case(describe, read, is_right, (*files, str(folder)))


def _encode(texts: list[str], suffix: str) -> bytes:
    if suffix == ".parquet":
        file = io.BytesIO()
        table = pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())})
        pyarrow.parquet.write_table(table, file, row_group_size=2)
        return file.getvalue()
    lines = "".join(json.dumps({"text": text, "more": STRINGS[0]}) + "\n" for text in texts).encode()
    return gzip.compress(lines) if suffix.endswith(".gz") else lines
