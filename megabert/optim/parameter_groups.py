"""Split parameters into groups with and without weight decay, for pretraining and fine-tuning."""

from collections.abc import Iterable
from typing import Any

from torch import nn

Groups = list[dict[str, Any]]


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float, norms_and_biases: bool) -> Groups:
    """Split parameters into a group with weight decay and one without. Empty groups are left out.

    norms_and_biases: apply weight decay to one-dimensional parameters too.
    """
    decaying, others = [], []
    for parameter in parameters:
        (decaying if norms_and_biases or parameter.dim() > 1 else others).append(parameter)
    groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
