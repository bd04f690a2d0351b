"""Compute the FLOPs that a training step needs and the FLOP/s that a device can do; MFU is their ratio over time.

The count is of what the model needs, whatever else a kernel computes: real tokens only; attention within documents;
everything after the last layer's attention on masked tokens only; matrix products only, with a multiplication and an
addition as two FLOPs; the backward pass as twice the forward pass, without recomputation.
"""

import logging
import time

import torch

from megabert.model.configuration_megabert import MegaBertConfig
from megabert.training.telemetry.cards import find_card

log = logging.getLogger(__name__)

TRIALS = 5


def step_flops(config: MegaBertConfig, tokens: float, masked: float, squared_lengths: float) -> float:
    """Return the FLOPs of one step's forward and backward. squared_lengths: sum over documents of length^2.

    A local layer counts a whole window for every token, or whole documents where that is less.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    # The MLP's matrices are gate, value and down, or up and down.
    matrices = 3 if config.ffn == "geglu" else 2
    # Multiplications after attention, per layer and token.
    after_attention = width * width + matrices * width * config.intermediate_size
    products = tokens * (layers * 3 * width * width + (layers - 1) * after_attention)
    products += masked * (after_attention + width * width + width * config.vocab_size)
    products += tokens * 2 * config.embedding_neighbors * width * width
    local = sum(config.is_local(layer) for layer in range(layers))
    products += (layers - local) * 2 * width * squared_lengths
    if config.reach is not None:
        products += local * 2 * width * min(squared_lengths, tokens * (2 * config.reach + 1))
    return 3 * 2 * products


def peak_flops(device: torch.device, name: str, config: MegaBertConfig, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of one rank's device in the precision of a run; None, and a line in the log, if unknown.

    name: torch's name of the card, or "cpu". dtype: that of matrix products, bf16 or fp32. A CPU is measured: the best
    of a few matrix products of the model's own shape on this process's threads.
    """
    if device.type != "cpu":
        card = find_card(name)
        peak = None if card is None else card.bf16 if dtype == torch.bfloat16 else card.fp32
        if peak is None:
            log.info("no MFU is reported: telemetry/cards.py knows no %s peak of %s", dtype, name)
        return peak
    rows, width, out = 4096, config.hidden_size, config.intermediate_size
    x, weight = torch.randn(rows, width, dtype=dtype), torch.randn(out, width, dtype=dtype)
    best = float("inf")
    for _ in range(TRIALS):
        started_at = time.perf_counter()
        torch.mm(x, weight.t())
        best = min(best, time.perf_counter() - started_at)
    return 2 * rows * width * out / best
