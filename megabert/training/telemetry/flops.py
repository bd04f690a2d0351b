"""The FLOPs that a training step needs and the FLOP/s that a device can do; MFU is their ratio over time.

Counted is what the model needs, whatever else a kernel computes: real tokens only; attention within documents;
everything after the last layer's attention on masked tokens only; matrix products only, with a multiplication and an
addition as two FLOPs; the backward pass as twice the forward pass, without recomputation.
"""

import time

import torch

from megabert.model.configuration_megabert import MegaBertConfig

# Dense bf16 tensor-core peaks, FLOP/s, from NVIDIA's data sheets, by a part of torch's name for the card.
PEAKS = {
    "A100": 312e12,
    "A800": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A10G": 70e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}
TRIALS = 5


def step_flops(config: MegaBertConfig, tokens: float, masked: float, squared_lengths: float) -> float:
    """Return the FLOPs of one step's forward and backward. squared_lengths: sum over documents of length^2.

    A local layer counts a whole window for every token, or whole documents where that is less.
    """
    width, layers = config.hidden_size, config.num_hidden_layers
    matrices = 3 if config.ffn == "geglu" else 2  # the MLP's: gate, value and down, or up and down
    after_attention = width * width + matrices * width * config.intermediate_size  # per layer and token
    products = tokens * (layers * 3 * width * width + (layers - 1) * after_attention)
    products += masked * (after_attention + width * width + width * config.vocab_size)
    local = sum(config.is_local(layer) for layer in range(layers))
    products += (layers - local) * 2 * width * squared_lengths
    if config.reach is not None:
        products += local * 2 * width * min(squared_lengths, tokens * (2 * config.reach + 1))
    return 3 * 2 * products


def peak_flops(device: torch.device, name: str, config: MegaBertConfig, dtype: torch.dtype) -> float | None:
    """Return the peak FLOP/s of one rank's device; None for a card that the table lacks. name: torch's, or "cpu".

    A CPU is measured: the best of a few matrix products of the model's own shape on this process's threads.
    """
    if device.type != "cpu":
        known = [part for part in PEAKS if part in name]
        return PEAKS[max(known, key=len)] if known else None
    rows, width, out = 4096, config.hidden_size, config.intermediate_size
    x, weight = torch.randn(rows, width, dtype=dtype), torch.randn(out, width, dtype=dtype)
    best = float("inf")
    for _ in range(TRIALS):
        started_at = time.perf_counter()
        torch.mm(x, weight.t())
        best = min(best, time.perf_counter() - started_at)
    return 2 * rows * width * out / best
