"""Count the operations of a micro-batch, their FLOPs, the bytes that they move, and the time that a card needs.

One set of efficiencies for all models and cards, fixed before any comparison with published runs.
"""

import math
from dataclasses import dataclass

from megabert.config.recipe import ModelConfig
from megabert.training.architecture import architecture_of
from megabert.training.micro_batch.batch import Batch
from megabert.training.micro_batch.memory import BF16, Execution, num_weights, weights_of_maps
from megabert.training.telemetry.cards import Card
from megabert.training.telemetry.flops import step_flops

# Shares of a card's peaks that are reached. Faster cards reach less, because the same products fill them less: the
# share is that of an A100, and falls with each doubling of the peak.
A100_PEAK = 312e12
PRODUCTS, PRODUCTS_FALL = 0.68, 0.08
ATTENTION, ATTENTION_FALL = 0.35, 0.06
BANDWIDTH = 0.85
# LayerNorm's backward pass reads and writes in rows, with sums of the weights' gradient.
ROWS = 0.6
# Python and launches, seconds per layer of a micro-batch; they overlap with the GPU's work.
HOST_PER_LAYER = 1.6e-3
# The share of the GPU's time that goes into waits at the end of a step and gaps between kernels.
GAPS = 0.03


@dataclass(frozen=True, kw_only=True)
class Operation:
    """flops and moved_bytes of forward and backward together. share, fall: of the peak, as for PRODUCTS."""

    name: str
    flops: float = 0.0
    moved_bytes: float = 0.0
    share: float = PRODUCTS
    fall: float = PRODUCTS_FALL
    bandwidth: float = BANDWIDTH
    fp8: bool = False

    def seconds(self, card: Card, bf16: bool = True) -> float:
        peak = card.fp8 if self.fp8 and card.fp8 else card.bf16 if bf16 and card.bf16 else card.fp32
        share = self.share - self.fall * math.log2(max(peak, A100_PEAK / 4) / A100_PEAK)
        return max(self.flops / (peak * min(share, 0.8)), self.moved_bytes / (card.bandwidth * self.bandwidth))


def needed_flops(model: ModelConfig, vocab_size: int, batch: Batch) -> float:
    """Return the FLOPs that the real tokens of a micro-batch need, as MFU counts them."""
    config = architecture_of(model, vocab_size)
    return step_flops(config, batch.tokens, batch.masked, batch.tokens * batch.attended)


def _bytes_of_norms(model: ModelConfig, size: int, stream: int) -> tuple[int, int]:
    """Return the bytes that LayerNorms and sums move for a number of the residual stream, forward and backward.

    size, stream: bytes of a number of the products and of the stream. After a sum, LayerNorm's kernel reads both terms
    and both gradients of its result, and writes the gradient of each term: kernels/add_layer_norm.py. Before a product
    it reads and writes one matrix each way and reads a gradient; PyTorch adds to the stream, and sums its gradients.
    """
    if model.norm_position == "post":
        return 3 * size + 6 * stream, 0
    return 2 * size + 3 * stream, 6 * stream


def operations(model: ModelConfig, vocab_size: int, batch: Batch, execution: Execution = BF16) -> list[Operation]:
    """Return the operations of a micro-batch. The bytes of elementwise ones are those of kernels/*.py's docstrings.

    With run.fp8, assumed are run.compile, which makes each cast one kernel, and two casts of each operand, one for each
    product that reads it: the number is read for the largest value and to be rounded, and written in one byte.
    """
    size, fp8 = execution.size, execution.fp8
    width, inner, layers = model.hidden_size, model.intermediate_size, model.num_hidden_layers
    gated = model.ffn == "geglu"
    slots, masked = batch.slots, batch.masked
    # In a padded model the last layer computes all slots.
    last = slots if model.padding == "padded" else masked
    config = architecture_of(model, vocab_size)
    products = step_flops(config, slots, last, 0)
    # Less in layers that see a window.
    attention = step_flops(config, slots, last, slots * batch.attended) - products
    vocabulary = 3 * 2 * masked * (width * width + width * vocab_size)
    products -= 3 * 2 * last * (width * width + width * vocab_size)
    # The maps of neighbors are computed before the layers, and with run.fp8 not in FP8.
    maps = 2 * model.embedding_neighbors
    mixing = 3 * 2 * slots * maps * width * width
    products -= mixing
    up = 2 * inner if gated else inner
    weights = layers * weights_of_maps(model)
    stream = 4 if model.layer_norm_dtype == "float32" else size
    rows = 2 * layers * slots * width
    norm, sums = _bytes_of_norms(model, size, stream)
    # The gradients of biases read those of the products that they are added to.
    biases = layers * slots * size * (5 * width + (0 if gated else inner)) if model.bias else 0
    # GeGLU reads and writes 8 F numbers; GELU in PyTorch 5 F.
    activation = layers * slots * inner * size * (8 if gated else 5)
    # Inputs and results of the products. Of each number and its gradient two are read by products and one is written.
    operands = layers * slots * (8 * width + up + inner)
    each = 2 + size if fp8 else 3 * size
    casts = 2 * (operands * (2 * size + 1) + weights * (2 * 4 + 1)) if fp8 else 0
    return [
        Operation(name="layers' products", flops=products, moved_bytes=each * (operands + weights), fp8=fp8),
        Operation(name="casts to FP8", moved_bytes=casts),
        Operation(
            name="neighbors' products", flops=mixing, moved_bytes=3 * size * maps * width * (2 * slots + width)
        ),
        Operation(
            name="vocabulary and loss", flops=vocabulary,
            moved_bytes=4 * size * masked * vocab_size + 40 * vocab_size * width
        ),
        Operation(
            name="attention", flops=attention * 7 / 6, moved_bytes=layers * slots * 12 * width * size,
            share=ATTENTION, fall=ATTENTION_FALL,
        ),
        Operation(name="MLP's activation", moved_bytes=activation),
        Operation(name="LayerNorm", moved_bytes=rows * norm, bandwidth=ROWS),
        Operation(name="rotation", moved_bytes=12 * layers * slots * width * size if model.position == "rope" else 0),
        Operation(name="sums", moved_bytes=rows * sums + biases),
        Operation(name="casts, gradients of weights", moved_bytes=num_weights(model, vocab_size) * (12 + 28)),
    ]  # fmt: skip
