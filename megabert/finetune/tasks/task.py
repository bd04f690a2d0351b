"""Define the text columns, names of labels, metrics and files of GLUE's tasks, and read a user's task file."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from megabert.config.cli import nearest
from megabert.config.settings import COMMAND_OR_ADDRESS, check_once, shortened
from megabert.config.strict_yaml import Name, read_dataclass

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
METRICS: tuple[Metric, ...] = get_args(Metric)
REGRESSION_METRICS = ("pearson", "spearman")


class Examples(NamedTuple):
    """The examples of one split.

    first: the text of each example; second: the other text of each pair, None for tasks on single texts;
    labels: indices of labels or regression targets, None in a test set.
    """

    first: list[str]
    second: list[str] | None
    labels: list[int] | list[float] | None


@dataclass(frozen=True, kw_only=True)
class TableLayout:
    """One file in GLUE's own layout: which columns hold the texts and the label."""

    file: str
    texts: tuple[str, ...]
    label: str | None = None
    columns: tuple[str, ...] = ()
    """names of all columns, for a file without a header line"""
    has_broken_rows: bool = False
    """a few rows of QQP are cut by line breaks (https://github.com/nyu-mll/GLUE-baselines/issues/5): skip them"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task. `labels` are in the order of the model's outputs; a regression has none."""

    name: str
    texts: tuple[str, ...]
    """names of the one or two text columns"""
    label: str = "label"
    """name of the label column"""
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...]
    """a task's score is their mean"""
    dev: dict[str, str] = field(default_factory=lambda: {"": "validation"})
    """evaluation sets: suffix of the metric's name -> split"""
    test: dict[str, str] = field(default_factory=lambda: {"": "test"})
    """test sets, which have no labels: suffix -> split"""
    folder: str = ""
    """folder in GLUE's own layout"""
    tsv: dict[str, TableLayout] = field(default_factory=dict)
    """split -> its file in that layout"""
    numbered: bool = False
    """whether the files of that layout write labels as numbers, in the order of `labels`"""
    files: dict[str, str] = field(default_factory=dict)
    """split -> file, for a user's task"""

    @property
    def num_labels(self) -> int:
        """Number of the model's outputs."""
        return len(self.labels) or 1

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def scores_training_file(self) -> bool:
        return bool(self.files) and self.files["train"] == self.files["validation"]


def _splits(train: TableLayout, test: TableLayout) -> dict[str, TableLayout]:
    return {"train": train, "validation": dataclasses.replace(train, file="dev.tsv"), "test": test}


def _layouts(*texts: str, label: str, has_broken_rows: bool = False) -> dict[str, TableLayout]:
    """Return the layouts of a task whose three files have headers with the same names."""
    train = TableLayout(file="train.tsv", texts=texts, label=label, has_broken_rows=has_broken_rows)
    return _splits(train, TableLayout(file="test.tsv", texts=texts))


ENTAILMENT = ("entailment", "not_entailment")
INFERENCE = ("entailment", "neutral", "contradiction")
MNLI_SETS = ("matched", "mismatched")
PAIR = ("sentence1", "sentence2")
MNLI_TRAIN = TableLayout(file="train.tsv", texts=PAIR, label="gold_label")
COLA_COLUMNS = ("source", "label", "star", "sentence")

# Columns of the TSV files as in huggingface/datasets 2.x's datasets/glue/glue.py and transformers v4's
# data/processors/glue.py; names and order of labels as in nyu-mll/glue.
GLUE = {
    task.name: task
    for task in (
        Task(
            name="cola",
            texts=("sentence",),
            labels=("unacceptable", "acceptable"),
            metrics=("matthews",),
            folder="CoLA",
            tsv=_splits(
                TableLayout(file="train.tsv", texts=("sentence",), label="label", columns=COLA_COLUMNS),
                TableLayout(file="test.tsv", texts=("sentence",)),
            ),
            numbered=True,
        ),
        Task(
            name="sst2",
            texts=("sentence",),
            labels=("negative", "positive"),
            metrics=("accuracy",),
            folder="SST-2",
            tsv=_layouts("sentence", label="label"),
            numbered=True,
        ),
        Task(
            name="mrpc",
            texts=PAIR,
            labels=("not_equivalent", "equivalent"),
            metrics=("accuracy", "f1"),
            folder="MRPC",
            tsv=_layouts("#1 String", "#2 String", label="Quality"),
            numbered=True,
        ),
        Task(
            name="stsb",
            texts=PAIR,
            metrics=("pearson", "spearman"),
            folder="STS-B",
            tsv=_layouts(*PAIR, label="score"),
        ),
        Task(
            name="qqp",
            texts=("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            metrics=("accuracy", "f1"),
            folder="QQP",
            tsv=_layouts("question1", "question2", label="is_duplicate", has_broken_rows=True),
            numbered=True,
        ),
        Task(
            name="mnli",
            texts=("premise", "hypothesis"),
            labels=INFERENCE,
            metrics=("accuracy",),
            folder="MNLI",
            dev={name: f"validation_{name}" for name in MNLI_SETS},
            test={name: f"test_{name}" for name in MNLI_SETS},
            tsv={"train": MNLI_TRAIN}
            | {f"validation_{name}": dataclasses.replace(MNLI_TRAIN, file=f"dev_{name}.tsv") for name in MNLI_SETS}
            | {f"test_{name}": TableLayout(file=f"test_{name}.tsv", texts=PAIR) for name in MNLI_SETS},
        ),
        Task(
            name="qnli",
            texts=("question", "sentence"),
            labels=ENTAILMENT,
            metrics=("accuracy",),
            folder="QNLI",
            tsv=_layouts("question", "sentence", label="label"),
        ),
        Task(
            name="rte",
            texts=PAIR,
            labels=ENTAILMENT,
            metrics=("accuracy",),
            folder="RTE",
            tsv=_layouts(*PAIR, label="label"),
        ),
        Task(
            name="wnli",
            texts=PAIR,
            labels=("not_entailment", "entailment"),
            metrics=("accuracy",),
            folder="WNLI",
            tsv=_layouts(*PAIR, label="label"),
            numbered=True,
        ),
        # It has only a test set, which MNLI's model labels.
        Task(
            name="ax",
            texts=("premise", "hypothesis"),
            labels=INFERENCE,
            metrics=("matthews",),
            folder="diagnostic",
            dev={},
            tsv={"test": TableLayout(file="diagnostic.tsv", texts=PAIR)},
        ),
    )
}
# The tasks that GLUE's average is usually taken over; "all" on the command line.
EIGHT = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")


@dataclass(frozen=True, kw_only=True)
class TaskFile:
    """The keys of a user's task file. Names may be given as integers, as in labels: [0, 1]."""

    name: Name
    texts: tuple[Name, ...]
    label: str = "label"
    labels: tuple[Name, ...] = ()
    metrics: tuple[Name, ...]
    train: str
    dev: str
    test: str | None = None

    def __post_init__(self):
        # The task's name becomes a part of file names.
        if not re.fullmatch(r"[\w.-]+", self.name) or self.name.startswith("."):
            raise ValueError(
                f"name is {shortened(self.name)}, expected letters, digits, '.', '_' and '-', and no '.' at the start."
            )
        if self.name in GLUE:
            raise ValueError(f"name is {self.name}, which is a GLUE task; choose another.")
        if not 1 <= len(self.texts) <= 2:
            raise ValueError(f"texts has {len(self.texts)} columns, expected 1, or 2 for pairs.")
        check_once("texts", self.texts)
        if len(self.labels) == 1 or len(set(self.labels)) != len(self.labels):
            raise ValueError(
                f"labels is {shortened(list(self.labels))}, expected two or more different names, or none at all."
            )
        if odd := [name for name in self.labels if set(name) & set("\t\r\n\0")]:
            raise ValueError(f"labels has {odd[0]!r}, expected names without tabs and line breaks.")
        if self.label in self.texts:
            raise ValueError(f"label is {self.label}, which is one of the texts.")
        for key in ("label", "train", "dev", "test"):
            if getattr(self, key) == "":
                raise ValueError(f"{key} is empty.")
        for key in ("train", "dev", "test"):
            _check_path(key, getattr(self, key))
        self._check_metrics()

    def _check_metrics(self) -> None:
        fitting = [
            name
            for name in METRICS
            if (name in REGRESSION_METRICS) == (not self.labels) and (name != "f1" or len(self.labels) == 2)
        ]
        expected = f"expected some of {', '.join(fitting)}."
        if not self.metrics:
            raise ValueError(f"metrics is empty, {expected}")
        check_once("metrics", self.metrics)
        for name in self.metrics:
            if name not in fitting:
                kind = f"{len(self.labels)} labels" if self.labels else "a regression (no labels)"
                raise ValueError(f"metrics has {shortened(name)}, which does not fit {kind}: {expected}")


def _check_path(key: str, path: str | None) -> None:
    """Raise ValueError for what other programs read as a command or an address: a task file may come with data."""
    if path is not None and (match := COMMAND_OR_ADDRESS.match(path)):
        raise ValueError(
            f"{key} begins with {match[0]}, expected a file: a task file may come with data, so it names files only, "
            "and never a command or an address."
        )
    if path is not None and "\0" in path:
        raise ValueError(f"{key} is {path!r}, expected the name of a file.")


def glue_tasks(names: str) -> list[Task]:
    """Return GLUE tasks by their names, separated by commas, or the eight for "all".

    Raises ValueError for an unknown name, for one that is listed twice, and for commas without a name.
    """
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if names and not chosen:
        raise ValueError(f"--tasks {names}: names no task; expected all, or some of {', '.join(GLUE)}.")
    check_once("--tasks", chosen)
    chosen = [one for name in chosen for one in (EIGHT if name == "all" else (name,))]
    for name in chosen:
        if name not in GLUE:
            hint = nearest(name, list(GLUE), otherwise="")
            raise ValueError(f"--tasks {name}: expected all, or some of {', '.join(GLUE)}.{hint}")
    return [GLUE[name] for name in dict.fromkeys(chosen)]


def read_task(path: Path) -> Task:
    """Read a user's task file. Raises ValueError naming the file and the wrong key."""
    try:
        read = read_dataclass(TaskFile, path)
    except FileNotFoundError as error:
        raise ValueError(f"--task-file {path}: no such file.") from error
    files = {"train": read.train, "validation": read.dev}
    if read.test is not None:
        files["test"] = read.test
    return Task(
        name=read.name,
        texts=read.texts,
        label=read.label,
        labels=read.labels,
        metrics=read.metrics,
        files=files,
        test={"": "test"} if read.test is not None else {},
    )
