"""Compute hidden states from token ids with the encoder's layers, on (T,) tokens without padding.

Letters of the shapes in this package:
T tokens in a bin, B documents, S longest document or padded length, H heads, D head size, E hidden size,
F MLP width, V vocabulary, M masked tokens. Where the trainer packs documents, B counts pieces and filler sequences.
"""

import functools
import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Attend, Planner, plan_as_configured
from .configuration_megabert import MegaBertConfig
from .inputs import in_one_graph
from .ops import TORCH_OPS, MaskedLoss, Ops, alibi_slopes, dropout, rope_table
from .padding import Sequences, Tokens, as_rows, row_slots, spread

# (hidden, residual): the input of a layer's products, and what their result is added to. Both hold the same values;
# after a post-norm block they may be two tensors, so that a kernel can sum their gradients (ops.add_layer_norm).
HiddenAndResidual = tuple[Tensor, Tensor]


class OpsModule(nn.Module):
    """A module that computes through `ops`; set_ops() replaces them in a whole model."""

    def __init__(self, config: MegaBertConfig):
        super().__init__()
        self.config = config
        self.low_precision = config.layer_norm_dtype == "bfloat16"
        self.use_ops(TORCH_OPS)

    def use_ops(self, ops: Ops) -> None:
        self.ops = ops

    def dropout_p(self, probability: float) -> float:
        return probability if self.training else 0.0


class Norm(OpsModule):
    """LayerNorm over the hidden size, in the precision of the config's layer_norm_dtype."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size)) if config.norm_bias else None

    def parameters_for_ops(self) -> tuple[Tensor, Tensor]:
        """Return weight and bias; the operations always add a bias, which is 0 where the model has none."""
        return self.weight, torch.zeros_like(self.weight) if self.bias is None else self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, *self.parameters_for_ops(), self.config.layer_norm_eps, self.low_precision)


class AddNorm(Norm):
    """LayerNorm(dropout(x) + residual)."""

    def __init__(self, config: MegaBertConfig, dropout: float):
        super().__init__(config)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor) -> HiddenAndResidual:  # type: ignore[override]
        return self.ops.add_layer_norm(
            x,
            residual,
            *self.parameters_for_ops(),
            eps=self.config.layer_norm_eps,
            dropout_p=self.dropout_p(self.dropout),
            low_precision=self.low_precision,
        )


class Attention(OpsModule):
    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.bias)
        self.out = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor, attend: Attend, kept_tokens: Tensor | None) -> Tensor:
        """hidden (T, E) -> (T, E), or with kept_tokens (M,) only those tokens, (M, E)."""
        shape = (-1, 3, self.config.num_attention_heads, self.config.head_dim)
        mixed = attend(self.qkv(hidden).view(shape), self.dropout_p(self.config.attention_probs_dropout_prob))
        mixed = mixed.reshape(-1, self.config.hidden_size)  # (T, E)
        return self.out(_select(mixed, kept_tokens))


class GatedMlp(OpsModule):
    """MosaicBERT's MLP: no bias in the up-projection; dropout on the gated product, none after the down-projection."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.ops.geglu(self.up(hidden), self.dropout_p(self.config.hidden_dropout_prob)))


class Mlp(OpsModule):
    """BERT's MLP: dropout after the down-projection, in the block."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.bias)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(hidden)))


class Block(OpsModule):
    """One layer: attention and MLP, each added to the residual stream; subclasses say where the norms are."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        gated = config.ffn == "geglu"
        self.attention = Attention(config)
        self.mlp = GatedMlp(config) if gated else Mlp(config)
        self.attention_dropout = config.hidden_dropout_prob
        if config.attention_output_dropout_prob is not None:
            self.attention_dropout = config.attention_output_dropout_prob
        self.mlp_dropout = 0.0 if gated else config.hidden_dropout_prob

    def forward(
        self, hidden: Tensor, residual: Tensor, attend: Attend, kept_tokens: Tensor | None = None
    ) -> HiddenAndResidual:
        """Compute the next stream (T, E). With kept_tokens (M,), all after attention is for those tokens only."""
        raise NotImplementedError


class PostNormBlock(Block):
    """BERT's order: attention, add and norm, MLP, add and norm."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.attention_norm = AddNorm(config, self.attention_dropout)
        self.mlp_norm = AddNorm(config, self.mlp_dropout)

    def forward(
        self, hidden: Tensor, residual: Tensor, attend: Attend, kept_tokens: Tensor | None = None
    ) -> HiddenAndResidual:
        mixed = self.attention(hidden, attend, kept_tokens)
        hidden, residual = self.attention_norm(mixed, _select(residual, kept_tokens))
        return self.mlp_norm(self.mlp(hidden), residual)


class PreNormBlock(Block):
    """ModernBERT's order: norm, attention, add, norm, MLP, add.

    The first layer has no norm before attention: the embeddings' norm takes its place.
    """

    def __init__(self, config: MegaBertConfig, first: bool):
        super().__init__(config)
        self.attention_norm = nn.Identity() if first else Norm(config)
        self.mlp_norm = Norm(config)

    def forward(
        self, hidden: Tensor, residual: Tensor, attend: Attend, kept_tokens: Tensor | None = None
    ) -> HiddenAndResidual:
        mixed = self.attention(self.attention_norm(hidden), attend, kept_tokens)
        hidden = _select(residual, kept_tokens) + dropout(mixed, self.dropout_p(self.attention_dropout))
        hidden = hidden + dropout(self.mlp(self.mlp_norm(hidden)), self.dropout_p(self.mlp_dropout))
        return hidden, hidden


class Encoder(OpsModule):
    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        post, count = config.norm_position == "post", config.num_hidden_layers
        blocks = (PostNormBlock(config) if post else PreNormBlock(config, first=layer == 0) for layer in range(count))
        self.layers = nn.ModuleList(blocks)
        self.final_norm = nn.Identity() if post else Norm(config)
        # Recompute the activations of every k-th layer in the backward pass; 0 for none.
        self.checkpoint_every = 0
        self.slopes: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self.slopes_of_graphs: Tensor | None = None
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers' switch: gradient_checkpointing_enable() sets it and _gradient_checkpointing_func."""
        return self.checkpoint_every > 0

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.checkpoint_every = int(enabled)

    def use_ops(self, ops: Ops) -> None:
        """Use the attention in `ops`, else the one that the config names."""
        super().use_ops(ops)
        self.planner: Planner = ops.attention or functools.partial(plan_as_configured, self.config)

    def forward(
        self, hidden: Tensor, tokens: Tokens, kept_tokens: Tensor | None = None, every_layer: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode hidden (T, E).

        kept_tokens: (M,) tokens to return; None means all. Returns the last hidden states, (M, E) or (T, E), and with
        every_layer the (T, E) before each layer and the last ones.
        """
        sequences, position_ids, slots = tokens.sequences, tokens.position_ids, None
        if self.config.padding == "padded" and sequences.num_keys is None:
            hidden, sequences, position_ids, slots = self._pad(hidden, tokens)
        attend = self._plan(sequences, position_ids, hidden)
        # The index of the layer that computes the kept tokens only: the last one, or none where all slots are needed.
        selecting = len(self.layers) - 1 if slots is None and not every_layer else -1
        states, stream = [], (hidden, hidden)
        for index, layer in enumerate(self.layers):
            if every_layer:
                states.append(_select(stream[0], slots))
            its_tokens = kept_tokens if index == selecting else None
            stream = self._run(index, layer, stream, attend[self.config.is_local(index)], its_tokens)
        hidden = self.final_norm(_select(stream[0], slots))
        if every_layer:
            states.append(hidden)
        return hidden if selecting >= 0 else _select(hidden, kept_tokens), states

    def _pad(self, hidden: Tensor, tokens: Tokens) -> tuple[Tensor, Sequences, Tensor, Tensor]:
        """Lay the tokens out as every slot of (B, S), which an encoder without unpadding computes.

        Returns hidden (B * S, E), its sequences and positions, and the slots (T,) of the real tokens.
        """
        padded, position_ids = as_rows(tokens.sequences), tokens.position_ids
        slots = row_slots(tokens.sequences, hidden.shape[0])
        num_slots = (len(padded.cu_seqlens) - 1) * padded.max_seqlen
        if self.config.position == "rope":
            position_ids = spread(position_ids, slots, num_slots)
        return spread(hidden, slots, num_slots), padded, position_ids, slots

    def _plan(self, sequences: Sequences, position_ids: Tensor, hidden: Tensor) -> dict[bool, Attend]:
        """Return the attention of global layers, and as [True] that of local ones if there are any."""
        config = self.config
        slopes = self._slopes(hidden) if config.position == "alibi" else None
        plans = {False: self.planner(sequences, slopes, config.head_dim)}
        if config.reach is not None:
            plans[True] = self.planner(sequences, slopes, config.head_dim, config.reach)
        if config.position == "rope":
            thetas = {False: config.rope_theta, True: config.local_rope_theta or config.rope_theta}
            plans = {
                local: self._rotated(attend, rope_table(position_ids, config.head_dim, thetas[local]))
                for local, attend in plans.items()
            }
        return plans

    def _rotated(self, attend: Attend, table: Tensor) -> Attend:
        return lambda qkv, dropout_p: attend(self.ops.rotate(qkv, table), dropout_p)

    def _slopes(self, hidden: Tensor) -> Tensor:
        """Return ALiBi's slopes (H,) on the device of hidden, cached, because a copy to the device would block."""
        # Kernels take fp32 slopes; an fp64 model computes in fp64 throughout.
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        # Traced tensors are not cached: they are unusable outside the trace. A cached one would be a constant in it.
        if in_one_graph():
            if self.slopes_of_graphs is not None and not torch.compiler.is_exporting():
                return self.slopes_of_graphs
            return alibi_slopes(self.config.num_attention_heads, dtype).to(hidden.device)
        if (key := (dtype, hidden.device)) not in self.slopes:
            # A tensor that is made in inference mode would be useless in training.
            with torch.inference_mode(False):
                self.slopes[key] = alibi_slopes(self.config.num_attention_heads, dtype).to(hidden.device)
        return self.slopes[key]

    def keep_slopes(self, device: torch.device) -> None:
        """Store ALiBi's slopes in fp32 on `device`, for torch.compile."""
        self.slopes_of_graphs = alibi_slopes(self.config.num_attention_heads).to(device)

    def _run(
        self, index: int, layer: nn.Module, stream: HiddenAndResidual, attend: Attend, kept_tokens: Tensor | None
    ) -> HiddenAndResidual:
        if self.training and self.checkpoint_every and index % self.checkpoint_every == 0:
            return self._gradient_checkpointing_func(layer, *stream, attend, kept_tokens)  # type: ignore[return-value]
        return layer(*stream, attend, kept_tokens)


def _select(x: Tensor, rows: Tensor | None) -> Tensor:
    """Return these rows of x, or with None all."""
    return x if rows is None else x.index_select(0, rows)


class MlmTransform(OpsModule):
    """BERT's transformation of a hidden state before the decoder: dense, GELU, LayerNorm."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.bias)
        self.norm = Norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(nn.functional.gelu(self.dense(hidden)))


class Decoder(OpsModule):
    """Projects hidden states to the vocabulary; its weight is tied to the word embedding's."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, hidden: Tensor, labels: Tensor | None = None) -> Tensor | MaskedLoss:
        """hidden (M, E) -> logits (M, V), or with labels (M,) the loss, without keeping the logits."""
        if labels is None:
            return nn.functional.linear(hidden, self.weight, self.bias)
        z_loss = self.config.z_loss if self.training else 0.0
        return self.ops.masked_cross_entropy(hidden, self.weight, self.bias, labels, z_loss)


class Pooler(OpsModule):
    """Applies dense and an activation to each document's first token: BERT's pooler, or a classifier's hidden layer."""

    def __init__(self, config: MegaBertConfig, activation: str = "tanh"):
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = {"tanh": torch.tanh, "gelu": nn.functional.gelu, "relu": torch.relu}[activation]

    def forward(self, first: Tensor) -> Tensor:
        return self.activation(self.dense(first))


def pre_norm_stds(module: nn.Module, config: MegaBertConfig) -> dict[nn.Linear | nn.Embedding | Decoder, float]:
    """Return the weights to initialise after a module's submodules, each with its standard deviation.

    Smaller for what is added to the residual stream, as in ModernBERT (https://arxiv.org/abs/2412.13663, appendix A).
    """
    stds: dict[nn.Linear | nn.Embedding | Decoder, float] = {}
    if isinstance(module, (nn.Linear, nn.Embedding, Decoder)):
        stds[module] = config.initializer_range
    outputs: dict[type[nn.Module], str] = {Attention: "out", Mlp: "down", GatedMlp: "down", MlmTransform: "dense"}
    if out := outputs.get(type(module)):
        stds[getattr(module, out)] = config.initializer_range / math.sqrt(2 * config.num_hidden_layers)
    for name in ("classifier", "qa_outputs"):
        if isinstance(last := getattr(module, name, None), nn.Linear):
            stds[last] = config.hidden_size**-0.5
    return stds


def set_ops(model: nn.Module, ops: Ops) -> None:
    """Make every part of the model compute through `ops`."""
    for module in model.modules():
        if isinstance(module, OpsModule):
            module.use_ops(ops)
