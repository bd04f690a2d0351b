"""Warn when a run's loss is only the unigram entropy, that of guessing tokens by their frequency."""

import numpy as np

from megabert.config.recipe import OptimizerConfig

# Nats below the unigram's entropy that count as learned. The frequencies alone are learned in the first tens of steps.
LEARNED = 0.1
# A run that learns may need this many steps, whatever its length, to fall below the unigram's entropy.
FIRST_STEPS = 300
# How much of the run is looked at, in warm-ups: the loss of the last half of it counts.
WARMUPS = 3


class UnigramWatch:
    """Compares the training loss with the unigram's once, some time after the warm-up."""

    def __init__(self, shares: np.ndarray, config: OptimizerConfig):
        """shares: (vocab_size,) of the training tokens, all above 0."""
        self.entropy = float(-(shares * np.log(shares)).sum())
        self.config = config
        self.losses: list[float] | None = []

    def update(self, step: int, share: float, loss: float) -> str | None:
        """Take the mean loss of the steps up to `step`, when `share` of the run is done; return a line for the log.

        A loss that is not a number counts as too high.
        """
        due = max(FIRST_STEPS / step * share, WARMUPS * self.config.warmup)
        if self.losses is None or share < due / 2:
            return None
        self.losses.append(loss)
        if share < due:
            return None
        mean = sum(self.losses) / len(self.losses)
        self.losses = None
        if mean <= self.entropy - LEARNED:
            return None
        return (
            f"step {step}: the training loss is {mean:.2f}, guessing each token by its frequency gives "
            f"{self.entropy:.2f}: the model has learned nothing from context yet. If it stays there, start anew with a "
            f"lower optimizer.lr (now {self.config.lr:g}) or a longer optimizer.warmup (now {self.config.warmup:g})"
        )
