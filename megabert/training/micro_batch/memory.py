"""The memory that one rank of a training run needs, in bytes, by a written formula."""

from dataclasses import dataclass

from megabert.config.recipe import ModelConfig
from megabert.training.micro_batch.batch import Batch

# Of DeepSpeed's ZeRO 1 and 2: two buckets of gradients of 5e7 numbers, as in ds_configs/.
ZERO_BUCKETS = 2 * 5e7 * 4
# CUDA's context, cuBLAS and NCCL.
CONTEXT = 1.5e9
# Of a card's memory, what may be predicted to be full: the formula is not exact.
FULL = 0.9
# The allocator's fragments: a share of what changes from layer to layer.
FRAGMENTS = 0.05
# Logits of a chunk of the loss in bf16, and their copy in the products: kernels/cross_entropy.py's MAX_LOGITS.
LOSS_CHUNK = 2 * 2 * (1 << 26)


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


def num_weights(model: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters of a masked language model; decoder and embeddings share theirs."""
    width, inner, gated = model.hidden_size, model.intermediate_size, model.ffn == "geglu"
    up = 2 * inner if gated else inner
    up_bias = 0 if gated else inner
    layer = 4 * width * width + 4 * width + width * up + up_bias + inner * width + width + 4 * width
    rows = model.max_position_embeddings + model.position_offset if model.position == "learned" else 0
    head = width * width + 3 * width + vocab_size
    return (vocab_size + model.num_token_types + rows + 2) * width + model.num_hidden_layers * layer + head


def kept_bytes(model: ModelConfig, vocab_size: int, batch: Batch, bf16: bool = True) -> float:
    """Return the bytes that autograd keeps for a micro-batch's backward pass, without recomputation.

    Per slot and layer, up to attention: the residual, q, k, v, attention's output and log-sum-exp, 5 matrices of the
    width. After it: the input, mean and scale of both LayerNorms and the first one's output, and of the MLP both halves
    before GeGLU and its result, or GELU's input and result. Beside an fp32 stream the products keep a bf16 copy of it.
    An unpadded model computes what follows the last layer's attention for masked tokens only. Autocast keeps the
    weights in bf16, and the loss the decoder's gradient in fp32.
    """
    before, after = _kept_per_slot(model, bf16)
    layers, rows = model.num_hidden_layers, batch.slots if model.padding == "padded" else batch.masked
    casts = 2 * num_weights(model, vocab_size) if bf16 else 0
    activations = layers * batch.slots * before + ((layers - 1) * batch.slots + rows) * after
    return activations + casts + 4 * vocab_size * model.hidden_size


def _kept_per_slot(model: ModelConfig, bf16: bool) -> tuple[float, float]:
    """Return the bytes that a layer keeps for a slot, up to attention and after it."""
    size = 2 if bf16 else 4
    stream = 4 * model.hidden_size if bf16 and model.layer_norm_dtype == "float32" else 0
    inner = (3 if model.ffn == "geglu" else 2) * model.intermediate_size
    before = stream + 5 * size * model.hidden_size + 4 * model.num_attention_heads
    return before, stream + size * (3 * model.hidden_size + inner) + 16


def memory_of_rank(
    model: ModelConfig, batch: Batch, *, vocab_size: int, zero_stage: int, ranks: int, bf16: bool = True
) -> Memory:
    """Return the memory of one rank.

    ZeRO 1 and 2 keep a copy of the weights that the optimizer updates beside those that the model reads.
    """
    weights = num_weights(model, vocab_size)
    own = weights / ranks
    if zero_stage == 0:
        states = 16.0 * weights
    elif zero_stage == 1:
        states = 8 * weights + 12 * own + ZERO_BUCKETS
    elif zero_stage == 2:
        states = 4 * weights + 16 * own + 2 * ZERO_BUCKETS
    else:
        states = 20 * own + 4 * (weights / model.num_hidden_layers) * 2 + 2 * ZERO_BUCKETS
    size = 2 if bf16 else 4
    layers, every = model.num_hidden_layers, model.checkpoint_every
    kept = kept_bytes(model, vocab_size, batch, bf16)
    if recomputed := layers // every if every else 0:
        # All layers but one of them are recomputed from their inputs.
        layer = batch.slots * sum(_kept_per_slot(model, bf16))
        kept += batch.slots * recomputed * size * model.hidden_size - (recomputed - 1) * layer
    inner = (4 if model.ffn == "geglu" else 2) * model.intermediate_size
    # While a layer runs backwards, its MLP's gradients exist too.
    return Memory(states=states, kept=kept, work=max(LOSS_CHUNK, batch.slots * size * inner))
