"""The encoder, from token ids to hidden states, on (T,) tokens without padding.

Letters of the shapes in this package:
T tokens in a bin, B documents, S longest document or padded length, H heads, D head size, E hidden size,
F MLP width, V vocabulary, M masked tokens.
"""

import functools

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .alibi import alibi_slopes
from .attention import Attend, Planner, plan_as_configured
from .configuration_megabert import MegaBertConfig
from .inputs import in_one_graph
from .ops import TORCH_OPS, MaskedLoss, Ops
from .padding import Sequences, Tokens, as_rows, row_slots, spread


class Module(nn.Module):
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


class Norm(Module):
    """LayerNorm over the hidden size, in the precision of the config's layer_norm_dtype."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.layer_norm(x, self.weight, self.bias, self.config.layer_norm_eps, self.low_precision)


class Embeddings(Module):
    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        if config.position == "learned":
            self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.norm = Norm(config)

    def forward(self, tokens: Tokens) -> Tensor:
        """Embed the tokens. Types default to 0; inputs_embeds replace the word embeddings. Returns (T, E)."""
        input_ids, words, padding_idx = tokens.input_ids, self.word_embeddings.weight, self.word_embeddings.padding_idx
        if input_ids is None:
            # Each token looks up its own row of inputs_embeds.
            assert tokens.inputs_embeds is not None, "tokens have ids or embeddings"
            words, padding_idx = tokens.inputs_embeds, None
            input_ids = torch.arange(words.shape[0], device=words.device)
        types = torch.zeros_like(input_ids) if tokens.token_type_ids is None else tokens.token_type_ids
        ids, tables = [input_ids, types], [words, self.token_type_embeddings.weight]
        if self.config.position == "learned":
            ids.append(tokens.position_ids)
            tables.append(self.position_embeddings.weight)
        return self.ops.embed_layer_norm(
            ids,
            tables,
            self.norm.weight,
            self.norm.bias,
            eps=self.config.layer_norm_eps,
            dropout_p=self.dropout_p(self.config.hidden_dropout_prob),
            low_precision=self.low_precision,
            padding_idx=padding_idx,
        )


class AddNorm(Norm):
    """LayerNorm(dropout(x) + residual)."""

    def __init__(self, config: MegaBertConfig, dropout: float):
        super().__init__(config)
        self.dropout = dropout

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return self.ops.add_layer_norm(
            x,
            residual,
            self.weight,
            self.bias,
            eps=self.config.layer_norm_eps,
            dropout_p=self.dropout_p(self.dropout),
            low_precision=self.low_precision,
        )


class Attention(Module):
    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, attend: Attend, rows: Tensor | None) -> Tensor:
        """hidden (T, E) -> (T, E), or with rows (M,) only those tokens, (M, E)."""
        shape = (-1, 3, self.config.num_attention_heads, self.config.head_dim)
        mixed = attend(self.qkv(hidden).view(shape), self.dropout_p(self.config.attention_probs_dropout_prob))
        mixed = mixed.reshape(-1, self.config.hidden_size)  # (T, E)
        return self.out(mixed if rows is None else mixed.index_select(0, rows))


class GatedMlp(Module):
    """MosaicBERT's MLP: no bias in the up-projection; dropout on the gated product, none after the down-projection."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.ops.geglu(self.up(hidden), self.dropout_p(self.config.hidden_dropout_prob)))


class Mlp(Module):
    """BERT's MLP: dropout after the down-projection, in the AddNorm that follows."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(hidden)))


class Block(Module):
    """One post-LN layer: attention, add and norm, MLP, add and norm."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        gated = config.ffn == "geglu"
        self.attention = Attention(config)
        self.attention_norm = AddNorm(config, config.hidden_dropout_prob)
        self.mlp = GatedMlp(config) if gated else Mlp(config)
        self.mlp_norm = AddNorm(config, 0.0 if gated else config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, attend: Attend, rows: Tensor | None = None) -> Tensor:
        """hidden (T, E) -> (T, E). With rows (M,), everything after attention is computed for those tokens only."""
        mixed = self.attention(hidden, attend, rows)
        residual = hidden if rows is None else hidden.index_select(0, rows)
        hidden = self.attention_norm(mixed, residual)
        return self.mlp_norm(self.mlp(hidden), hidden)


class Encoder(Module):
    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        # Recompute the activations of every k-th layer in the backward pass; 0 for none.
        self.checkpoint_every = 0
        self.slopes: dict[tuple[torch.dtype, torch.device], Tensor] = {}
        self._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers' switch: gradient_checkpointing_enable() sets it and _gradient_checkpointing_func."""
        return self.checkpoint_every > 0

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enabled: bool) -> None:
        self.checkpoint_every = int(enabled)

    def use_ops(self, ops: Ops) -> None:
        """Take the attention of `ops` too, or where they have none the one that the config names."""
        super().use_ops(ops)
        self.planner: Planner = ops.attention or functools.partial(plan_as_configured, self.config)

    def forward(
        self, hidden: Tensor, sequences: Sequences, rows: Tensor | None = None, every_layer: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode hidden (T, E).

        rows: (M,) tokens to return; None means all. Returns the last hidden states, (M, E) or (T, E), and with
        every_layer the (T, E) before each layer and after the last one.
        """
        if self.config.padding == "padded" and sequences.num_keys is None:
            return self._forward_padded(hidden, sequences, rows, every_layer)
        attend = self._plan(sequences, hidden)
        last = len(self.layers) - 1
        states = []
        for index, layer in enumerate(self.layers):
            states.append(hidden)
            hidden = self._run(index, layer, hidden, attend, rows if index == last and not every_layer else None)
        states.append(hidden)
        if rows is not None and (every_layer or last < 0):
            hidden = hidden.index_select(0, rows)
        return hidden, states if every_layer else []

    def _plan(self, sequences: Sequences, hidden: Tensor) -> Attend:
        slopes = self._slopes(hidden) if self.config.position == "alibi" else None
        return self.planner(sequences, slopes, self.config.head_dim)

    def _slopes(self, hidden: Tensor) -> Tensor:
        """Return ALiBi's slopes (H,) on the device of hidden: copying them in every pass would wait for it."""
        # Kernels take fp32 slopes; an fp64 model computes in fp64 throughout.
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        num_heads, key = self.config.num_attention_heads, (dtype, hidden.device)
        if in_one_graph():  # a tensor of a trace is useless outside it, and one from outside is a constant in it
            return alibi_slopes(num_heads, dtype).to(hidden.device)
        if key not in self.slopes:
            with torch.inference_mode(False):  # a tensor of inference mode would be useless in training
                self.slopes[key] = alibi_slopes(num_heads, dtype).to(hidden.device)
        return self.slopes[key]

    def _run(self, index: int, layer: nn.Module, hidden: Tensor, attend: Attend, rows: Tensor | None) -> Tensor:
        if self.training and self.checkpoint_every and index % self.checkpoint_every == 0:
            return self._gradient_checkpointing_func(layer, hidden, attend, rows)  # type: ignore[return-value]
        return layer(hidden, attend, rows)

    def _forward_padded(
        self, hidden: Tensor, sequences: Sequences, rows: Tensor | None, every_layer: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute every slot of (B, S), as an encoder without unpadding does; then return the real tokens."""
        padded = as_rows(sequences)
        slots = row_slots(sequences, hidden.shape[0])
        num_slots = (len(padded.cu_seqlens) - 1) * padded.max_seqlen
        hidden = spread(hidden, slots, num_slots)
        attend = self._plan(padded, hidden)
        states = []
        for index, layer in enumerate(self.layers):
            states.append(hidden.index_select(0, slots))
            hidden = self._run(index, layer, hidden, attend, None)
        hidden = hidden.index_select(0, slots)
        states.append(hidden)
        hidden = hidden if rows is None else hidden.index_select(0, rows)
        return hidden, states if every_layer else []


class MlmTransform(Module):
    """BERT's transformation of a hidden state before the decoder: dense, GELU, LayerNorm."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = Norm(config)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(nn.functional.gelu(self.dense(hidden)))


class Decoder(Module):
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


class Pooler(Module):
    """Applies dense and tanh to each document's first token."""

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, first: Tensor) -> Tensor:
        return torch.tanh(self.dense(first))


def set_ops(model: nn.Module, ops: Ops) -> None:
    """Make every part of the model compute through `ops`."""
    for module in model.modules():
        if isinstance(module, Module):
            module.use_ops(ops)
