"""A protocol: which hyper-parameters, seeds and starting points a task is fine-tuned with. YAML, read strictly."""

import dataclasses
import itertools
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from megabert.flags import nearest
from megabert.glue.tasks import METRICS, Task

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
        bounds = {
            "lr": (1e-12, None), "epochs": (1, None), "batch_size": (1, None), "weight_decay": (0, None), "max_seq_len": (8, None),
            "warmup": (0, 1), "beta1": (0, 1), "beta2": (0, 1), "eps": (0, None), "max_grad_norm": (0, None), "dropout": (0, 1),
            "attention_dropout": (0, 1), "max_train_examples": (0, None),
            "max_dev_examples": (0, None),
        }  # fmt: skip
        for name, (low, high) in bounds.items():
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                wanted = f"at least {low}" if high is None else f"{low} to {high}"
                raise ValueError(f"{name} is {value}, expected {wanted}")

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
    folder = resources.files("megabert.glue") / "protocols"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_protocol(name: str) -> Protocol:
    """One of ours by name, or a YAML file. Raises ValueError naming the file and the key that is wrong."""
    if name in protocol_names():
        path = Path(str(resources.files("megabert.glue") / "protocols" / f"{name}.yaml"))
    elif Path(name).is_file():
        path = Path(name)
    else:
        known = protocol_names()
        raise ValueError(f"protocol {name!r} is neither a file nor one of {', '.join(known)}.{nearest(name, known)}")
    try:
        raw = yaml.safe_load(path.read_text())
    except yaml.YAMLError as mistake:
        raise ValueError(f"{path}: not valid YAML: {mistake}") from mistake
    known = {"about", "settings", "seeds", "sweep", "tasks"}
    _check_keys(path, "", raw, known)
    general = {key: raw[key] for key in ("settings", "seeds", "sweep") if key in raw}
    tasks = raw.get("tasks", {})
    plans = {task: _plan(path, f"tasks.{task}", general, own or {}) for task, own in tasks.items()}
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
    sweep = general.get("sweep", {}) | own.get("sweep", {})
    _check_keys(path, f"{where}.sweep", sweep, fields)
    settings = general.get("settings", {}) | {key: value for key, value in own.items() if key in fields}
    seeds = own.get("seeds", general.get("seeds", [19]))
    start = own.get("start", CHECKPOINT)
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"{path}: {where}.seeds is {seeds!r}, expected a list of numbers.")
    if start not in (CHECKPOINT, MNLI):
        raise ValueError(f"{path}: {where}.start is {start!r}, expected {CHECKPOINT} or {MNLI}.")
    metrics = own.get("metrics", [])
    if not isinstance(metrics, list) or not set(metrics) <= set(METRICS):
        raise ValueError(f"{path}: {where}.metrics is {metrics!r}, expected some of {', '.join(METRICS)}.")
    names, values = list(sweep), list(sweep.values())
    if not all(isinstance(choices, list) and choices for choices in values):
        raise ValueError(f"{path}: {where}.sweep: expected a list of values for each of {', '.join(names)}.")
    candidates = tuple(
        _settings(path, where, settings | dict(zip(names, chosen, strict=True)))
        for chosen in itertools.product(*values)
    )
    return Plan(candidates=candidates, seeds=tuple(seeds), start=start, metrics=tuple(metrics))


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
            return float("" if isinstance(value, bool) else value)
        except (TypeError, ValueError) as mistake:
            raise ValueError(f"{path}: {where} is {value!r}, expected a number.") from mistake
    if wanted in (int, bool):
        if type(value) is not wanted:
            raise ValueError(
                f"{path}: {where} is {value!r}, expected {'true or false' if wanted is bool else 'a whole number'}."
            )
        return value
    if value not in wanted.__args__:
        raise ValueError(f"{path}: {where} is {value!r}, expected {' or '.join(wanted.__args__)}.")
    return value
