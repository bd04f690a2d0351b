"""Read fine-tuning protocols, YAML files with the hyper-parameters, seeds and starting points of each task."""

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import FiniteFloat

from megabert.config.cli import nearest
from megabert.config.settings import check_limits, check_once, required, setting, shortened
from megabert.config.strict_yaml import build, check_keys, read_dataclass
from megabert.finetune.tasks.task import GLUE, Metric, Task

# Each seed and candidate of a task is a job of minutes or hours.
MAX_SEEDS, MAX_CANDIDATES = 1000, 10_000

MNLI = "mnli"
CHECKPOINT = "checkpoint"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyper-parameters of one fine-tuning. The learning rate warms up and decays to 0, both linearly."""

    lr: FiniteFloat = required("(0, 10]")
    """peak learning rate"""
    epochs: int = required("[1, 1e6]")
    """passes over the training examples"""
    batch_size: int = required("[1, 65536]")
    """examples per step"""
    weight_decay: FiniteFloat = setting(0.0, "[0, 100]")
    """torch's convention: each step multiplies weights by 1 - lr * weight_decay"""
    decoupled_decay: bool = False
    """each step at the peak learning rate multiplies weights by 1 - weight_decay, as in Composer's DecoupledAdamW"""
    max_seq_len: int = setting(256, "[8, 1048576]")
    """truncate longer examples, tokens; a model with fewer learned positions truncates to those"""
    warmup: FiniteFloat = setting(0.06, "[0, 1]")
    """share of the steps that warms up"""
    beta1: FiniteFloat = setting(0.9, "[0, 1)")
    beta2: FiniteFloat = setting(0.98, "[0, 1)")
    eps: FiniteFloat = setting(1e-6, "[1e-30, 0.1]")
    """of AdamW; a smaller one is 0 in fp32, and updates NaN"""
    max_grad_norm: FiniteFloat = setting(0.0, "[0, 1e6]")
    """clip the gradient to this norm; 0: never"""
    decay_norms_and_biases: bool = True
    dropout: FiniteFloat | None = setting(None, "[0, 1)")
    """on hidden states and before the classifier; null: as in the model's config"""
    attention_dropout: FiniteFloat | None = setting(None, "[0, 1)")
    """null: as in the model's config"""
    pooling: Literal["cls", "mean"] = "cls"
    """input of the classifier: the first token or the mean of all; the mean suits encoders trained only briefly"""
    rescale_embeddings: bool = False
    """scale the embeddings back to their initial norm: the outputs stay, but AdamW turns the embeddings faster"""
    precision: Literal["auto", "fp32"] = "auto"
    """auto: bf16 where the device is fast at it"""
    max_train_examples: int = setting(0, "[0, 1e9]")
    """train on a random subset of this size, the same for every seed; 0: on all"""
    max_dev_examples: int = setting(0, "[0, 1e9]")
    """score a random subset of this size; 0: all"""

    def __post_init__(self):
        check_limits(self)
        if self.decoupled_decay and self.weight_decay >= 1:
            raise ValueError(f"weight_decay is {self.weight_decay}, expected less than 1 with decoupled_decay.")

    @property
    def torch_decay(self) -> float:
        """The weight decay in torch's convention."""
        return self.weight_decay / self.lr if self.decoupled_decay else self.weight_decay

    @property
    def betas(self) -> tuple[float, float]:
        return self.beta1, self.beta2


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """How a protocol fine-tunes one task."""

    candidates: tuple[Settings, ...]
    """several are a sweep, and the best of it counts"""
    seeds: tuple[int, ...]
    start: Literal["checkpoint", "mnli"] = CHECKPOINT
    """mnli: start from the encoder that was fine-tuned on MNLI"""
    metrics: tuple[Metric, ...] = ()
    """the task's metrics whose mean is its score; empty: all"""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    name: str
    about: str
    plans: dict[str, TaskPlan]
    """by name of the task"""
    default_plan: TaskPlan
    """for the other tasks"""

    def plan_for(self, task: Task) -> TaskPlan:
        return self.plans.get(task.name, self.default_plan)


@dataclass(frozen=True, kw_only=True)
class TaskSection:
    """The keys of one task in a protocol file, next to any fields of Settings."""

    seeds: tuple[int, ...] | None = None
    start: Literal["checkpoint", "mnli"] = CHECKPOINT
    sweep: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()

    def __post_init__(self):
        _check_seeds(self.seeds)
        _check_sweep(self.sweep)
        check_once("metrics", self.metrics)


@dataclass(frozen=True, kw_only=True)
class ProtocolFile:
    """The keys of a protocol file. A task's own settings, seeds and sweep replace the general ones."""

    about: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    """fields of Settings, which are checked together with a task's own"""
    seeds: tuple[int, ...] = (19,)
    sweep: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    """fields of Settings with the values to try, in every combination"""
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self):
        _check_seeds(self.seeds)
        _check_sweep(self.sweep)


def _check_seeds(seeds: tuple[int, ...] | None) -> None:
    if seeds is not None and (not seeds or not all(0 <= seed < 2**63 for seed in seeds)):
        raise ValueError(f"seeds is {shortened(list(seeds))}, expected a list of integers from 0 to 2**63 - 1.")
    if seeds is not None and len(seeds) > MAX_SEEDS:
        raise ValueError(f"seeds has {len(seeds):,} of them, expected at most {MAX_SEEDS:,}.")
    check_once("seeds", seeds or ())


def _check_sweep(sweep: dict[str, tuple[Any, ...]]) -> None:
    for name, values in sweep.items():
        if not values:
            raise ValueError(f"sweep.{name} is [], expected a list of values.")


FIELDS = {setting.name for setting in dataclasses.fields(Settings)}
TASK_KEYS = {setting.name for setting in dataclasses.fields(TaskSection)}


def protocol_names() -> list[str]:
    """List the protocols that come with the package."""
    folder = resources.files("megabert.finetune") / "protocols"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_protocol(name: str, tasks: list[Task]) -> Protocol:
    """Read one of the package's protocols by name, or a YAML file. It may name these tasks and GLUE's.

    Raises ValueError naming the file and the wrong key.
    """
    path = _protocol_path(name)
    file = read_dataclass(ProtocolFile, path)
    known = GLUE | {task.name: task for task in tasks}
    check_keys(path, file.settings, FIELDS, "settings")
    check_keys(path, file.sweep, FIELDS, "sweep")
    check_keys(path, file.tasks, known, "tasks")
    default = _plan(path, file, "settings", {})
    plans = {task: _plan(path, file, f"tasks.{task}", own) for task, own in file.tasks.items()}
    for task, plan in plans.items():
        if unknown := [metric for metric in plan.metrics if metric not in known[task].metrics]:
            expected = ", ".join(known[task].metrics)
            raise ValueError(f"{path}: tasks.{task}.metrics has {unknown[0]}, expected some of {expected}.")
    if MNLI in plans and plans[MNLI].start == MNLI:
        raise ValueError(f"{path}: tasks.{MNLI}.start is {MNLI}: it cannot start from itself.")
    return Protocol(name=path.stem, about=" ".join(file.about.split()), plans=plans, default_plan=default)


def _protocol_path(name: str) -> Path:
    known = protocol_names()
    if name in known:
        return Path(str(resources.files("megabert.finetune") / "protocols" / f"{name}.yaml"))
    if Path(name).is_file():
        return Path(name)
    hint = nearest(name, known, otherwise="")
    raise ValueError(f"protocol {name!r} is neither a file nor one of {', '.join(known)}.{hint}")


def _plan(path: Path, file: ProtocolFile, key: str, own: dict[str, Any]) -> TaskPlan:
    """Combine the general keys of a file with those of one task. key: of the task, for error messages."""
    check_keys(path, own, FIELDS | TASK_KEYS, key)
    section = build(TaskSection, {name: value for name, value in own.items() if name in TASK_KEYS}, path, key)
    check_keys(path, section.sweep, FIELDS, f"{key}.sweep")
    settings = file.settings | {name: value for name, value in own.items() if name in FIELDS}
    sweep = file.sweep | section.sweep
    if (count := math.prod(map(len, sweep.values()))) > MAX_CANDIDATES:
        raise ValueError(f"{path}: {key}.sweep: has {count:,} combinations, expected at most {MAX_CANDIDATES:,}.")
    candidates = tuple(
        build(Settings, settings | dict(zip(sweep, values, strict=True)), path, key)
        for values in itertools.product(*sweep.values())
    )
    if len(set(candidates)) < len(candidates):
        raise ValueError(f"{path}: {key}.sweep: has a value twice.")
    return TaskPlan(
        candidates=candidates,
        seeds=file.seeds if section.seeds is None else section.seeds,
        start=section.start,
        metrics=section.metrics,
    )
