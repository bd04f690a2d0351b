"""The floor that a fine-tuned encoder should beat: TF-IDF and logistic regression."""

import time

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from megabert.glue.finetune import Score
from megabert.glue.tasks import Examples


def tfidf(train: Examples, test: Examples) -> Score:
    """Accuracy of logistic regression on the TF-IDF of words and pairs of words."""
    began = time.perf_counter()
    model = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True), LogisticRegression(C=10, max_iter=1000)
    )
    model.fit(train.texts, train.labels)
    return Score(float(model.score(test.texts, test.labels)), time.perf_counter() - began)
