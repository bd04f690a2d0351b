import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from megabert.finetune.tasks.metrics import score

BINARY = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=2, max_size=40)
VALUES = st.lists(st.tuples(st.integers(-50, 50), st.integers(0, 5)), min_size=3, max_size=40)


@given(BINARY)
def test_classification_scores_are_scikit_learns(pairs):
    got, wanted = np.array(pairs).T
    assert score("accuracy", got, wanted) == sk.accuracy_score(wanted, got)
    assert score("f1", got, wanted) == sk.f1_score(wanted, got, zero_division=0)
    assert score("matthews", got, wanted) == sk.matthews_corrcoef(wanted, got)


@given(VALUES)
def test_correlations_are_scipys_and_never_nan(pairs):
    got, wanted = np.array(pairs, dtype=float).T
    for name, correlate in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        value = score(name, got, wanted)
        if np.ptp(got) == 0 or np.ptp(wanted) == 0:
            assert value == 0.0
        else:
            assert value == correlate(got, wanted)[0]


@pytest.mark.parametrize("name", ["pearson", "spearman", "f1", "matthews"])
def test_constant_predictions_score_zero(name):
    assert score(name, np.zeros(5), np.array([0, 1, 0, 1, 1])) == 0.0
    assert score("pearson", np.array([np.nan, 1.0, 2.0]), np.arange(3.0)) == 0.0
