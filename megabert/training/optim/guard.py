"""The guard: an update whose gradient is not finite, or far larger than usual, is not made.

ZeRO computes the gradient's norm inside step(), so the one place where every stage can be held back is the optimizer that it
then calls: there, step() becomes a no-op for this once. The norm is the same on all ranks, and so is the verdict.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import nn

REMEMBERED = 128  # norms that the median is of: long enough to be steady, short enough to follow the warm-up
ENOUGH = 32  # before so many steps are known, only a gradient that is not finite is refused


@dataclass
class Guard:
    """max_norm_ratio: k, the largest norm as a multiple of the running median; 0: any finite one.

    norms: of the last updates made; skipped: updates not made so far; in_a_row: of these, the latest without one between.
    """

    max_norm_ratio: float
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    skipped: int = 0
    in_a_row: int = 0

    def allows(self, norm: float) -> bool:
        if not math.isfinite(norm):
            return False
        if not self.max_norm_ratio or len(self.norms) < ENOUGH:
            return True
        return norm <= self.max_norm_ratio * median(self.norms)

    def note(self, norm: float, applied: bool) -> None:
        """Remember how a step went."""
        if applied:
            self.norms.append(norm)
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1

    def to_json(self) -> dict[str, Any]:
        return {"norms": list(self.norms), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, raw: dict[str, Any]) -> None:
        self.norms = deque(raw["norms"], maxlen=REMEMBERED)
        self.skipped, self.in_a_row = raw["skipped"], raw["in_a_row"]


def hold_back(optimizer: torch.optim.Optimizer, allowed: Callable[[], bool]) -> None:
    """Make optimizer.step() do nothing where `allowed` says so. ZeRO calls it once per group of parameters."""
    step = optimizer.step

    def guarded(*args: Any, **options: Any) -> Any:
        return step(*args, **options) if allowed() else None

    optimizer.step = guarded  # pyrefly: ignore[bad-assignment]


class Verdict:
    """What became of the current step's update. A new one is asked for by `reset`, before every step.

    parameters: whose gradients to clip here, at stage 0, where DeepSpeed clips but does not say the norm; else the norm is
    read from ZeRO's optimizer, `norm_of_zero`.
    """

    def __init__(self, guard: Guard, max_grad_norm: float):
        self.guard = guard
        self.max_grad_norm = max_grad_norm
        self.parameters: list[nn.Parameter] | None = None
        self.norm_of_zero: Callable[[], Any] | None = None
        self.norm = math.nan
        self.applied: bool | None = None

    def reset(self) -> None:
        self.norm, self.applied = math.nan, None

    def allowed(self) -> bool:
        """Decide once per step, and clip at stage 0."""
        if self.applied is None:
            if self.parameters is None:
                assert self.norm_of_zero is not None, "an engine was attached"
                self.norm = float(self.norm_of_zero())
            else:
                grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
                total = nn.utils.get_total_norm(grads, foreach=True)
                self.norm = float(total)
                if self.max_grad_norm:
                    nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, total, foreach=True)
            self.applied = self.guard.allows(self.norm)
        return self.applied

    def settle(self) -> bool:
        """After the step: whether the weights changed. ZeRO refuses infinite gradients itself, and asks nobody."""
        applied = bool(self.applied)
        self.guard.note(self.norm, applied)
        return applied
