"""The floor that a fine-tuned encoder should beat: TF-IDF of words and pairs of words, under a linear model."""

import time
from typing import Any

import numpy as np
from scipy.sparse import hstack
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from megabert.finetune.tasks.task import Examples


def predict_tfidf(
    train: Examples, others: dict[str, Examples], is_regression: bool
) -> tuple[dict[str, np.ndarray], float]:
    """Predictions for every set of `others`, and the seconds that training took.

    Logistic regression, or ridge regression; a pair's features are the difference and the product of its texts'.
    """
    began = time.perf_counter()
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    vectorizer.fit(train.first + (train.second or []))

    def features(examples: Examples):
        first: Any = vectorizer.transform(examples.first)
        if examples.second is None:
            return first
        second: Any = vectorizer.transform(examples.second)
        return hstack([abs(first - second), first.multiply(second)]).tocsr()

    model = Ridge(alpha=1.0) if is_regression else LogisticRegression(C=10, max_iter=1000)
    model.fit(features(train), train.labels)
    seconds = time.perf_counter() - began
    return {name: model.predict(features(examples)) for name, examples in others.items()}, seconds
