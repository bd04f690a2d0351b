"""Read a task's examples: GLUE's own TSV files, the hub's parquet files, or the files that a task file names.

Everything is checked while it is read: an error names file, line (or row) and column, before anything is trained.
"""

import csv
import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from megabert.glue.tasks import GLUE, Examples, Task, Tsv

log = logging.getLogger(__name__)


def locate(data: str, tasks: list[Task]) -> Path:
    """A folder as it is; owner/name of a hub data set, after fetching the tasks' files of it.

    Raises ValueError if it is neither, or if the hub cannot be reached.
    """
    if Path(data).is_dir():
        return Path(data)
    if not re.fullmatch(r"[\w-]+/[\w.-]+", data) or Path(data).parent.is_dir():
        raise ValueError(f"--data {data}: no such folder; expected one, or a hub data set such as nyu-mll/glue.")
    wanted = ["README.md", *(f"{task.name}/*.parquet" for task in tasks)]
    try:
        return Path(snapshot_download(data, repo_type="dataset", allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as mistake:
        raise ValueError(
            f"--data {data}: no such folder, and the hub gave no data set of this name ({type(mistake).__name__})."
        ) from mistake


def check_data(tasks: list[Task], folder: Path, submission: bool) -> None:
    """Read everything once before anything is trained. Raises ValueError naming file, line and column."""
    for task in tasks:
        splits = [*(["train"] if task.dev else []), *task.dev.values()]
        splits += task.test.values() if submission and task.name in GLUE else []
        for split in splits:
            read_split(task, folder, split)


def read_split(task: Task, folder: Path, split: str) -> Examples:
    """Read one split of a task. Raises ValueError naming file, line and column of the first mistake."""
    files = files_of(task, folder, split)
    rows = _read_tsv(task, files[0], split) if _is_glue_tsv(task, files[0]) else _read_named(task, files, split)
    texts, labels = [], []
    labelled = _has_labels(task, split)
    for place, words, label in rows:
        texts.append(words)
        if labelled:
            labels.append(_label(task, label, place))
    if not texts:
        raise ValueError(f"{files[0]}: has no examples.")
    first, *second = (list(column) for column in zip(*texts, strict=True))
    return Examples(first, second[0] if second else None, labels if labelled else None)


def files_of(task: Task, folder: Path, split: str) -> list[Path]:
    """The files of a split. Raises ValueError naming what is missing and where it was looked for."""
    if task.files:
        path = folder / task.files[split]
        if not path.is_file():
            raise ValueError(f"{path}: no such file; the task file of {task.name} names it.")
        return [path]
    parquet = sorted((folder / task.name).glob(f"{split}-*.parquet"))
    if parquet:
        return parquet
    layout = task.tsv[split]
    for name in (task.folder, task.name):
        if (path := folder / name / layout.file).is_file():
            return [path]
    raise ValueError(
        f"{folder}: has neither {task.folder}/{layout.file} (GLUE's layout) nor {task.name}/{split}-*.parquet (the hub's)."
    )


def file_hashes(task: Task, folder: Path, splits: list[str]) -> dict[str, str]:
    """The sha256 of every file of these splits, by name."""
    found: dict[str, str] = {}
    for split in splits:
        for path in files_of(task, folder, split):
            with open(path, "rb") as file:
                found[f"{split}/{path.name}"] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _has_labels(task: Task, split: str) -> bool:
    return split not in task.test.values()


def _is_glue_tsv(task: Task, file: Path) -> bool:
    return not task.files and file.suffix == ".tsv"


# A place to name in an error, the texts, and the label as it stands in the file.
Rows = Iterator[tuple[str, tuple[str, ...], Any]]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines from 1 on, without their ends. Raises ValueError for bytes that are not UTF-8."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as mistake:
        raise ValueError(f"{path}, after line {number}: not UTF-8: {mistake.reason}.") from mistake


def _read_tsv(task: Task, path: Path, split: str) -> Rows:
    """One of GLUE's files: no quoting, columns by place."""
    layout: Tsv = task.tsv[split]
    names = dict(zip(layout.texts, task.texts, strict=True))
    if layout.label is not None:
        names[layout.label] = task.label
    width, skipped = 0, 0
    for number, line in _lines(path):
        cells = line.split("\t")
        if layout.header and number == 1:
            width = len(cells)
            continue
        place = f"{path}, line {number}"
        needed = max([width if layout.label == -1 else 0, *(column + 1 for column in names)])
        if len(cells) < needed:
            if layout.skip_short and layout.label is not None:
                skipped += 1
                continue
            lacking = next((name for column, name in sorted(names.items()) if column >= len(cells)), task.label)
            raise ValueError(f"{place}: has {len(cells)} columns, expected {needed}: {lacking} is missing.")
        label = None if layout.label is None else cells[layout.label]
        yield place, tuple(cells[column] for column in layout.texts), label
    if skipped:
        log.info("%s: left out %d rows that end early", path, skipped)


def _read_named(task: Task, files: list[Path], split: str) -> Rows:
    """Files whose columns have names."""
    wanted = [*task.texts, *([task.label] if _has_labels(task, split) else [])]
    for path in files:
        if path.suffix == ".parquet":
            yield from _read_parquet(task, path, wanted)
        elif path.suffix in (".tsv", ".csv"):
            yield from _read_delimited(task, path, wanted)
        else:
            raise ValueError(f"{path}: expected a .tsv, .csv or .parquet file.")


def _read_delimited(task: Task, path: Path, wanted: list[str]) -> Rows:
    """.csv with quotes as usual, .tsv without; the first line has the names."""
    if path.suffix == ".csv":
        reader = csv.reader(line + "\n" for _, line in _lines(path))
    else:
        reader = csv.reader((line for _, line in _lines(path)), delimiter="\t", quoting=csv.QUOTE_NONE)
    header = next(reader, [])
    for name in wanted:
        if name not in header:
            raise ValueError(f"{path}, line 1: has no column {name}, only {', '.join(header) or 'nothing'}.")
    columns = [header.index(name) for name in wanted]
    for cells in reader:
        place = f"{path}, line {reader.line_num}"
        if len(cells) != len(header):
            lacking = f": {header[len(cells)]} is missing" if len(cells) < len(header) else ""
            raise ValueError(f"{place}: has {len(cells)} columns, expected {len(header)}{lacking}.")
        values = [cells[column] for column in columns]
        yield place, tuple(values[: len(task.texts)]), values[-1] if task.label in wanted else None


def _read_parquet(task: Task, path: Path, wanted: list[str]) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as missing:
        raise ValueError(f"{path}: needs pyarrow: pip install 'megabert[prep]'.") from missing
    try:
        schema = pyarrow.parquet.read_schema(path)
        for name in wanted:
            if name not in schema.names:
                raise ValueError(f"{path}: has no column {name}, only {', '.join(schema.names)}.")
        table = pyarrow.parquet.read_table(path, columns=wanted)
    except pyarrow.ArrowInvalid as mistake:
        raise ValueError(f"{path}: not a parquet file that can be read: {mistake}") from mistake
    texts = [table[name].to_pylist() for name in task.texts]
    labels = table[task.label].to_pylist() if task.label in wanted else [None] * len(table)
    integers = task.label in wanted and pyarrow.types.is_integer(schema.field(task.label).type)
    names = _label_names(task, path, schema.metadata or {}) if integers and task.labels else None
    for row, (*words, label) in enumerate(zip(*texts, labels, strict=True)):
        place = f"{path}, row {row}"
        for name, word in zip(task.texts, words, strict=True):
            if not isinstance(word, str):
                raise ValueError(f"{place}, column {name}: is {word!r}, expected a text.")
        if names is not None:
            if label not in range(len(names)):
                raise ValueError(f"{place}, column {task.label}: is {label}, expected 0 to {len(names) - 1}.")
        yield place, tuple(words), label if names is None else names[label]


def _label_names(task: Task, path: Path, metadata: dict[bytes, bytes]) -> list[str]:
    """What the numbers in a parquet file mean: the file says so itself, or the data set's README.md does.

    Raises ValueError if neither does, unless the names are the numbers.
    """
    info = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {})
    names = info.get("features", {}).get(task.label, {}).get("names")
    if names is None:
        names = _names_in_readme(task, path.parents[1] / "README.md")
    if names is None and all(name.isdigit() for name in task.labels):
        names = [str(number) for number in range(len(task.labels))]
    if names is None:
        raise ValueError(
            f"{path}, column {task.label}: holds numbers, and neither its metadata nor ../README.md names them, so that their order "
            f"is unknown. Expected {', '.join(task.labels)}."
        )
    if sorted(names) != sorted(task.labels):
        raise ValueError(f"{path}, column {task.label}: has labels {', '.join(names)}, not {', '.join(task.labels)}.")
    return names


def _names_in_readme(task: Task, path: Path) -> list[str] | None:
    """Names of labels in the YAML at the top of a hub data set's README."""
    if not path.is_file() or not (match := re.match(r"---\n(.*?)\n---", path.read_text(encoding="utf-8"), re.DOTALL)):
        return None
    infos = (yaml.safe_load(match[1]) or {}).get("dataset_info", [])
    for info in infos if isinstance(infos, list) else [infos]:
        if info.get("config_name") == task.name:
            for feature in info.get("features", []):
                if feature["name"] == task.label and isinstance(feature["dtype"], dict):
                    names = feature["dtype"]["class_label"]["names"]
                    return [names[key] for key in sorted(names, key=int)]
    return None


def _label(task: Task, value: Any, place: str) -> int | float:
    """A label's number, by its name; or a regression's score."""
    place = f"{place}, column {task.label}"
    if task.is_regression:
        try:
            score = float(value)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"{place}: is {value!r}, expected a number.")
        return score
    known = task.labels
    if value in known:
        return known.index(value)
    if task.numbered and isinstance(value, str) and value.isdigit() and int(value) < len(known):
        return int(value)
    numbers = f", or 0 to {len(known) - 1}" if task.numbered else ""
    raise ValueError(f"{place}: is {value!r}, expected {', '.join(known)}{numbers}.")
