"""A run whose loss stands at the unigram's after its warm-up says so once, with the settings to change."""

import numpy as np
import pytest

from megabert.config.recipe import OptimizerConfig
from megabert.training.telemetry.unigram import FIRST_STEPS, UnigramWatch
from tests.helpers.runs import patched, pretrain_command, run_command

# Of 1,000 tokens, the n-th is drawn in proportion to 1 / n.
SHARES = 1 / np.arange(1, 1001)
SHARES /= SHARES.sum()
# Of these shares.
ENTROPY = 5.19
# As 4 layers of 256 learn docstrings: 0.1, 0.5 and 0.8 nats below the unigram after 100, 200 and 300 steps.
LEARNING = [5.1, 4.7, 4.4, 4.3, 4.2, 4.1, 4.0, 4.0]
STANDING = [6.9, 5.4, 5.25, 5.2, 5.19, 5.2, 5.18, 5.2]


def said(losses: list[float], total: int = 800, **optimizer) -> list[str]:
    """Report a loss every 100 steps. Returns the lines of the log."""
    watch = UnigramWatch(SHARES, OptimizerConfig(**optimizer))
    assert watch.entropy == pytest.approx(ENTROPY, abs=0.005)
    lines = [watch.update(100 * (n + 1), 100 * (n + 1) / total, loss) for n, loss in enumerate(losses)]
    return [line for line in lines if line is not None]


def test_a_run_that_stands_at_the_unigrams_loss_says_so_once():
    [line] = said(STANDING, lr=2e-3, warmup=0.06)
    assert line == (
        "step 300: the training loss is 5.33, guessing each token by its frequency gives 5.19: the model has learned "
        "nothing from context yet. If it stays there, start anew with a lower optimizer.lr (now 0.002) or a longer "
        "optimizer.warmup (now 0.06)"
    )
    assert len(said([float("nan")] * 8)) == 1
    assert len(said([9.0] * 8)) == 1


def test_a_run_that_learns_says_nothing():
    assert said(LEARNING) == []


def test_the_warm_up_is_left_out():
    assert said(STANDING[:7], warmup=0.3) == []
    [line] = said(STANDING, warmup=0.3)
    assert line.startswith("step 800: ")


def test_a_run_of_few_steps_is_not_judged():
    assert FIRST_STEPS > 200
    assert said(STANDING[:2], total=200) == []


SOON = "from megabert.training.telemetry import unigram\nunigram.FIRST_STEPS = 20\n"


def test_a_learning_rate_that_is_far_too_high_is_named_in_the_log(corpus, tmp_path):
    settings = ["--run.max_steps=24", "--optimizer.lr=3", "--run.max_norm_ratio=0", "--optimizer.weight_decay=0"]
    done = run_command(patched(pretrain_command(corpus, tmp_path / "run", *settings)), PATCH=SOON)
    assert done.code == 0, done.output
    assert done.output.count("the model has learned nothing from context yet") == 1
    assert "a lower optimizer.lr (now 3)" in done.output
