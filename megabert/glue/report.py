"""One table: the pretrained encoder, the same one from random weights, and the classical floor."""

import statistics
from pathlib import Path
from typing import Any

from megabert.glue.baselines import tfidf
from megabert.glue.finetune import FinetuneConfig, run
from megabert.glue.tasks import Examples, Task


def compare(
    folder: Path, task: Task, train: Examples, test: Examples, settings: dict[str, Any], seeds: list[int]
) -> dict[str, dict[str, Any]]:
    """Score all three on the same split. Returns {name: {"scores": one per seed, "seconds": total}}."""
    results = {}
    for name, pretrained in (("pretrained", True), ("random_init", False)):
        scores = [run(folder, task, train, test, FinetuneConfig(seed=seed, **settings), pretrained) for seed in seeds]
        results[name] = {"scores": [score.value for score in scores], "seconds": sum(score.seconds for score in scores)}
    floor = tfidf(train, test)
    results["tfidf"] = {"scores": [floor.value], "seconds": floor.seconds}
    return results


def markdown(task: Task, results: dict[str, dict[str, Any]], num_train: int, num_test: int) -> str:
    """The results as a table."""
    titles = {
        "pretrained": "fine-tuned, pretrained here",
        "random_init": "fine-tuned, from random weights",
        "tfidf": "TF-IDF + logistic regression",
    }
    lines = [
        f"{task.name}: {num_train:,} training and {num_test:,} test examples",
        "",
        f"| model | {task.metric} | seeds | seconds |",
        "|---|---|---|---|",
    ]
    for name, result in results.items():
        scores = result["scores"]
        lines.append(f"| {titles[name]} | {statistics.mean(scores):.3f} | {len(scores)} | {result['seconds']:.0f} |")
    return "\n".join(lines) + "\n"
