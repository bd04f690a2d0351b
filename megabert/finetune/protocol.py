"""A protocol: which hyper-parameters, seeds and starting points a task is fine-tuned with. YAML, read strictly."""

import dataclasses
import itertools
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from megabert.config.cli import nearest
from megabert.finetune.tasks.task import GLUE, METRICS, Task, one_line

MNLI = "mnli"
CHECKPOINT = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyper-parameters of one fine-tuning. The learning rate warms up and falls to 0, both linearly."""

    lr: float
    """peak learning rate"""
    epochs: int
    """passes over the training examples"""
    batch_size: int
    """examples per step"""
    weight_decay: float = 0.0
    """torch's convention: each step takes lr * weight_decay of the weights"""
    decoupled_decay: bool = False
    """weight_decay is itself what a step at the peak learning rate takes, as in Composer's DecoupledAdamW"""
    max_seq_len: int = 256
    """longer examples are truncated, tokens; a model with fewer learned positions truncates sooner"""
    warmup: float = 0.06
    """share of the steps that warms up"""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    max_grad_norm: float = 0.0
    """clip to this norm; 0: never"""
    decay_norms_and_biases: bool = True
    dropout: float | None = None
    """on hidden states and before the classifier; null: as in the model's config"""
    attention_dropout: float | None = None
    """null: as in the model's config"""
    pooling: Literal["cls", "mean"] = "cls"
    """what the classifier sees: the first token or the mean of all; the mean suits encoders trained only briefly"""
    rescale_embeddings: bool = False
    """bring the embeddings back to their initial norm, which changes no output, so that they turn as fast as fresh ones"""
    precision: Literal["auto", "fp32"] = "auto"
    """auto: bf16 where the device is fast at it"""
    max_train_examples: int = 0
    """train on a random part of so many examples, the same for every seed; 0: on all"""
    max_dev_examples: int = 0
    """the same for what is scored"""

    def __post_init__(self):
        at_least = {
            "lr": 1e-12, "epochs": 1, "batch_size": 1, "weight_decay": 0, "max_seq_len": 8, "eps": 1e-30, "max_grad_norm": 0,
            "max_train_examples": 0, "max_dev_examples": 0,
        }  # fmt: skip
        for name, low in at_least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {low}")
        for name in ("beta1", "beta2", "dropout", "attention_dropout"):
            if (value := getattr(self, name)) is not None and not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, expected 0 or more, and less than 1")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is {self.warmup}, expected 0 to 1")

    @property
    def torch_decay(self) -> float:
        """The weight decay in torch's convention."""
        return self.weight_decay / self.lr if self.decoupled_decay else self.weight_decay

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta1, self.beta2


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a protocol asks for one task. candidates: more than one is a sweep, whose best counts."""

    candidates: tuple[Settings, ...]
    seeds: tuple[int, ...]
    start: str = CHECKPOINT
    """checkpoint, or mnli: the encoder that MNLI left"""
    metrics: tuple[str, ...] = ()
    """which of the task's metrics make its score; none named: all"""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    name: str
    about: str
    plans: dict[str, Plan]
    other: Plan
    """for the tasks that it does not name"""

    def plan(self, task: Task) -> Plan:
        return self.plans.get(task.name, self.other)


def protocol_names() -> list[str]:
    folder = resources.files("megabert.finetune") / "protocols"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_protocol(name: str, chosen: list[Task]) -> Protocol:
    """One of ours by name, or a YAML file. chosen: the tasks to be done; it may name these and GLUE's.

    Raises ValueError naming the file and the key that is wrong.
    """
    if name in protocol_names():
        path = Path(str(resources.files("megabert.finetune") / "protocols" / f"{name}.yaml"))
    elif Path(name).is_file():
        path = Path(name)
    else:
        known = protocol_names()
        raise ValueError(f"protocol {name!r} is neither a file nor one of {', '.join(known)}.{nearest(name, known)}")
    try:
        raw = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as mistake:
        raise ValueError(f"{path}: not valid YAML: {one_line(mistake)}") from mistake
    known = {"about", "settings", "seeds", "sweep", "tasks"}
    _check_keys(path, "", raw, known)
    general = {key: raw[key] for key in ("settings", "seeds", "sweep") if key in raw}
    tasks = GLUE | {task.name: task for task in chosen}
    plans = {}
    if "tasks" in raw:
        _check_keys(path, "tasks", raw["tasks"], set(tasks))
        plans = {task: _plan(path, f"tasks.{task}", general, own) for task, own in raw["tasks"].items()}
    for task, plan in plans.items():
        if unfit := [metric for metric in plan.metrics if metric not in tasks[task].metrics]:
            known = ", ".join(tasks[task].metrics)
            raise ValueError(f"{path}: tasks.{task}.metrics has {unfit[0]}, expected some of {known}.")
    if MNLI in plans and plans[MNLI].start == MNLI:
        raise ValueError(f"{path}: tasks.{MNLI}.start is {MNLI}: it cannot start from itself.")
    about = " ".join(str(raw.get("about", "")).split())
    return Protocol(name=path.stem, about=about, plans=plans, other=_plan(path, "settings", general, {}))


def _check_keys(path: Path, where: str, raw: Any, known: set[str]) -> None:
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: {where or 'the file'} is {raw!r}, expected keys and values.")
    for key in raw:
        if key not in known:
            raise ValueError(
                f"{path}: unknown key {where}{'.' if where else ''}{key}.{nearest(str(key), sorted(known))}"
            )


def _plan(path: Path, where: str, general: dict[str, Any], own: dict[str, Any]) -> Plan:
    """own: settings of one task, its seeds, its start and its sweep, over the general ones."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    _check_keys(path, where, own, fields | {"seeds", "start", "sweep", "metrics"})
    _check_keys(path, "settings", general.get("settings", {}), fields)
    sweeps = [general.get("sweep", {}), own.get("sweep", {})]
    for one in sweeps:
        _check_keys(path, f"{where}.sweep", one, fields)
    sweep = sweeps[0] | sweeps[1]
    settings = general.get("settings", {}) | {key: value for key, value in own.items() if key in fields}
    seeds = own.get("seeds", general.get("seeds", [19]))
    start = own.get("start", CHECKPOINT)
    _check_seeds(path, f"{where}.seeds", seeds)
    if start not in (CHECKPOINT, MNLI):
        raise ValueError(f"{path}: {where}.start is {start!r}, expected {CHECKPOINT} or {MNLI}.")
    metrics = own.get("metrics", [])
    if not isinstance(metrics, list) or not all(isinstance(one, str) and one in METRICS for one in metrics):
        raise ValueError(f"{path}: {where}.metrics is {metrics!r}, expected some of {', '.join(METRICS)}.")
    names, values = list(sweep), list(sweep.values())
    for name, choices in sweep.items():
        if not isinstance(choices, list) or not choices:
            raise ValueError(f"{path}: {where}.sweep.{name} is {choices!r}, expected a list of values.")
    candidates = tuple(
        _settings(path, where, settings | dict(zip(names, chosen, strict=True)))
        for chosen in itertools.product(*values)
    )
    if len(set(candidates)) < len(candidates):
        raise ValueError(f"{path}: {where}.sweep: has a value twice.")
    return Plan(candidates=candidates, seeds=tuple(seeds), start=start, metrics=tuple(metrics))


def _check_seeds(path: Path, where: str, seeds: Any) -> None:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds):
        raise ValueError(f"{path}: {where} is {seeds!r}, expected a list of whole numbers from 0 on.")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"{path}: {where} is {seeds!r}, which has a seed twice.")


def _settings(path: Path, where: str, values: dict[str, Any]) -> Settings:
    """Raises ValueError for a value of another type, or none where there is no default."""
    checked: dict[str, Any] = {}
    for field in dataclasses.fields(Settings):
        if field.name not in values:
            if field.default is dataclasses.MISSING:
                raise ValueError(f"{path}: {where} does not say {field.name}.")
            continue
        checked[field.name] = _value(path, f"{where}.{field.name}", field.type, values[field.name])
    try:
        return Settings(**checked)
    except ValueError as mistake:
        raise ValueError(f"{path}: {where}.{mistake}.") from mistake


def _value(path: Path, where: str, wanted: Any, value: Any) -> Any:
    """A number is a number, with or without a point; YAML reads 5e-5 as a text."""
    if wanted in (float, float | None):
        if value is None and wanted is not float:
            return None
        try:
            number = float("" if isinstance(value, bool) else value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{path}: {where} is {value!r}, expected a number.")
        return number
    if wanted in (int, bool):
        if type(value) is not wanted:
            raise ValueError(
                f"{path}: {where} is {value!r}, expected {'true or false' if wanted is bool else 'a whole number'}."
            )
        return value
    if not isinstance(value, str) or value not in wanted.__args__:
        raise ValueError(f"{path}: {where} is {value!r}, expected {' or '.join(wanted.__args__)}.")
    return value
