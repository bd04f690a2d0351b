"""Make the summary that the quickstart prints: its figures, five predicted masks, and a plot of the loss."""

import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForMaskedLM, AutoTokenizer

from megabert.files.metrics_format import METRICS, read_metrics
from megabert.files.run_format import RESULT, RUN, read_run_file
from megabert.plots.figures import save_figure

SENTENCES = (
    "Returns a new [MASK] with the same shape and type as the given array.",
    "The number of [MASK] to use in the computation.",
    "If True, the [MASK] will be sorted in ascending order.",
    "Raises a [MASK] if the input is not a valid string.",
    "This [MASK] is deprecated and will be removed in a future version.",
)

QUESTIONS = {
    "parameter-type": "is a parameter that a docstring describes a bool (or an int, a str, ...)? Guessing gives 50 %",
}

# Targets of the quickstart on two cores.
TARGET_NATS, TARGET_SECONDS = 2.6, 600.0


class FilledMask(NamedTuple):
    sentence: str
    tokens: list[str]
    """the most likely tokens"""


def fill_masks(folder: Path, sentences: tuple[str, ...] = SENTENCES, num_tokens: int = 3) -> list[FilledMask]:
    """Predict the most likely tokens at the one [MASK] of each sentence with an exported model."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    filled = []
    for sentence in sentences:
        inputs = tokenizer(sentence, return_tensors="pt")
        position = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
        with torch.no_grad():
            best = model(**inputs).logits[0, position].topk(num_tokens).indices
        filled.append(FilledMask(sentence, [tokenizer.decode([token]).strip() for token in best.tolist()]))
    return filled


def plot_loss(run: Path, unigram_loss: float, out: Path) -> None:
    """Draw training and held-out loss against tokens."""
    records = read_metrics(run / METRICS)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    masking = read_run_file(run / RUN)["recipe"]["masking"]
    curves = (("loss", "training", "mlm_probability"), ("heldout_loss", "held out", "eval_mlm_probability"))
    for key, name, probability in curves:
        points = [(record["tokens"] / 1e6, record[key]) for record in records if key in record]
        axes.plot(
            *zip(*points, strict=True),
            marker="o" if key == "heldout_loss" else None,
            label=f"{name} ({masking[probability]:.0%} masked)",
        )
    axes.axhline(unigram_loss, color="grey", linestyle="--", label="unigram model")
    axes.set_xlabel("tokens seen, millions")
    axes.set_ylabel("masked-token loss, nats")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, out)


def summarize(
    run: Path, hf_dir: Path, finetuning: dict[str, Any], pretrain_seconds: float, total_seconds: float
) -> dict[str, Any]:
    """Collect the figures of one quickstart.

    finetuning: content of the fine-tuning's results.json. Seconds are wall-clock and include start-up.
    """
    result = read_run_file(run / RESULT)
    return {
        "unigram_loss": result["unigram_loss"],
        "heldout_loss": result["heldout_loss"],
        "masked_accuracy": result["masked_accuracy"],
        "tasks": {name: task_scores(parts) for name, parts in finetuning["tasks"].items()},
        "pretrain_seconds": pretrain_seconds,
        "total_seconds": total_seconds,
        "tokens_per_second": result["tokens_per_second"],
        "hf_dir": str(hf_dir),
    }


def task_scores(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the mean scores of one task, and their spread.

    parts: contender -> its part of results.json. std: of the scores of one contender over its seeds; the root of the
    mean of the two variances, None for one seed.
    """
    encoders = [parts["pretrained"], parts["random_init"]]
    deviations = [part["std"] for part in encoders if part["std"] is not None]
    return {
        "pretrained": parts["pretrained"]["mean"],
        "random": parts["random_init"]["mean"],
        "tfidf": parts["tfidf"]["mean"],
        "std": math.sqrt(statistics.mean(std**2 for std in deviations)) if len(deviations) == len(encoders) else None,
        "seeds": min(part["n"] for part in encoders),
    }


def is_above_random(scores: dict[str, Any]) -> bool:
    """Return whether pretraining gained at least three standard errors of the difference of the two means."""
    if scores["std"] is None:
        return False
    return scores["pretrained"] - scores["random"] >= 3 * scores["std"] * math.sqrt(2 / scores["seeds"])


def task_lines(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """Return a table: a question, and what each contender scored."""
    lines = []
    for name, scores in tasks.items():
        spread = "" if scores["std"] is None else f", +- {100 * scores['std']:.1f} from seed to seed"
        lines += [
            f"{name}: {QUESTIONS.get(name, 'see its task file')}",
            f"    fine-tuned after pretraining      {100 * scores['pretrained']:5.1f} %",
            f"    fine-tuned from random weights    {100 * scores['random']:5.1f} %",
            f"    counting words (TF-IDF)           {100 * scores['tfidf']:5.1f} %",
            f"    right answers; mean of {scores['seeds']} seeds{spread}",
        ]
    return lines


def _met(condition: bool) -> str:
    return "met" if condition else "NOT MET"


def as_text(summary: dict[str, Any], run: Path, masks: list[FilledMask]) -> str:
    """Return the summary as lines of text."""
    better = summary["unigram_loss"] - summary["heldout_loss"]
    lines = [
        f"held-out loss      {summary['heldout_loss']:.3f} nats, {better:.2f} below the unigram's "
        f"{summary['unigram_loss']:.3f}",
        f"masked accuracy    {summary['masked_accuracy']:.3f}",
        f"pretraining        {summary['pretrain_seconds']:.0f} s, {summary['tokens_per_second']:,.0f} real tokens/s",
        f"all stages         {summary['total_seconds']:.0f} s",
        f"targets            {TARGET_NATS} nats below the unigram: {_met(better >= TARGET_NATS)}; pretrained above "
        f"random weights by three standard errors: {_met(all(map(is_above_random, summary['tasks'].values())))}; "
        f"ten minutes: {_met(summary['total_seconds'] <= TARGET_SECONDS)}",
        "",
        *task_lines(summary["tasks"]),
        "",
        *(f"{sentence}\n    {', '.join(tokens)}" for sentence, tokens in masks),
        "",
        f"loss curve         {run / 'loss.png'}",
        f"score over time    {run / 'score/pareto.png'}",
        f"checkpoints        {run / 'checkpoints'}",
        f"TensorBoard        tensorboard --logdir {run / 'tensorboard'}",
        f"exported model     {summary['hf_dir']}",
    ]
    return "\n".join(lines)
