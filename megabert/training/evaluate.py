"""Masked-token loss and accuracy on held-out text: the same numbers on any number of ranks."""

from typing import NamedTuple

import deepspeed
import numpy as np
import torch

from megabert.data.batch import PackedBatch
from megabert.data.shards.source import Corpus


class Evaluation(NamedTuple):
    """loss: nats per masked token; accuracy: share predicted exactly; masked: tokens predicted."""

    loss: float
    accuracy: float
    masked: int


def evaluate(engine: deepspeed.DeepSpeedEngine, batches: list[PackedBatch]) -> Evaluation:
    """Predict the masked tokens of this rank's batches; sums are over all ranks, which must hold equally many."""
    engine.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=engine.device)
    with torch.no_grad():
        for batch in batches:
            sums += torch.stack([part.double() for part in engine(**batch.model_inputs(engine.device))])
    engine.train()
    deepspeed.comm.all_reduce(sums)
    loss_sum, num_correct, num_targets = sums.tolist()
    return Evaluation(loss_sum / num_targets, num_correct / num_targets, int(num_targets))


def unigram_loss(corpus: Corpus, batches: list[PackedBatch]) -> float:
    """What guessing each masked token by its frequency in the training shards costs, nats per token.

    The bar that a model passes when it uses any context at all.
    """
    nats = -np.log(corpus.token_shares)
    labels = np.concatenate([batch.masked_labels[: batch.num_masked].numpy() for batch in batches])
    return float(nats[labels].mean())
