"""The learning rate as a function of the step."""

import math

from megabert.config.recipe import OptimizerConfig


def lr_factor(step: int, total: int, config: OptimizerConfig) -> float:
    """The learning rate of optimizer step `step` (from 0) as a share of the peak.

    Linear up from 1 / warm-up steps; then, with t the share done of what is left (wsd: of its decay) and f = final_lr:
    linear f + (1 - f)(1 - t); cosine f + (1 - f)(1 + cos(pi t)) / 2; wsd f + (1 - f)(1 - sqrt(t))
    (https://arxiv.org/abs/2405.18392, section 4); constant 1.
    """
    warmup = round(config.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    decay = max(1, round(config.decay * total) if config.schedule == "wsd" else total - warmup)
    done = min(1.0, max(0.0, (step - (total - decay)) / decay))
    left = {
        "linear": 1 - done,
        "cosine": (1 + math.cos(math.pi * done)) / 2,
        "wsd": 1 - math.sqrt(done),
        "constant": 1.0,
    }[config.schedule]
    return config.final_lr + (1 - config.final_lr) * left
