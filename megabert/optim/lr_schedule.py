"""Compute the learning rate of a step, for pretraining and fine-tuning."""

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "wsd", "constant"]


def warmup_and_decay(
    step: int,
    total: int,
    warmup_steps: int,
    *,
    schedule: Schedule = "linear",
    decay_steps: int | None = None,
    final: float = 0.0,
) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0, as a share of the peak.

    The warm-up rises linearly from 1 / warmup_steps. After it, with t the share of the decay that is done:
    linear final + (1 - final)(1 - t); cosine final + (1 - final)(1 + cos(pi t)) / 2; constant 1;
    wsd final + (1 - final)(1 - sqrt(t)) (https://arxiv.org/abs/2405.18392, section 4).
    decay_steps: length of the decay, which ends at `total`; default: all steps after the warm-up.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    decay = max(1, total - warmup_steps if decay_steps is None else decay_steps)
    done = min(1.0, max(0.0, (step - (total - decay)) / decay))
    left = {
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "wsd": 1 - math.sqrt(done),
        "constant": 1.0,
    }[schedule]
    return final + (1 - final) * left
