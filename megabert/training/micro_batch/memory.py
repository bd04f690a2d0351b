"""Compute the memory that one rank of a training run needs, in bytes, by a written formula."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from megabert.config.ds_schema import DsSettings, ZeroOptimization, in_host_memory
from megabert.config.recipe import ModelConfig, RunConfig
from megabert.training.micro_batch.batch import Batch

# CUDA's context, cuBLAS and NCCL.
CONTEXT = 1.5e9
# The share of a card's memory that a prediction may fill: the formula is not exact.
FULL = 0.9
# The allocator's fragments, as a share of the memory whose use changes from layer to layer.
FRAGMENTS = 0.05
# Logits of a chunk of the loss in bf16, and their copy in the products: kernels/cross_entropy.py's MAX_LOGITS.
LOSS_CHUNK = 2 * 2 * (1 << 26)
# Fewest tokens of a block of PyTorch's local attention: model/windows.py, which imports torch.
SMALLEST_BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one rank. states: weights, gradients, optimizer. kept: for backward. work: while one layer runs."""

    states: float
    kept: float
    work: float

    @property
    def total(self) -> float:
        return self.states + (self.kept + self.work) * (1 + FRAGMENTS) + CONTEXT

    def fits(self, card_bytes: float) -> bool:
        """Return whether a card with this memory holds it."""
        return self.total <= FULL * card_bytes


class Formats(NamedTuple):
    """Bytes of a number of the weights that the model reads, and of a step's gradients, as DeepSpeed keeps them."""

    weight: int = 4
    gradient: int = 4

    @classmethod
    def of(cls, values: DsSettings) -> "Formats":
        """Return those of a ds_config. Without data_types the gradients are summed in the format of the weights."""
        weight = 2 if values.bf16.enabled else 4
        summed = values.data_types.grad_accum_dtype
        return cls(weight, weight if summed is None else 4 if summed == "fp32" else 2)


class Execution(NamedTuple):
    """How a card computes micro-batches.

    bf16: whether activations are in bf16. fused: whether our kernels run, not plain PyTorch. fp8, graphs: whether
    run.fp8 and run.cuda_graphs are on.
    """

    bf16: bool = True
    fused: bool = True
    fp8: bool = False
    graphs: bool = False

    @classmethod
    def of(cls, run: RunConfig, bf16: bool, fused: bool) -> "Execution":
        """Return that of a run, with graphs if they are allowed."""
        return cls(bf16, fused, run.fp8 != "none", run.cuda_graphs is not False)

    @property
    def size(self) -> int:
        """Bytes of a number of the activations."""
        return 2 if self.bf16 else 4


FP32 = Formats()
BF16 = Execution()


def num_weights(model: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters of a masked language model; decoder and embeddings share theirs."""
    width = model.hidden_size
    norm = 2 * width if model.norm_bias else width
    layer = weights_of_maps(model) + 2 * norm
    head = width * width + norm + vocab_size
    if model.bias:
        layer += 5 * width + (0 if model.ffn == "geglu" else model.intermediate_size)
        head += width
    rows = model.max_position_embeddings + model.position_offset if model.position == "learned" else 0
    # Without norms after its sums, the model has one at its end, and none before the first layer's attention.
    embeddings = (vocab_size + model.num_token_types + rows) * width + norm
    if model.embedding_neighbors:
        embeddings += 2 * model.embedding_neighbors * width * width + norm
    return embeddings + model.num_hidden_layers * layer + head


def weights_of_maps(model: ModelConfig) -> int:
    """Return the numbers in the matrices of a layer's linear maps."""
    return 4 * model.hidden_size**2 + (_width_of_up(model) + model.intermediate_size) * model.hidden_size


def _width_of_up(model: ModelConfig) -> int:
    """Return the features of the MLP's first map: gate and value of a gated one."""
    return model.intermediate_size * (2 if model.ffn == "geglu" else 1)


def kept_bytes(model: ModelConfig, vocab_size: int, batch: Batch, execution: Execution = BF16) -> float:
    """Return the bytes that autograd keeps for a micro-batch's backward pass.

    Without recomputation, and without autocast's copies of weights. An unpadded model computes what follows the last
    layer's attention for masked tokens only. The loss of our kernels keeps the decoder's gradient in fp32; PyTorch's
    keeps the logits.
    """
    before, after = _kept_per_slot(model, execution)
    layers, rows = model.num_hidden_layers, batch.slots if model.padding == "padded" else batch.masked
    activations = layers * batch.slots * before + ((layers - 1) * batch.slots + rows) * after
    activations += 2 * model.embedding_neighbors * batch.slots * model.hidden_size * execution.size
    return activations + 4 * vocab_size * (model.hidden_size if execution.fused else batch.masked)


def _kept_per_slot(model: ModelConfig, execution: Execution) -> tuple[float, float]:
    """Return the bytes that a layer keeps for a slot, up to attention and after it.

    Up to attention: the residual, q, k, v, attention's output and log-sum-exp, 5 matrices of the width. After it: the
    input, mean and scale of both LayerNorms and the first one's output, and of the MLP both halves before GeGLU and its
    result, or GELU's input and result. Beside an fp32 stream the products keep a bf16 copy of it.
    """
    size, width = execution.size, model.hidden_size
    stream = 4 * width if execution.bf16 and model.layer_norm_dtype == "float32" else 0
    if not execution.fused:
        return _kept_by_pytorch(model, size, stream or size * width)
    inner = (3 if model.ffn == "geglu" else 2) * model.intermediate_size
    before = stream + 5 * size * width + 4 * model.num_attention_heads
    return before, stream + size * (3 * width + inner) + 16


def _kept_by_pytorch(model: ModelConfig, size: int, norm_input: int) -> tuple[float, float]:
    """Return the same for plain PyTorch on a GPU: more matrices, and the masks of dropout, a byte for a number.

    GeGLU keeps its gate's GELU too. An unpadded model's attention sorts its tokens by the length of their documents and
    its result back. Local attention keeps its weights, of three blocks of keys: model/windows.py. norm_input: bytes.
    """
    width, inner, gated = model.hidden_size, model.intermediate_size, model.ffn == "geglu"
    output = size * width + 4 * model.num_attention_heads
    if model.local_attention_window is not None:
        weights = 3 * max(model.local_attention_window // 2, SMALLEST_BLOCK) * model.num_attention_heads * size
        local = 1 - math.ceil(model.num_hidden_layers / model.global_attention_every) / model.num_hidden_layers
        output += local * (weights * (2 if model.attention_dropout else 1) - output)
    before = size * 4 * width + output
    after = 2 * norm_input + size * (width + (4 if gated else 2) * inner) + 16
    if model.padding == "unpadded":
        after += size * width
    after_attention = model.attention_output_dropout
    if model.hidden_dropout if after_attention is None else after_attention:
        after += width
    if model.hidden_dropout:
        after += inner if gated else width
    return before, after


def memory_of_rank(
    model: ModelConfig,
    batch: Batch,
    execution: Execution = BF16,
    *,
    vocab_size: int,
    zero: ZeroOptimization,
    ranks: int,
    formats: Formats = FP32,
) -> Memory:
    """Return the memory of one rank. zero, formats: the ds_config's."""
    size, fp8 = execution.size, execution.fp8
    layers, recomputed = model.num_hidden_layers, model.recomputed_layers
    weights = num_weights(model, vocab_size)
    kept = kept_bytes(model, vocab_size, batch, execution)
    if execution.bf16 and formats.weight == 4:
        # Autocast keeps bf16 copies of the weights; with run.fp8 the layers' linear maps have none.
        kept += 2 * (weights - (layers * weights_of_maps(model) if fp8 else 0))
    if recomputed:
        # All layers but one of them are recomputed from their inputs.
        layer = batch.slots * sum(_kept_per_slot(model, execution))
        kept += batch.slots * recomputed * size * model.hidden_size - (recomputed - 1) * layer
    # While a layer runs backwards, its MLP's gradients exist too; a cast to FP8 makes an fp32 copy of the largest.
    gradients = batch.slots * _width_of_up(model) * (2 * size + (4 if fp8 else 0))
    # PyTorch's loss makes the fp32 logits from those in bf16.
    loss = LOSS_CHUNK if execution.fused else 2 * batch.masked * vocab_size if execution.bf16 else 0
    # A graph computes all gradients of a micro-batch before it adds them to those of the step.
    states = _state_bytes(weights, layers, zero, ranks, formats) + (
        formats.gradient * weights if execution.graphs else 0
    )
    return Memory(states=states, kept=kept, work=max(loss, gradients))


def _state_bytes(weights: int, layers: int, zero: ZeroOptimization, ranks: int, formats: Formats) -> float:
    """Return the bytes of weights, gradients and optimizer on a rank's device.

    ZeRO 1 and 2 keep an fp32 copy of the weights that the optimizer updates beside those that the model reads.
    Offloaded, that copy and the moments are in host memory. ZeRO 1 adds gradients of another format than the weights'
    up in further memory. Gradients are sent from two buckets, and from ZeRO 2 on gathered in two.
    """
    if zero.stage == 0:
        return 16.0 * weights
    weight, gradient = formats
    own, buckets = weights / ranks, 2 * weight * zero.reduce_bucket_size
    optimizer = 0 if in_host_memory(zero.offload_optimizer) else 12 * own
    if zero.stage == 1:
        return (2 * weight + (gradient if gradient != weight else 0)) * weights + optimizer + buckets
    if zero.stage == 2:
        return weight * weights + gradient * own + optimizer + 2 * buckets
    kept = gradient if in_host_memory(zero.offload_param) else weight + gradient
    # The weights of two layers are gathered at a time.
    return kept * own + optimizer + 2 * weight * weights / layers + 2 * buckets
