"""Read a task's examples from GLUE's TSV files, the hub's parquet files, or the files of a user's task."""

import math
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from megabert.config.settings import shortened
from megabert.files.hashing import file_sha256
from megabert.finetune.tasks.formats import read_rows
from megabert.finetune.tasks.task import Examples, TableLayout, Task

# The examples of a split are held in memory. GLUE's largest has 393 thousand, of some 200 characters each.
MAX_EXAMPLES, MAX_CHARACTERS, MAX_TEXT_CHARACTERS = 50_000_000, 2_000_000_000, 10_000_000
# The square of a regression's error must be finite in fp32.
MAX_TARGET = 1e15
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,4})?")
SURROGATE = re.compile("[\ud800-\udfff]")


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
        layout = TableLayout(file=files[0].name, texts=task.texts, label=task.label if has_labels else None)
    texts: list[tuple[str, ...]] = []
    labels, characters = [], 0
    for path in files:
        for where, row_texts, label in read_rows(task, path, layout):
            names = zip(layout.texts, row_texts, strict=True)
            texts.append(tuple(_text(text, f"{where}, column {name}") for name, text in names))
            if layout.label is not None:
                labels.append(_label(task, label, f"{where}, column {layout.label}"))
            characters += sum(map(len, texts[-1]))
            if len(texts) > MAX_EXAMPLES or characters > MAX_CHARACTERS:
                raise ValueError(
                    f"{where}: more than {MAX_EXAMPLES:,} examples or {MAX_CHARACTERS:,} characters are in one split, "
                    "which is held in memory. Use a part of it."
                )
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


def _text(value: object, where: str) -> str:
    """Return a text. Raises ValueError unless it is a string that a tokenizer can read."""
    if not isinstance(value, str):
        raise ValueError(f"{where}: is {_shown(value)}, expected a string.")
    if len(value) > MAX_TEXT_CHARACTERS:
        raise ValueError(f"{where}: has {len(value):,} characters, expected at most {MAX_TEXT_CHARACTERS:,}.")
    if "\0" in value or SURROGATE.search(value):
        raise ValueError(f"{where}: has a NUL or half of a surrogate pair, expected Unicode text.")
    return value


def _label(task: Task, value: object, where: str) -> int | float:
    """Return a label's index, or a regression's target. An integer label counts as its name: 1 is "1"."""
    if task.is_regression:
        return _target(value, where)
    known = task.labels
    name = str(value) if type(value) is int else value
    if name in known:
        return known.index(name)
    numbers = [str(number) for number in range(len(known))] if task.numbered else []
    if name in numbers:
        return numbers.index(name)
    more = f", or 0 to {len(known) - 1}" if task.numbered else ""
    raise ValueError(f"{where}: is {_shown(value)}, expected {', '.join(known)}{more}.")


def _target(value: Any, where: str) -> float:
    """Return a regression's target, from a number or a text that is one."""
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    is_number = is_number or (isinstance(value, str) and NUMBER.fullmatch(value.strip()) is not None)
    try:
        target = float(value) if is_number else math.nan
    except OverflowError:
        target = math.inf
    # This form of the comparison also refuses NaN.
    if not abs(target) <= MAX_TARGET:
        raise ValueError(f"{where}: is {_shown(value)}, expected a number from -{MAX_TARGET:.0e} to {MAX_TARGET:.0e}.")
    return target


def _shown(value: object) -> str:
    return "null" if value is None else shortened(value)
