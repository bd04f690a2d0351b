"""What the quickstart shows at its end: figures, five filled-in masks, a picture of the loss."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForMaskedLM, AutoTokenizer

from megabert.files.metrics_format import METRICS, read_metrics

SENTENCES = (
    "Returns a new [MASK] with the same shape and type as the given array.",
    "The number of [MASK] to use in the computation.",
    "If True, the [MASK] will be sorted in ascending order.",
    "Raises a [MASK] if the input is not a valid string.",
    "This [MASK] is deprecated and will be removed in a future version.",
)


BAR_NATS, BAR_SECONDS = 1.3, 600.0  # what a quickstart must reach on two cores


class FilledMask(NamedTuple):
    sentence: str
    guesses: list[str]


def fill_masks(folder: Path, sentences: tuple[str, ...] = SENTENCES, guesses: int = 3) -> list[FilledMask]:
    """Ask an exported model for the most likely tokens at each sentence's one [MASK]."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True).eval()
    filled = []
    for sentence in sentences:
        inputs = tokenizer(sentence, return_tensors="pt")
        place = (inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0, 0]
        with torch.no_grad():
            best = model(**inputs).logits[0, place].topk(guesses).indices
        filled.append(FilledMask(sentence, [tokenizer.decode([token]).strip() for token in best.tolist()]))
    return filled


def plot_loss(run: Path, unigram_loss: float, out: Path) -> None:
    """Draw training and held-out loss against tokens."""
    records = read_metrics(run / METRICS)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    masking = json.loads((run / "run.json").read_text())["recipe"]["masking"]
    curves = (("loss", "training", "mlm_probability"), ("heldout_loss", "held out", "eval_mlm_probability"))
    for key, name, share in curves:
        points = [(record["tokens"] / 1e6, record[key]) for record in records if key in record]
        axes.plot(
            *zip(*points, strict=True),
            marker="o" if key == "heldout_loss" else None,
            label=f"{name} ({masking[share]:.0%} masked)",
        )
    axes.axhline(unigram_loss, color="grey", linestyle="--", label="unigram: guessing by frequency")
    axes.set_xlabel("tokens seen, millions")
    axes.set_ylabel("masked-token loss, nats")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=120)


def summarize(
    run: Path, hf_dir: Path, finetune_dir: Path, pretrain_seconds: float, total_seconds: float
) -> dict[str, Any]:
    """Collect the figures of one quickstart from what its stages wrote. Seconds are wall-clock, starting up included."""
    result = json.loads((run / "result.json").read_text())
    contenders = json.loads((finetune_dir / "results.json").read_text())["tasks"]["movie-sentiment"]
    means = {name: part["mean"] for name, part in contenders.items()}
    return {
        "unigram_loss": result["unigram_loss"],
        "heldout_loss": result["heldout_loss"],
        "masked_accuracy": result["masked_accuracy"],
        "finetune_pretrained": means["pretrained"],
        "finetune_random_init": means["random_init"],
        "finetune_tfidf": means["tfidf"],
        "pretrain_seconds": pretrain_seconds,
        "total_seconds": total_seconds,
        "tokens_per_second": result["tokens_per_second"],
        "hf_dir": str(hf_dir),
    }


def _met(condition: bool) -> str:
    return "met" if condition else "NOT MET"


def as_text(summary: dict[str, Any], run: Path, masks: list[FilledMask]) -> str:
    """The summary as the user reads it."""
    better = summary["unigram_loss"] - summary["heldout_loss"]
    lines = [
        f"held-out loss      {summary['heldout_loss']:.3f} nats, {better:.2f} below the unigram's {summary['unigram_loss']:.3f}",
        f"masked accuracy    {summary['masked_accuracy']:.3f}",
        f"movie-sentiment    {summary['finetune_pretrained']:.3f} pretrained, {summary['finetune_random_init']:.3f} from "
        f"random weights, {summary['finetune_tfidf']:.3f} TF-IDF",
        f"pretraining        {summary['pretrain_seconds']:.0f} s, {summary['tokens_per_second']:,.0f} real tokens/s",
        f"everything         {summary['total_seconds']:.0f} s",
        f"bars               1.3 nats below the unigram: {_met(better >= BAR_NATS)}; pretrained above random weights: "
        f"{_met(summary['finetune_pretrained'] > summary['finetune_random_init'])}; ten minutes: "
        f"{_met(summary['total_seconds'] <= BAR_SECONDS)}",
        "",
        *(f"{sentence}\n    {', '.join(guesses)}" for sentence, guesses in masks),
        "",
        f"loss curve         {run / 'loss.png'}",
        f"checkpoints        {run / 'checkpoints'}",
        f"TensorBoard        tensorboard --logdir {run / 'tensorboard'}",
        f"exported model     {summary['hf_dir']}",
    ]
    return "\n".join(lines)
