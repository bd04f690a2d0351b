"""Decide to skip optimizer updates whose gradient norm is not finite or far above the usual.

gate_optimizer_step of distributed/deepspeed_compat.py skips them; micro_batch/loss.py turns a loss that is not finite
into a gradient norm that is not.
"""

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch import nn

# The median is taken over this many norms: enough to be steady, few enough to follow the warm-up.
NORM_WINDOW = 128
# With fewer known norms, only an update whose norm is not finite is skipped.
MIN_NORMS = 32


class DivergedError(ValueError):
    """Too many updates were skipped in a row, or all of them, so the training cannot continue."""


@dataclass
class Guard:
    """The history of gradient norms, and the decision whether a norm is acceptable.

    max_norm_ratio: the largest allowed norm as a multiple of the running median; 0 allows every finite norm. norms:
    gradient norms of the last applied updates. skipped: all updates skipped so far. skipped_in_a_row: updates skipped
    since the last applied one.
    """

    max_norm_ratio: float
    norms: deque[float] = field(default_factory=lambda: deque(maxlen=NORM_WINDOW))
    skipped: int = 0
    skipped_in_a_row: int = 0

    def allows(self, norm: float) -> bool:
        """Decide whether an update with this gradient norm may be applied."""
        if not math.isfinite(norm):
            return False
        if not self.max_norm_ratio or len(self.norms) < MIN_NORMS:
            return True
        return norm <= self.max_norm_ratio * median(self.norms)

    def record(self, norm: float, applied: bool) -> None:
        """Update the history after a step."""
        if applied:
            self.norms.append(norm)
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1

    def to_json(self) -> dict[str, object]:
        return {"norms": list(self.norms), "skipped": self.skipped, "in_a_row": self.skipped_in_a_row}

    def restore(self, raw: dict[str, Any]) -> None:
        """Load the history that `to_json` returned. Raises ValueError for anything else."""
        try:
            self.norms = deque(map(float, raw["norms"]), maxlen=NORM_WINDOW)
            self.skipped, self.skipped_in_a_row = int(raw["skipped"]), int(raw["in_a_row"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the checkpoint's state.json is damaged: guard: {error!r}.") from error


class UpdateGate:
    """Decides once per step whether the optimizer may update the weights.

    All ranks decide the same, because the norm is equal on all of them.

    Call start_step() before every step. parameters_to_clip: set at ZeRO stage 0, where the gate computes the norm and
    clips, because DeepSpeed clips there without reporting the norm. read_zero_norm: set at the other stages; returns
    ZeRO's norm.
    """

    def __init__(self, guard: Guard, max_grad_norm: float):
        self.guard = guard
        self.max_grad_norm = max_grad_norm
        self.parameters_to_clip: list[nn.Parameter] | None = None
        self.read_zero_norm: Callable[[], float] | None = None
        self.norm = math.nan
        self.allowed: bool | None = None

    def detach(self) -> None:
        """Forget the engine, so that its weights and optimizer state are freed before another one is built."""
        self.parameters_to_clip = self.read_zero_norm = None

    def start_step(self) -> None:
        """Forget the decision on the previous step."""
        self.norm, self.allowed = math.nan, None

    def allows_step(self) -> bool:
        """Return this step's decision. The first call in a step decides, and clips the gradients at stage 0."""
        if self.allowed is None:
            if self.parameters_to_clip is None:
                assert self.read_zero_norm is not None, "a step began before the gate was attached to an engine"
                self.norm = self.read_zero_norm()
            else:
                grads = [parameter.grad for parameter in self.parameters_to_clip if parameter.grad is not None]
                total = nn.utils.get_total_norm(grads, foreach=True)
                self.norm = float(total)
                if self.max_grad_norm:
                    nn.utils.clip_grads_with_norm_(self.parameters_to_clip, self.max_grad_norm, total, foreach=True)
            self.allowed = self.guard.allows(self.norm)
        return self.allowed

    def finish_step(self) -> bool:
        """Record the step in the guard's history and return whether the weights changed.

        ZeRO skips a step whose gradients overflow without calling the optimizer, and so without calling
        allows_step(): the update counts as skipped.
        """
        applied = bool(self.allowed)
        self.guard.record(self.norm, applied)
        return applied
