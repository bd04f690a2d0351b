"""Train the TF-IDF baseline, a linear model on words and pairs of words, which a fine-tuned encoder should beat."""

import time
from typing import Any

import numpy as np
from scipy.sparse import hstack
from sklearn.dummy import DummyClassifier, DummyRegressor
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge

from megabert.finetune.tasks.task import Examples


def predict_tfidf(
    train: Examples, others: dict[str, Examples], is_regression: bool
) -> tuple[dict[str, np.ndarray], float]:
    """Return predictions for every set of `others`, and the seconds that training took.

    Trains a logistic regression, or a ridge regression. The features of a pair are the absolute difference and the
    product of its two texts' features. Where these cannot learn, since the texts have no words or the labels are all
    the same, it predicts the most frequent label, or the mean.
    """
    start = time.perf_counter()
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    texts, words = train.first + (train.second or []), vectorizer.build_analyzer()
    if len(set(train.labels or [])) < 2 or not any(map(words, texts)):
        constant: Any = DummyRegressor() if is_regression else DummyClassifier()
        constant.fit(train.first, train.labels)
        predictions = {name: constant.predict(examples.first) for name, examples in others.items()}
        return predictions, time.perf_counter() - start
    vectorizer.fit(texts)

    def features(examples: Examples):
        first: Any = vectorizer.transform(examples.first)
        if examples.second is None:
            return first
        second: Any = vectorizer.transform(examples.second)
        return hstack([abs(first - second), first.multiply(second)]).tocsr()

    model = Ridge(alpha=1.0) if is_regression else LogisticRegression(C=10, max_iter=1000)
    model.fit(features(train), train.labels)
    seconds = time.perf_counter() - start
    return {name: model.predict(features(examples)) for name, examples in others.items()}, seconds
