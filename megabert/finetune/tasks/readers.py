"""Read a task's examples from GLUE's TSV files, the hub's parquet files, or the files of a user's task.

pandas and datasets do not replace these readers: pandas renames duplicate columns and fills short rows without an
error, neither can name the line of a wrong label, and neither notices a missing part of a parquet set.
"""

import csv
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

from megabert.config.strict_yaml import one_line
from megabert.files.hashing import file_sha256
from megabert.finetune.tasks.task import Examples, Task, TsvLayout

log = logging.getLogger(__name__)

# Rows of QQP that may be broken: a few of GLUE's own 364 thousand are. More of them have another cause.
MAX_BROKEN_SHARE, MAX_BROKEN_ROWS = 0.001, 3


def locate_data(data: str, tasks: list[Task]) -> Path:
    """Return the folder with the tasks' data; for owner/name of a hub data set, download the tasks' files first.

    Raises ValueError if it is neither, or if the hub cannot be reached.
    """
    if Path(data).is_dir():
        return Path(data)
    if not re.fullmatch(r"[\w-]+/[\w.-]+", data) or Path(data).parent.is_dir():
        raise ValueError(f"--data {data}: no such folder; expected one, or a hub data set such as nyu-mll/glue.")
    wanted = ["README.md", *(f"{task.name}/*.parquet" for task in tasks)]
    try:
        return Path(snapshot_download(data, repo_type="dataset", allow_patterns=wanted))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"--data {data}: no such folder, and the hub gave no data set of this name ({type(error).__name__})."
        ) from error


def check_data(tasks: list[Task], folder: Path, submission: bool) -> None:
    """Read every split once, so that errors come before training. Raises ValueError naming file, line and column."""
    for task in tasks:
        splits = [*(["train"] if task.dev else []), *task.dev.values()]
        splits += task.test.values() if submission else []
        for split in splits:
            read_split(task, folder, split)


def read_split(task: Task, folder: Path, split: str) -> Examples:
    """Read one split of a task. Raises ValueError naming file, line and column of the first error."""
    files = split_files(task, folder, split)
    if not task.files and files[0].suffix == ".tsv":
        layout = task.tsv[split]
    else:
        has_labels = split not in task.test.values()
        layout = TsvLayout(file=files[0].name, texts=task.texts, label=task.label if has_labels else None)
    texts, labels = [], []
    for path in files:
        for where, row_texts, label in _rows(task, path, layout):
            texts.append(row_texts)
            if layout.label is not None:
                labels.append(_label(task, label, f"{where}, column {layout.label}"))
    if not texts:
        raise ValueError(f"{files[0]}: has no examples.")
    first, *second = (list(column) for column in zip(*texts, strict=True))
    return Examples(first, second[0] if second else None, None if layout.label is None else labels)


def split_files(task: Task, folder: Path, split: str) -> list[Path]:
    """Return the files of a split. Raises ValueError naming a missing file and where it was expected."""
    if task.files:
        path = folder / task.files[split]
        if not path.is_file():
            raise ValueError(f"{path}: no such file; the task file of {task.name} names it.")
        return [path]
    parquet = sorted((folder / task.name).glob(f"{split}-*.parquet"))
    if parquet:
        _check_parts(parquet)
        return parquet
    layout = task.tsv[split]
    for name in (task.folder, task.name):
        if (path := folder / name / layout.file).is_file():
            return [path]
    raise ValueError(
        f"{folder}: has neither {task.folder}/{layout.file} (GLUE's layout) nor {task.name}/{split}-*.parquet "
        "(the hub's)."
    )


def _check_parts(files: list[Path]) -> None:
    """Raise ValueError if a part of a set such as train-00000-of-00003.parquet is missing."""
    parts = {path.name: match for path in files if (match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.parquet", path.name))}
    for split, _, count in sorted({match.groups() for match in parts.values()}):
        for number in range(int(count)):
            if (name := f"{split}-{number:05}-of-{count}.parquet") not in parts:
                raise ValueError(f"{files[0].parent / name}: no such file; the set has {count.lstrip('0')} of them.")
    if len({match[3] for match in parts.values()}) > 1 or (parts and len(parts) < len(files)):
        raise ValueError(f"{files[0].parent}: {files[0].name} and {files[-1].name} are not parts of one set.")


def file_hashes(task: Task, folder: Path, splits: list[str]) -> dict[str, str]:
    """Return the sha256 of every file of these splits, by split and name."""
    return {f"{split}/{path.name}": file_sha256(path) for split in splits for path in split_files(task, folder, split)}


# The row's file and line for error messages, its texts, and its label as the file has it.
Rows = Iterator[tuple[str, tuple[str, ...], Any]]


def _rows(task: Task, path: Path, layout: TsvLayout) -> Rows:
    if path.suffix == ".parquet":
        return _read_parquet(task, path, layout)
    if path.suffix in (".tsv", ".csv"):
        return _read_delimited(path, layout)
    raise ValueError(f"{path}: expected a .tsv, .csv or .parquet file.")


def _read_delimited(path: Path, layout: TsvLayout) -> Rows:
    """Read a .csv file with the usual quotes, or a .tsv file without; columns go by the names in the header line."""
    rows = _csv_rows(path) if path.suffix == ".csv" else ((number, line.split("\t")) for number, line in _lines(path))
    header = list(layout.columns) or next(rows, (1, []))[1]
    texts = [_column(path, header, name) for name in layout.texts]
    label = None if layout.label is None else _column(path, header, layout.label)
    total, broken = 0, 0
    for number, cells in rows:
        total += 1
        if len(cells) != len(header) and layout.has_broken_rows:
            broken += 1
            continue
        where = f"{path}, line {number}"
        _check_width(where, header, cells)
        yield where, tuple(cells[column] for column in texts), None if label is None else cells[label]
    if broken > max(MAX_BROKEN_ROWS, MAX_BROKEN_SHARE * total):
        raise ValueError(
            f"{path}: {broken:,} of its {total:,} rows do not have {len(header)} columns; only a few may be broken."
        )
    if broken:
        log.info("%s: skipped %d rows that do not have %d columns", path, broken, len(header))


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers from 1 and lines without their ends. Raises ValueError for bytes that are not UTF-8."""
    number = 0
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, after line {number}: not UTF-8: {error.reason}.") from error


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each row's last line, and the row. Raises ValueError for rows that csv cannot read."""
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}; is a quote not closed?") from error


def _column(path: Path, header: list[str], name: str) -> int:
    """Return the index of a column. Raises ValueError unless the header has it once."""
    if header.count(name) != 1:
        problem = "has two columns" if name in header else "has no column"
        raise ValueError(f"{path}, line 1: {problem} {name}, only {', '.join(header).strip() or 'nothing'}.")
    return header.index(name)


def _check_width(where: str, header: list[str], cells: list[str]) -> None:
    """Raise ValueError unless a row has the header's columns; more, empty ones at its end are accepted."""
    if len(cells) < len(header):
        raise ValueError(f"{where}: has {len(cells)} columns, expected {len(header)}: {header[len(cells)]} is missing.")
    if any(cells[len(header) :]):
        raise ValueError(f"{where}: has {len(cells)} columns, expected {len(header)}: a tab or comma too many.")


def _read_parquet(task: Task, path: Path, layout: TsvLayout) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path}: needs pyarrow: pip install 'megabert[prep]'.") from error
    wanted = [*layout.texts, *([] if layout.label is None else [layout.label])]
    try:
        schema = pyarrow.parquet.read_schema(path)
        for name in wanted:
            if (count := schema.names.count(name)) != 1:
                columns = f"{count} columns" if count else "no column"
                raise ValueError(f"{path}: has {columns} {name}, only {', '.join(schema.names)}.")
        table = pyarrow.parquet.read_table(path, columns=wanted)
        texts = [table[name].to_pylist() for name in layout.texts]
        labels = [None] * len(table) if layout.label is None else table[layout.label].to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a parquet file that can be read: {one_line(error)}") from error
    names = None
    if layout.label is not None and task.labels and pyarrow.types.is_integer(schema.field(layout.label).type):
        names = _label_names(task, path, schema.metadata or {})
    for row, (*row_texts, label) in enumerate(zip(*texts, labels, strict=True)):
        where = f"{path}, row {row}"
        for name, text in zip(layout.texts, row_texts, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"{where}, column {name}: is {text!r}, expected a string.")
        if names is not None and label not in range(len(names)):
            raise ValueError(f"{where}, column {layout.label}: is {label}, expected 0 to {len(names) - 1}.")
        yield where, tuple(row_texts), label if names is None else names[label]


def _label_names(task: Task, path: Path, metadata: dict[bytes, bytes]) -> list[str]:
    """Return the names of the numbers in a parquet file's label column, from its metadata or the data set's README.md.

    Raises ValueError if neither names them, unless the task's labels are themselves numbers.
    """
    names = _names_in_metadata(task, metadata.get(b"huggingface", b"{}"))
    if names is None:
        names = _names_in_readme(task, path.parents[1] / "README.md")
    if names is None and all(name.isdigit() for name in task.labels):
        names = [str(number) for number in range(len(task.labels))]
    if names is None:
        raise ValueError(
            f"{path}, column {task.label}: holds numbers, and neither its metadata nor ../README.md names them, "
            f"so that their order is unknown. Expected {', '.join(task.labels)}."
        )
    if sorted(names) != sorted(task.labels):
        raise ValueError(f"{path}, column {task.label}: has labels {', '.join(names)}, not {', '.join(task.labels)}.")
    return names


def _names_in_metadata(task: Task, text: bytes) -> list[str] | None:
    """Return the label names that the datasets library writes into a parquet file's metadata."""
    try:
        found = _get(json.loads(text), "info", "features", task.label, "names")
    except ValueError:  # metadata of another program
        return None
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None


def _names_in_readme(task: Task, path: Path) -> list[str] | None:
    """Return the label names in the YAML at the top of a hub data set's README."""
    if not path.is_file():
        return None
    match = re.match(rb"---\r?\n(.*?)\n---", path.read_bytes(), re.DOTALL)
    try:
        infos = _get(yaml.safe_load(match[1]), "dataset_info") if match else None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: its front matter is not valid YAML: {one_line(error)}") from error
    for info in infos if isinstance(infos, list) else [infos]:
        features = _get(info, "features")
        if _get(info, "config_name") == task.name and isinstance(features, list):
            for feature in features:
                names = _get(feature, "dtype", "class_label", "names")
                if _get(feature, "name") == task.label and isinstance(names, dict):
                    numbers = {str(number): str(name) for number, name in names.items()}
                    if sorted(numbers) == sorted(map(str, range(len(numbers)))):
                        return [numbers[str(number)] for number in range(len(numbers))]
    return None


def _get(value: Any, *keys: str) -> Any:
    """Return the value under nested keys; None if a key is missing or its value is no dict."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _label(task: Task, value: Any, where: str) -> int | float:
    """Return a label's index, or a regression's target."""
    if task.is_regression:
        try:
            target = float(value)
        except (TypeError, ValueError):
            target = math.nan
        if not math.isfinite(target):
            raise ValueError(f"{where}: is {value!r}, expected a number.")
        return target
    known = task.labels
    if value in known:
        return known.index(value)
    if task.numbered and isinstance(value, str) and value.isdigit() and int(value) < len(known):
        return int(value)
    numbers = f", or 0 to {len(known) - 1}" if task.numbered else ""
    raise ValueError(f"{where}: is {value!r}, expected {', '.join(known)}{numbers}.")
