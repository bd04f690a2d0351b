"""The memory that one rank of a training run needs, in bytes, by a written formula."""

from dataclasses import dataclass

from megabert.config.recipe import ModelConfig

# Of DeepSpeed's ZeRO 1 and 2: two buckets of gradients of 5e7 numbers, as in ds_configs/.
ZERO_BUCKETS = 2 * 5e7 * 4
# CUDA's context, cuBLAS and NCCL.
CONTEXT = 1.5e9
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


def num_weights(model: ModelConfig, vocab_size: int) -> int:
    """Return the number of parameters of a masked language model; decoder and embeddings share theirs."""
    width, inner, gated = model.hidden_size, model.intermediate_size, model.ffn == "geglu"
    up = 2 * inner if gated else inner
    up_bias = 0 if gated else inner
    layer = 4 * width * width + 4 * width + width * up + up_bias + inner * width + width + 4 * width
    positions = model.max_position_embeddings * width if model.position == "learned" else 0
    head = width * width + 3 * width + vocab_size
    return vocab_size * width + 2 * width + positions + 2 * width + model.num_hidden_layers * layer + head


def kept_per_token(model: ModelConfig, bf16: bool = True) -> float:
    """Return the bytes that one layer keeps for its backward pass, for each computed token.

    The input, q, k, v, the attention's output, both products that a LayerNorm reads, and the LayerNorm's output between
    them: 8 matrices of the width. The MLP: both halves before GeGLU and its result, or GELU's input and result. In an
    fp32 stream the two matrices that a LayerNorm writes have 4 bytes, and a bf16 copy that the products read.
    """
    size = 2 if bf16 else 4
    wide_stream = bf16 and model.layer_norm_dtype == "float32"
    inner = (3 if model.ffn == "geglu" else 2) * model.intermediate_size
    stream = 2 * 4 * model.hidden_size if wide_stream else 0
    return size * (8 * model.hidden_size + inner) + stream + 4 * model.num_attention_heads + 16


def memory_of_rank(
    model: ModelConfig, *, vocab_size: int, zero_stage: int, ranks: int, tokens: int, bf16: bool = True
) -> Memory:
    """Return the memory of one rank whose micro-batch computes `tokens` tokens, padding included.

    ZeRO 1 and 2 keep a copy of the weights that the optimizer updates beside those that the model reads. The last
    layer computes its MLP for masked tokens only; it is counted whole.
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
    layer = tokens * kept_per_token(model, bf16)
    layers, every = model.num_hidden_layers, model.checkpoint_every
    size = 2 if bf16 else 4
    recomputed = 0 if every == 0 else layers // every
    kept = (layers - recomputed) * layer + recomputed * tokens * size * model.hidden_size + (layer if recomputed else 0)
    inner = (4 if model.ffn == "geglu" else 2) * model.intermediate_size
    # The loss keeps its gradients of the embeddings; while a layer runs backwards, its MLP's gradients exist too.
    loss = 2 * 4 * vocab_size * model.hidden_size + LOSS_CHUNK
    casts = size * weights if bf16 else 0
    return Memory(states=states, kept=kept, work=casts + max(loss, tokens * size * inner))
