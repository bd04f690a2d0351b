"""What a fine-tuning task is: text columns, labels by name, metrics, files. GLUE's, and those of a user's YAML file."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megabert.config.cli import nearest

METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")
CONTINUOUS = ("pearson", "spearman")


class Examples(NamedTuple):
    """first: a text per example; second: its partner, in tasks on pairs; labels: numbers of labels, or scores; None in a test set."""

    first: list[str]
    second: list[str] | None
    labels: list[int] | list[float] | None


@dataclass(frozen=True, kw_only=True)
class Tsv:
    """One file of GLUE's own layout: the names of its columns with the texts and the label."""

    file: str
    texts: tuple[str, ...]
    label: str | None = None
    columns: tuple[str, ...] = ()
    """all of its columns, where the file does not name them in its first line"""
    has_broken_rows: bool = False
    """a few of QQP's are cut by line breaks (https://github.com/nyu-mll/GLUE-baselines/issues/5); every reader leaves them out"""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task; `labels` in the order of the model's outputs, none for a regression."""

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
    """unlabelled sets: suffix -> split"""
    folder: str = ""
    """in GLUE's own layout"""
    tsv: dict[str, Tsv] = field(default_factory=dict)
    """split -> its file in that layout"""
    numbered: bool = False
    """whether those files write labels as numbers, in this order"""
    files: dict[str, str] = field(default_factory=dict)
    """split -> file, for a task of the user's"""

    @property
    def num_labels(self) -> int:
        """Outputs of the model."""
        return len(self.labels) or 1

    @property
    def is_regression(self) -> bool:
        return not self.labels


def _tsv(train: Tsv, test: Tsv) -> dict[str, Tsv]:
    return {"train": train, "validation": dataclasses.replace(train, file="dev.tsv"), "test": test}


def _plain(*texts: str, label: str, has_broken_rows: bool = False) -> dict[str, Tsv]:
    return _tsv(
        Tsv(file="train.tsv", texts=texts, label=label, has_broken_rows=has_broken_rows),
        Tsv(file="test.tsv", texts=texts),
    )


ENTAILMENT = ("entailment", "not_entailment")
INFERENCE = ("entailment", "neutral", "contradiction")
SIDES = ("matched", "mismatched")
PAIR = ("sentence1", "sentence2")
_MNLI = Tsv(file="train.tsv", texts=PAIR, label="gold_label")

# Columns of the TSV files as in huggingface/datasets 2.x's datasets/glue/glue.py and transformers v4's data/processors/glue.py; names
# and order of labels as nyu-mll/glue has them.
GLUE = {
    task.name: task
    for task in (
        Task(
            name="cola", texts=("sentence",), labels=("unacceptable", "acceptable"), metrics=("matthews",), folder="CoLA",
            tsv=_tsv(
                Tsv(file="train.tsv", texts=("sentence",), label="label", columns=("source", "label", "star", "sentence")),
                Tsv(file="test.tsv", texts=("sentence",)),
            ),
            numbered=True,
        ),
        Task(
            name="sst2", texts=("sentence",), labels=("negative", "positive"), metrics=("accuracy",), folder="SST-2",
            tsv=_plain("sentence", label="label"), numbered=True,
        ),
        Task(
            name="mrpc", texts=PAIR, labels=("not_equivalent", "equivalent"), metrics=("accuracy", "f1"), folder="MRPC",
            tsv=_plain("#1 String", "#2 String", label="Quality"), numbered=True,
        ),
        Task(
            name="stsb", texts=PAIR, metrics=("pearson", "spearman"), folder="STS-B", tsv=_plain(*PAIR, label="score"),
        ),
        Task(
            name="qqp", texts=("question1", "question2"), labels=("not_duplicate", "duplicate"), metrics=("accuracy", "f1"),
            folder="QQP", tsv=_plain("question1", "question2", label="is_duplicate", has_broken_rows=True), numbered=True,
        ),
        Task(
            name="mnli", texts=("premise", "hypothesis"), labels=INFERENCE, metrics=("accuracy",), folder="MNLI",
            dev={side: f"validation_{side}" for side in SIDES}, test={side: f"test_{side}" for side in SIDES},
            tsv={"train": _MNLI}
            | {f"validation_{side}": dataclasses.replace(_MNLI, file=f"dev_{side}.tsv") for side in SIDES}
            | {f"test_{side}": Tsv(file=f"test_{side}.tsv", texts=PAIR) for side in SIDES},
        ),
        Task(
            name="qnli", texts=("question", "sentence"), labels=ENTAILMENT, metrics=("accuracy",), folder="QNLI",
            tsv=_plain("question", "sentence", label="label"),
        ),
        Task(
            name="rte", texts=PAIR, labels=ENTAILMENT, metrics=("accuracy",), folder="RTE", tsv=_plain(*PAIR, label="label"),
        ),
        Task(
            name="wnli", texts=PAIR, labels=("not_entailment", "entailment"), metrics=("accuracy",), folder="WNLI",
            tsv=_plain(*PAIR, label="label"), numbered=True,
        ),
        # Only a test set, which MNLI's model labels.
        Task(
            name="ax", texts=("premise", "hypothesis"), labels=INFERENCE, metrics=("matthews",), folder="diagnostic", dev={},
            tsv={"test": Tsv(file="diagnostic.tsv", texts=PAIR)},
        ),
    )
}  # fmt: skip
EIGHT = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")

KEYS = ("name", "texts", "label", "labels", "metrics", "train", "dev", "test")


def one_line(mistake: Exception) -> str:
    return " ".join(str(mistake).split())


def choose_tasks(names: str) -> list[Task]:
    """all, or GLUE tasks by name with commas between. Raises ValueError for an unknown one, and for commas alone."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    if names and not chosen:
        raise ValueError(f"--tasks {names}: names no task; expected all, or some of {', '.join(GLUE)}.")
    chosen = [one for name in chosen for one in (EIGHT if name == "all" else (name,))]
    for name in chosen:
        if name not in GLUE:
            raise ValueError(f"--tasks {name}: expected all, or some of {', '.join(GLUE)}.{nearest(name, list(GLUE))}")
    return [GLUE[name] for name in dict.fromkeys(chosen)]


def read_task(path: Path) -> Task:
    """Read a task of the user's from YAML. Raises ValueError naming the file and the key that is wrong."""
    try:
        raw = yaml.safe_load(path.read_bytes())
    except FileNotFoundError as missing:
        raise ValueError(f"--task-file {path}: no such file.") from missing
    except yaml.YAMLError as mistake:
        raise ValueError(f"{path}: not valid YAML: {one_line(mistake)}") from mistake
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: expected keys {', '.join(KEYS)}.")
    for key in raw:
        if key not in KEYS:
            raise ValueError(f"{path}: unknown key {key!r}.{nearest(str(key), list(KEYS))}")
    for key in ("name", "texts", "metrics", "train", "dev"):
        if key not in raw:
            raise ValueError(f"{path}: lacks {key}.")
    texts, metrics = (_names(path, raw, key) for key in ("texts", "metrics"))
    labels = _names(path, raw, "labels") if "labels" in raw else ()
    if not 1 <= len(texts) <= 2:
        raise ValueError(f"{path}: texts has {len(texts)} columns, expected 1, or 2 for pairs.")
    if len(labels) == 1 or len(set(labels)) != len(labels):
        raise ValueError(f"{path}: labels {', '.join(labels)}: expected two or more different names, or none at all.")
    _check_metrics(path, metrics, labels)
    splits = {"train": "train", "dev": "validation", "test": "test"}
    name, label = _name(path, raw["name"]), _text(path, "label", raw.get("label", "label"))
    if label in texts:
        raise ValueError(f"{path}: label is {label}, which is one of the texts.")
    files = {split: _text(path, key, raw[key]) for key, split in splits.items() if key in raw}
    return Task(
        name=name, texts=texts, label=label, labels=labels, metrics=metrics, files=files,
        test={"": "test"} if "test" in files else {},
    )  # fmt: skip


def _name(path: Path, value: Any) -> str:
    """A task's name: it becomes a part of files' names."""
    name = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ValueError(f"{path}: name is {value!r}, expected letters, digits and . _ - alone, and no . at the start.")
    if name in GLUE:
        raise ValueError(f"{path}: name {name} is a GLUE task's; choose another.")
    return name


def _text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{path}: {key} is {value!r}, expected a text.")
    return value


def _names(path: Path, raw: dict[str, Any], key: str) -> tuple[str, ...]:
    values = raw[key]
    if isinstance(values, list) and any(isinstance(value, bool) for value in values):
        raise ValueError(f"{path}: {key} has a bare yes/no/true/false, which YAML reads as a truth value: quote it.")
    if not isinstance(values, list) or not values or not all(isinstance(value, (str, int)) for value in values):
        raise ValueError(f"{path}: {key} is {values!r}, expected a list of names.")
    return tuple(map(str, values))


def _check_metrics(path: Path, metrics: tuple[str, ...], labels: tuple[str, ...]) -> None:
    fitting = [name for name in METRICS if (name in CONTINUOUS) == (not labels) and (name != "f1" or len(labels) == 2)]
    for name in metrics:
        if name not in fitting:
            kind = f"{len(labels)} labels" if labels else "a regression (no labels)"
            raise ValueError(f"{path}: metric {name!r} does not fit {kind}: expected some of {', '.join(fitting)}.")
