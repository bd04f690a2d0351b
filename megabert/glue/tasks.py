"""What a fine-tuning task is: texts, labels, a metric."""

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Examples(NamedTuple):
    """texts and labels, one each per example."""

    texts: list[str]
    labels: list[int]


@dataclass(frozen=True, kw_only=True)
class Task:
    name: str
    num_labels: int
    metric: Literal["accuracy"]
