"""What a fine-tuning task is: text columns, labels by name, metrics, files. GLUE's, and those of a user's YAML file."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from megabert.flags import nearest

METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")
CONTINUOUS = ("pearson", "spearman")


class Examples(NamedTuple):
    """first: a text per example; second: its partner, in tasks on pairs; labels: numbers of labels, or scores; None in a test set."""

    first: list[str]
    second: list[str] | None
    labels: list[int] | list[float] | None


@dataclass(frozen=True, kw_only=True)
class Tsv:
    """Where one file of GLUE's own layout has what, counting columns from 0; -1 is the last."""

    file: str
    texts: tuple[int, ...]
    label: int | None = None
    header: bool = True
    skip_short: bool = False
    """QQP has a few rows that end early; every reader of it leaves them out"""


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


def _plain(texts: tuple[int, ...], label: int, test: tuple[int, ...], skip_short: bool = False) -> dict[str, Tsv]:
    return _tsv(
        Tsv(file="train.tsv", texts=texts, label=label, skip_short=skip_short), Tsv(file="test.tsv", texts=test)
    )


ENTAILMENT = ("entailment", "not_entailment")
INFERENCE = ("entailment", "neutral", "contradiction")
SIDES = ("matched", "mismatched")
_MNLI = Tsv(file="train.tsv", texts=(8, 9), label=-1)

# Columns of the TSV files as in transformers v4's data/processors/glue.py; names and order of labels as nyu-mll/glue has them.
GLUE = {
    task.name: task
    for task in (
        Task(
            name="cola", texts=("sentence",), labels=("unacceptable", "acceptable"), metrics=("matthews",), folder="CoLA",
            tsv=_tsv(Tsv(file="train.tsv", texts=(3,), label=1, header=False), Tsv(file="test.tsv", texts=(1,))), numbered=True,
        ),
        Task(
            name="sst2", texts=("sentence",), labels=("negative", "positive"), metrics=("accuracy",), folder="SST-2",
            tsv=_plain((0,), 1, (1,)), numbered=True,
        ),
        Task(
            name="mrpc", texts=("sentence1", "sentence2"), labels=("not_equivalent", "equivalent"), metrics=("accuracy", "f1"),
            folder="MRPC", tsv=_plain((3, 4), 0, (3, 4)), numbered=True,
        ),
        Task(
            name="stsb", texts=("sentence1", "sentence2"), metrics=("pearson", "spearman"), folder="STS-B",
            tsv=_plain((7, 8), -1, (7, 8)),
        ),
        Task(
            name="qqp", texts=("question1", "question2"), labels=("not_duplicate", "duplicate"), metrics=("accuracy", "f1"),
            folder="QQP", tsv=_plain((3, 4), 5, (1, 2), skip_short=True), numbered=True,
        ),
        Task(
            name="mnli", texts=("premise", "hypothesis"), labels=INFERENCE, metrics=("accuracy",), folder="MNLI",
            dev={side: f"validation_{side}" for side in SIDES}, test={side: f"test_{side}" for side in SIDES},
            tsv={"train": _MNLI}
            | {f"validation_{side}": dataclasses.replace(_MNLI, file=f"dev_{side}.tsv") for side in SIDES}
            | {f"test_{side}": Tsv(file=f"test_{side}.tsv", texts=(8, 9)) for side in SIDES},
        ),
        Task(
            name="qnli", texts=("question", "sentence"), labels=ENTAILMENT, metrics=("accuracy",), folder="QNLI",
            tsv=_plain((1, 2), -1, (1, 2)),
        ),
        Task(
            name="rte", texts=("sentence1", "sentence2"), labels=ENTAILMENT, metrics=("accuracy",), folder="RTE",
            tsv=_plain((1, 2), -1, (1, 2)),
        ),
        Task(
            name="wnli", texts=("sentence1", "sentence2"), labels=("not_entailment", "entailment"), metrics=("accuracy",),
            folder="WNLI", tsv=_plain((1, 2), -1, (1, 2)), numbered=True,
        ),
        # Only a test set, which MNLI's model labels.
        Task(
            name="ax", texts=("premise", "hypothesis"), labels=INFERENCE, metrics=("matthews",), folder="diagnostic", dev={},
            tsv={"test": Tsv(file="diagnostic.tsv", texts=(1, 2))},
        ),
    )
}  # fmt: skip
EIGHT = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")

KEYS = ("name", "texts", "label", "labels", "metrics", "train", "dev", "test")


def choose_tasks(names: str) -> list[Task]:
    """all, or GLUE tasks by name with commas between. Raises ValueError for an unknown one."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    chosen = [one for name in chosen for one in (EIGHT if name == "all" else (name,))]
    for name in chosen:
        if name not in GLUE:
            raise ValueError(f"--tasks {name}: expected all, or some of {', '.join(GLUE)}.{nearest(name, list(GLUE))}")
    return [GLUE[name] for name in dict.fromkeys(chosen)]


def read_task(path: Path) -> Task:
    """Read a task of the user's from YAML. Raises ValueError naming the file and the key that is wrong."""
    try:
        raw = yaml.safe_load(path.read_text())
    except FileNotFoundError as missing:
        raise ValueError(f"--task-file {path}: no such file.") from missing
    except yaml.YAMLError as mistake:
        raise ValueError(f"{path}: not valid YAML: {mistake}") from mistake
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
    if raw["name"] in GLUE:
        raise ValueError(f"{path}: name {raw['name']} is a GLUE task's; choose another.")
    splits = {"train": "train", "dev": "validation", "test": "test"}
    files = {split: str(raw[key]) for key, split in splits.items() if key in raw}
    return Task(
        name=str(raw["name"]), texts=texts, label=str(raw.get("label", "label")), labels=labels, metrics=metrics, files=files,
        test={"": "test"} if "test" in files else {},
    )  # fmt: skip


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
