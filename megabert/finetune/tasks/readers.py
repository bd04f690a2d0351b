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

from megabert.finetune.tasks.task import Examples, Task, Tsv, one_line

log = logging.getLogger(__name__)

# Rows of QQP that may be broken: a few of GLUE's own 364 thousand are. More than this is a mistake of another kind.
BROKEN_SHARE, FEW_BROKEN = 0.001, 3


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
        splits += task.test.values() if submission else []
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
        _check_parts(parquet)
        return parquet
    layout = task.tsv[split]
    for name in (task.folder, task.name):
        if (path := folder / name / layout.file).is_file():
            return [path]
    raise ValueError(
        f"{folder}: has neither {task.folder}/{layout.file} (GLUE's layout) nor {task.name}/{split}-*.parquet (the hub's)."
    )


def _check_parts(files: list[Path]) -> None:
    """Raise ValueError unless train-00000-of-00003.parquet and the like are all there: one is named that is not."""
    parts = {path.name: match for path in files if (match := re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.parquet", path.name))}
    for split, _, count in sorted({match.groups() for match in parts.values()}):
        for number in range(int(count)):
            if (name := f"{split}-{number:05}-of-{count}.parquet") not in parts:
                raise ValueError(f"{files[0].parent / name}: no such file; the set has {count.lstrip('0')} of them.")
    if len({match[3] for match in parts.values()}) > 1 or (parts and len(parts) < len(files)):
        raise ValueError(f"{files[0].parent}: {files[0].name} and {files[-1].name} are not parts of one set.")


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
    """One of GLUE's files: no quoting; columns by the names in the first line, or where it has none those of its layout."""
    layout: Tsv = task.tsv[split]
    lines = _lines(path)
    header = list(layout.columns) or next(lines, (1, ""))[1].split("\t")
    texts = [_column(path, header, name) for name in layout.texts]
    label = None if layout.label is None else _column(path, header, layout.label)
    total, broken = 0, 0
    for number, line in lines:
        cells, total = line.split("\t"), total + 1
        if len(cells) != len(header) and layout.has_broken_rows:
            broken += 1
            continue
        _check_width(f"{path}, line {number}", header, cells)
        yield (
            f"{path}, line {number}",
            tuple(cells[column] for column in texts),
            None if label is None else cells[label],
        )
    if broken > max(FEW_BROKEN, BROKEN_SHARE * total):
        raise ValueError(
            f"{path}: {broken:,} of its {total:,} rows do not have {len(header)} columns; only a few may be broken."
        )
    if broken:
        log.info("%s: left out %d rows that do not have %d columns", path, broken, len(header))


def _column(path: Path, header: list[str], name: str) -> int:
    """Where a column is. Raises ValueError unless it is there once."""
    if header.count(name) != 1:
        what = "has two columns" if name in header else "has no column"
        raise ValueError(f"{path}, line 1: {what} {name}, only {', '.join(header).strip() or 'nothing'}.")
    return header.index(name)


def _check_width(place: str, header: list[str], cells: list[str]) -> None:
    """Raise ValueError unless a row has the header's columns; empty ones at its end do no harm."""
    if len(cells) < len(header):
        raise ValueError(f"{place}: has {len(cells)} columns, expected {len(header)}: {header[len(cells)]} is missing.")
    if any(cells[len(header) :]):
        raise ValueError(f"{place}: has {len(cells)} columns, expected {len(header)}: a tab or comma too many.")


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
    rows = _csv_rows(path) if path.suffix == ".csv" else ((number, line.split("\t")) for number, line in _lines(path))
    _, header = next(rows, (1, []))
    columns = [_column(path, header, name) for name in wanted]
    for number, cells in rows:
        place = f"{path}, line {number}"
        _check_width(place, header, cells)
        values = [cells[column] for column in columns]
        yield place, tuple(values[: len(task.texts)]), values[-1] if task.label in wanted else None


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows and the lines that they end at. Raises ValueError for what the csv module cannot read."""
    reader = csv.reader((line + "\n" for _, line in _lines(path)), strict=True)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as mistake:
        raise ValueError(f"{path}, line {reader.line_num}: {mistake}; is a quote not closed?") from mistake


def _read_parquet(task: Task, path: Path, wanted: list[str]) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as missing:
        raise ValueError(f"{path}: needs pyarrow: pip install 'megabert[prep]'.") from missing
    try:
        schema = pyarrow.parquet.read_schema(path)
        for name in wanted:
            if (count := schema.names.count(name)) != 1:
                columns = f"{count} columns" if count else "no column"
                raise ValueError(f"{path}: has {columns} {name}, only {', '.join(schema.names)}.")
        table = pyarrow.parquet.read_table(path, columns=wanted)
        texts = [table[name].to_pylist() for name in task.texts]
        labels = table[task.label].to_pylist() if task.label in wanted else [None] * len(table)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as mistake:
        raise ValueError(f"{path}: not a parquet file that can be read: {one_line(mistake)}") from mistake
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
    names = _names_in_metadata(task, metadata.get(b"huggingface", b"{}"))
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


def _names_in_metadata(task: Task, text: bytes) -> list[str] | None:
    """Names of labels in what the datasets library writes into a parquet file."""
    try:
        found = _inside(json.loads(text), "info", "features", task.label, "names")
    except ValueError:  # another writer's
        return None
    return found if isinstance(found, list) and all(isinstance(name, str) for name in found) else None


def _names_in_readme(task: Task, path: Path) -> list[str] | None:
    """Names of labels in the YAML at the top of a hub data set's README."""
    if not path.is_file():
        return None
    match = re.match(rb"---\r?\n(.*?)\n---", path.read_bytes(), re.DOTALL)
    try:
        infos = _inside(yaml.safe_load(match[1]), "dataset_info") if match else None
    except yaml.YAMLError as mistake:
        raise ValueError(f"{path}: what its first lines say is not valid YAML: {one_line(mistake)}") from mistake
    for info in infos if isinstance(infos, list) else [infos]:
        features = _inside(info, "features")
        if _inside(info, "config_name") == task.name and isinstance(features, list):
            for feature in features:
                names = _inside(feature, "dtype", "class_label", "names")
                if _inside(feature, "name") == task.label and isinstance(names, dict):
                    numbers = {str(number): str(name) for number, name in names.items()}
                    if sorted(numbers) == sorted(map(str, range(len(numbers)))):
                        return [numbers[str(number)] for number in range(len(numbers))]
    return None


def _inside(value: Any, *keys: str) -> Any:
    """What is under these keys, one in the other; None if anything is not there, or is no object."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


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
