"""Evaluate on held-out text: masked-token loss and accuracy, the same numbers on any number of ranks."""

from dataclasses import dataclass
from typing import NamedTuple

import deepspeed
import numpy as np
import torch

from megabert.config.recipe import Recipe
from megabert.data.batch import PackedBatch
from megabert.data.shards.source import Corpus
from megabert.data.stream import StreamConfig, filler_batch, held_out_batches
from megabert.training.distributed.heartbeat import progress


@dataclass(frozen=True)
class HeldOut:
    """The held-out text of a run."""

    corpus: Corpus
    batches: list[PackedBatch]
    """this rank's bins; all ranks have the same number"""
    unigram_loss: float
    """nats per masked token when guessing by frequency"""


class Evaluation(NamedTuple):
    """loss: nats per masked token; accuracy: share predicted exactly; masked: tokens predicted."""

    loss: float
    accuracy: float
    masked: int


def open_held_out(
    recipe: Recipe, corpus: Corpus, training_corpus: Corpus, config: StreamConfig, rank: int, world_size: int
) -> HeldOut:
    """Make the bins to evaluate on. config: of the training batches. Raises ValueError if no token is masked."""
    probability = recipe.masking.eval_mlm_probability
    max_bins = max(1, recipe.run.eval_tokens // config.bin_tokens)
    batches = held_out_batches(corpus, config, probability, max_bins)
    if not sum(batch.num_masked for batch in batches):
        raise ValueError(
            f"{corpus.name}: the held-out part has too few tokens to mask any. Hold out more of the corpus."
        )
    # Every rank gets as many bins as the others: at ZeRO 3 a forward pass needs all ranks.
    missing = -len(batches) % world_size
    filler = [filler_batch(corpus.tokenizer, config, probability, len(batches) + i) for i in range(missing)]
    own = (batches + filler)[rank::world_size]
    return HeldOut(corpus, own, unigram_loss(training_corpus, batches))


def evaluate(engine: deepspeed.DeepSpeedEngine, batches: list[PackedBatch]) -> Evaluation:
    """Predict the masked tokens of this rank's batches. Sums over all ranks, which must have equally many batches."""
    engine.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        for batch in batches:
            progress.advance()
            sums += torch.stack([part.double() for part in engine(**batch.model_inputs(engine.device))])
    engine.train()
    deepspeed.comm.all_reduce(sums)
    loss_sum, num_correct, num_targets = sums.tolist()
    return Evaluation(loss_sum / num_targets, num_correct / num_targets, int(num_targets))


def unigram_loss(corpus: Corpus, batches: list[PackedBatch]) -> float:
    """Return the loss of guessing each masked token by its frequency in the training shards, nats per token.

    A model that uses any context has a lower loss.
    """
    nats = -np.log(corpus.token_shares)
    labels = np.concatenate([batch.masked_labels[: batch.num_masked].numpy() for batch in batches])
    return float(nats[labels].mean())
