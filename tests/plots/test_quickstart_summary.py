"""The quickstart's summary: what it concludes from scores of fine-tuning."""

import pytest

from megabert.plots.quickstart_summary import is_above_random, task_lines, task_scores


def parts(pretrained: float, random: float, std: float | None, seeds: int = 3) -> dict[str, dict]:
    return {
        "pretrained": {"mean": pretrained, "std": std, "n": seeds},
        "random_init": {"mean": random, "std": std, "n": seeds},
        "tfidf": {"mean": 0.55, "std": None, "n": 1},
    }


@pytest.mark.parametrize(
    ("pretrained", "std", "expected"),
    [
        (0.78, 0.02, True),
        # Three standard errors of the difference of two means over 3 seeds are 3 x 0.1 x sqrt(2 / 3) = 0.245.
        (0.50 + 0.246, 0.1, True),
        (0.50 + 0.244, 0.1, False),
        (0.40, 0.001, False),
        (0.78, None, False),
    ],
)
def test_pretraining_helps_only_beyond_three_standard_errors(pretrained, std, expected):
    assert is_above_random(task_scores(parts(pretrained, 0.50, std))) is expected


def test_the_table_has_scores_seeds_and_their_spread():
    text = "\n".join(task_lines({"parameter-type": task_scores(parts(0.784, 0.504, 0.012))}))
    assert "after pretraining       78.4 %" in text
    assert "mean of 3 seeds, +- 1.2 from seed to seed" in text
    assert "is a parameter that a docstring describes a bool" in text
