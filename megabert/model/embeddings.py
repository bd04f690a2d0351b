"""Embed tokens: (T,) ids of words, types and positions -> (T, E). The letters are those of layers.py."""

import torch
from torch import Tensor, nn

from .configuration_megabert import MegaBertConfig
from .layers import AddNorm, Norm, OpsModule
from .ops import TORCH_OPS
from .padding import Sequences, Tokens, places_in_documents, shift


class Embeddings(OpsModule):
    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        if config.token_types:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        if config.position == "learned":
            self.position_embeddings = nn.Embedding(config.position_rows, config.hidden_size)
        self.norm = Norm(config)
        self.neighbors = NeighborMixing(config) if config.embedding_neighbors else None

    def forward(self, tokens: Tokens) -> Tensor:
        """Embed the tokens. Types default to 0; inputs_embeds replace the word embeddings. Returns (T, E)."""
        hidden = self._embed(tokens)
        return hidden if self.neighbors is None else self.neighbors(hidden, tokens.sequences)

    def _embed(self, tokens: Tokens) -> Tensor:
        padding_idx = None
        if tokens.input_ids is None:
            assert tokens.inputs_embeds is not None, "tokens have neither ids nor embeddings"
            parts = [_own_rows(tokens.inputs_embeds)]
        else:
            parts = [self._table(self.word_embeddings, tokens.input_ids)]
            if parts[0][1] is self.word_embeddings.weight:
                padding_idx = self.word_embeddings.padding_idx
        if self.config.token_types:
            types = torch.zeros_like(parts[0][0]) if tokens.token_type_ids is None else tokens.token_type_ids
            parts.append(self._table(self.token_type_embeddings, types))
        if self.config.position == "learned":
            offset = self.config.position_offset
            positions = tokens.position_ids + offset if offset else tokens.position_ids
            parts.append(self._table(self.position_embeddings, positions))
        ids, tables = map(list, zip(*parts, strict=True))
        return self.ops.embed_layer_norm(
            ids,
            tables,
            *self.norm.parameters_for_ops(),
            eps=self.config.layer_norm_eps,
            dropout_p=self.dropout_p(self.config.hidden_dropout_prob),
            low_precision=self.low_precision,
            padding_idx=padding_idx,
        )

    def _table(self, embedding: nn.Embedding, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids (T,) and the table that they are looked up in.

        Kernels read the weight itself. What others add to the module, such as a hook that makes its output require
        gradients, noise or an adapter, has an effect only if the module is called.
        """
        plain = type(embedding) is nn.Embedding and not embedding._forward_hooks and not embedding._forward_pre_hooks
        return (ids, embedding.weight) if plain or self.ops is not TORCH_OPS else _own_rows(embedding(ids))


class NeighborMixing(OpsModule):
    """LayerNorm(x + the sum of W_k x[i + k] over k = -1, 1, -2, 2, ...): a convolution over a document's embeddings.

    Beyond the ends of the document x is 0. The sum has no term for the token itself.
    """

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        offsets = range(1, config.embedding_neighbors + 1)
        self.offsets = [sign * offset for offset in offsets for sign in (-1, 1)]
        size = config.hidden_size
        self.maps = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in self.offsets)
        self.norm = AddNorm(config, config.hidden_dropout_prob)

    def forward(self, hidden: Tensor, sequences: Sequences) -> Tensor:
        places, lengths = places_in_documents(sequences, hidden.shape[0])
        neighbors = (shift(hidden, offset, places, lengths) for offset in self.offsets)
        mixed = sum(map_(each) for map_, each in zip(self.maps, neighbors, strict=True))
        return self.norm(mixed, hidden)[0]


def _own_rows(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids with which each token looks up its own row of (T, E), and these rows."""
    return torch.arange(embeddings.shape[0], device=embeddings.device), embeddings
