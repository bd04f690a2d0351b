"""GLUE's scores, by scikit-learn and scipy; where those are undefined, for a constant prediction, 0."""

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def score(name: str, predictions: np.ndarray, labels: np.ndarray) -> float:
    """One score of (n,) predictions, each a label's number or a regression's value.

    A correlation with something constant has no value; it is 0 here, as Matthews' is in scikit-learn, and so is F1 without
    any positive. A prediction that is not finite counts as none: nothing comes out as NaN.
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
    return value if np.isfinite(value) else 0.0  # so close to constant that its deviation rounds to 0
