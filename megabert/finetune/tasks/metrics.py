"""Compute GLUE's metrics by scikit-learn and scipy, and return 0 where those are undefined."""

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def score(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """Compute one metric of (n,) predictions, which are indices of labels or values of a regression.

    A correlation with a constant is undefined; it is 0 here, as Matthews' is in scikit-learn, and so is F1 without any
    positive prediction or label. Predictions that are not finite score 0 too: the result is never NaN.
    """
    if name == "accuracy":
        return float(accuracy_score(labels, predictions))
    if name == "f1":
        return float(f1_score(labels, predictions, zero_division=0))
    if name == "matthews":
        return float(matthews_corrcoef(labels, predictions))
    if not np.isfinite(predictions).all() or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    correlate = {"pearson": pearsonr, "spearman": spearmanr}[name]
    value = float(correlate(predictions, labels)[0])
    # The correlation is NaN if the values are so close to constant that their deviation rounds to 0.
    return value if np.isfinite(value) else 0.0
