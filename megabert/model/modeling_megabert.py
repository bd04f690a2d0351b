"""MegaBert and its heads, for transformers' callers (padded rows) and for our own trainers (packed tokens).

A caller who passes cu_seqlens speaks packed: every tensor is (T, ...). Everyone else speaks (B, S) with an
attention_mask; those rows are unpadded at the door and padded again on the way out.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

# Every file of the folder is imported here directly: transformers 4 copies only those of an exported folder to its cache.
from .alibi import alibi_slopes  # noqa: F401
from .attention import PLANNERS
from .buckets import plan_buckets  # noqa: F401
from .configuration_megabert import MegaBertConfig
from .layers import Decoder, Embeddings, Encoder, MlmTransform, Norm, Pooler
from .ops import IGNORE_INDEX, MaskedLoss, upcast
from .padding import Sequences, first_tokens, repad, spread, unpad, unpad_in_place

NOT_HERE = {
    "output_attentions": "there are none to give, no attention matrix is ever whole",
    "inputs_embeds": "pass input_ids, embeddings are looked up and normalised in one operation",
    "head_mask": "no head can be masked, attention is one operation over all of them",
    "encoder_hidden_states": "this is an encoder, without cross-attention",
}


@dataclass(frozen=True)
class Tokens:
    """A batch on its way through the encoder: T real tokens, and how to give (B, S) back.

    indices: (T,) place of each token in the rows, or None for a packed batch.
    """

    input_ids: Tensor
    position_ids: Tensor
    token_type_ids: Tensor | None
    sequences: Sequences
    indices: Tensor | None = None
    shape: tuple[int, int] = (0, 0)

    def pick(self, values: Tensor) -> Tensor:
        """(B, S) labels or the like -> (T,)."""
        return values if self.indices is None else values.flatten()[self.indices]

    def spread(self, values: Tensor) -> Tensor:
        """(T, ...) -> (B, S, ...), or unchanged for a packed batch."""
        return values if self.indices is None else repad(values, self.indices, *self.shape)


def positions_within(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Count from 0 in each document. [0, 3, 5] -> [0, 1, 2, 0, 1]."""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), token, right=True) - 1
    return token - cu_seqlens.long()[document]


def read_tokens(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> Tokens:
    """Bring either kind of call to (T,) tokens. Raises ValueError for ids that are not (T,) or (B, S)."""
    if cu_seqlens is not None:
        if max_seqlen is None:
            max_seqlen = max(cu_seqlens.diff().tolist(), default=0)
        if position_ids is None:
            position_ids = positions_within(cu_seqlens, len(input_ids))
        return Tokens(input_ids, position_ids, token_type_ids, Sequences(cu_seqlens, max_seqlen))
    if input_ids.dim() != 2:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}, expected (batch, length), or (tokens,) with cu_seqlens."
        )
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    indices, sequences = (unpad_in_place if torch.compiler.is_exporting() else unpad)(attention_mask)

    def flatten(ids: Tensor) -> Tensor:
        return ids.expand_as(input_ids).flatten()[indices]

    if position_ids is None:  # BERT counts slots, not tokens: a row padded on the left starts later
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
    types = None if token_type_ids is None else flatten(token_type_ids)
    shape = (input_ids.shape[0], input_ids.shape[1])
    return Tokens(flatten(input_ids), flatten(position_ids), types, sequences, indices, shape)


class MegaBertPreTrainedModel(PreTrainedModel):
    """_auto_class, in the classes below: save_pretrained() puts this code beside the weights that it saves."""

    config: MegaBertConfig  # pyrefly: ignore[bad-override-mutable-attribute]
    config_class = MegaBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    # Else transformers' Trainer takes **kwargs to mean that the loss is divided by its num_items_in_batch, and with gradient
    # accumulation makes gradients as many times too large as there are micro-batches.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _no_split_modules = ["Block", "Embeddings"]  # noqa: RUF012 (transformers reads it as a class attribute)

    def _init_weights(self, module: nn.Module) -> None:
        """BERT's: weights from N(0, initializer_range), the row of [PAD] and biases 0, LayerNorm 1 and 0."""
        if isinstance(module, (nn.Linear, nn.Embedding, Decoder)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
        if isinstance(module, Norm):
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Linear, Decoder, Norm)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class MegaBertModel(MegaBertPreTrainedModel):
    """Embeddings and encoder, and optionally the pooler."""

    _auto_class = "AutoModel"

    def __init__(self, config: MegaBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        if (name := config._attn_implementation or "sdpa") not in PLANNERS:
            raise ValueError(f"attn_implementation is {name!r}, expected one of {', '.join(PLANNERS)}.")
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding), "word embeddings are an nn.Embedding"
        self.embeddings.word_embeddings = value

    def encode(
        self, tokens: Tokens, rows: Tensor | None = None, every_layer: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Hidden states of `tokens`, (T, E), or of the chosen rows (M,) only; and with every_layer all before."""
        hidden = self.embeddings(tokens.input_ids, tokens.token_type_ids, tokens.position_ids)
        return self.encoder(hidden, tokens.sequences, rows, every_layer)

    def pool(self, hidden: Tensor, sequences: Sequences) -> Tensor:
        """The pooled first token of each document, (B, E); an empty one's hidden state is 0. hidden: (T, E)."""
        assert self.pooler is not None, "this model was built without a pooler"
        documents, first = first_tokens(sequences)
        return self.pooler(spread(hidden.index_select(0, first), documents, sequences.cu_seqlens.shape[0] - 1))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        tokens = read_tokens(
            _checked(input_ids, kwargs), attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen
        )
        every_layer = _wanted(output_hidden_states, self.config.output_hidden_states)
        hidden, states = self.encode(tokens, every_layer=every_layer)
        output = BaseModelOutputWithPooling(
            last_hidden_state=tokens.spread(hidden),
            pooler_output=None if self.pooler is None else self.pool(hidden, tokens.sequences),
            hidden_states=tuple(tokens.spread(state) for state in states) if every_layer else None,
        )
        return _as_asked(output, return_dict, self.config)


class MegaBertForMaskedLM(MegaBertPreTrainedModel):
    _tied_weights_keys = {"decoder.weight": "bert.embeddings.word_embeddings.weight"}  # noqa: RUF012
    _auto_class = "AutoModelForMaskedLM"

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.bert = MegaBertModel(config, add_pooling_layer=False)
        self.transform = MlmTransform(config)
        self.decoder = Decoder(config)
        self.post_init()

    def get_output_embeddings(self) -> Decoder:
        return self.decoder

    def set_output_embeddings(self, new_embeddings: Decoder) -> None:
        self.decoder = new_embeddings

    def masked_loss(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        masked_positions: Tensor,
        masked_labels: Tensor,
    ) -> MaskedLoss:
        """The training path: the last layer, the head and the loss on masked tokens only.

        input_ids, position_ids: (T,); cu_seqlens: (B + 1,); masked_positions: (M,) into T;
        masked_labels: (M,), IGNORE_INDEX where a place is unused. Returns sums, not means.
        """
        tokens = Tokens(input_ids, position_ids, None, Sequences(cu_seqlens, max_seqlen))
        hidden, _ = self.bert.encode(tokens, rows=masked_positions.long())
        return self.decoder(self.transform(hidden), masked_labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        masked_positions: Tensor | None = None,
        masked_labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | MaskedLoss | tuple:
        """transformers' masked language model; with masked_positions and the rest of a PackedBatch, masked_loss()."""
        if masked_positions is not None:
            batch: Any = (input_ids, position_ids, cu_seqlens, max_seqlen, masked_positions, masked_labels)
            return self.masked_loss(*batch)
        tokens = read_tokens(
            _checked(input_ids, kwargs), attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen
        )
        every_layer = _wanted(output_hidden_states, self.config.output_hidden_states)
        hidden, states = self.bert.encode(tokens, every_layer=every_layer)
        logits = self.decoder(self.transform(hidden))  # (T, V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(upcast(logits), tokens.pick(labels).long(), ignore_index=IGNORE_INDEX)
        output = MaskedLMOutput(
            loss=loss,
            logits=tokens.spread(logits),
            hidden_states=tuple(tokens.spread(state) for state in states) if every_layer else None,
        )
        return _as_asked(output, return_dict, self.config)


class MegaBertForSequenceClassification(MegaBertPreTrainedModel):
    """One label per document, an empty one too, whose hidden state is 0; with num_labels 1 a regression."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 2  # transformers' default
        self.bert = MegaBertModel(config)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """labels: (B,) integers, floats for a regression, or (B, num_labels) for several at once."""
        tokens = read_tokens(
            _checked(input_ids, kwargs), attention_mask, token_type_ids, position_ids, cu_seqlens, max_seqlen
        )
        every_layer = _wanted(output_hidden_states, self.config.output_hidden_states)
        if self.config.classifier_pooling == "mean":
            hidden, states = self.bert.encode(tokens, every_layer=every_layer)
            hidden = mean_of_documents(hidden, tokens.sequences.cu_seqlens, tokens.sequences.num_keys)
        else:
            documents, first = first_tokens(tokens.sequences)
            hidden, states = self.bert.encode(tokens, rows=first, every_layer=every_layer)
            hidden = spread(hidden, documents, tokens.sequences.cu_seqlens.shape[0] - 1)
        assert self.bert.pooler is not None, "a classifier has a pooler"
        logits = self.classifier(self.dropout(self.bert.pooler(hidden)))  # (B, num_labels)
        output = SequenceClassifierOutput(
            loss=None if labels is None else _classification_loss(logits, labels, self.config),
            logits=logits,
            hidden_states=tuple(tokens.spread(state) for state in states) if every_layer else None,
        )
        return _as_asked(output, return_dict, self.config)


class MegaBertForTokenClassification(MegaBertPreTrainedModel):
    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.num_labels = config.num_labels or 2  # transformers' default
        self.bert = MegaBertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(_classifier_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """labels: (B, S), IGNORE_INDEX where none."""
        tokens = read_tokens(_checked(input_ids, kwargs), attention_mask, token_type_ids, position_ids, None, None)
        every_layer = _wanted(output_hidden_states, self.config.output_hidden_states)
        hidden, states = self.bert.encode(tokens, every_layer=every_layer)
        logits = self.classifier(self.dropout(hidden))  # (T, num_labels)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(upcast(logits), tokens.pick(labels).long(), ignore_index=IGNORE_INDEX)
        output = TokenClassifierOutput(
            loss=loss,
            logits=tokens.spread(logits),
            hidden_states=tuple(tokens.spread(state) for state in states) if every_layer else None,
        )
        return _as_asked(output, return_dict, self.config)


class MegaBertForQuestionAnswering(MegaBertPreTrainedModel):
    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.bert = MegaBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple:
        """start_positions, end_positions: (B,) or (B, 1) slots; those outside the row are ignored, as in BERT."""
        tokens = read_tokens(_checked(input_ids, kwargs), attention_mask, token_type_ids, position_ids, None, None)
        every_layer = _wanted(output_hidden_states, self.config.output_hidden_states)
        hidden, states = self.bert.encode(tokens, every_layer=every_layer)
        start, end = tokens.spread(self.qa_outputs(hidden)).unbind(dim=-1)  # (B, S) each
        loss = None
        if start_positions is not None and end_positions is not None:
            length = start.shape[1]
            losses = [
                F.cross_entropy(upcast(scores), place.view(-1).clamp(0, length), ignore_index=length)
                for scores, place in ((start, start_positions), (end, end_positions))
            ]
            loss = (losses[0] + losses[1]) / 2
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=tuple(tokens.spread(state) for state in states) if every_layer else None,
        )
        return _as_asked(output, return_dict, self.config)


def mean_of_documents(hidden: Tensor, cu_seqlens: Tensor, num_keys: Tensor | None = None) -> Tensor:
    """Average (T, E) over each document: (B, E), in fp32 where hidden is half precision; an empty document gives 0.

    num_keys: as in Sequences, (B,), where all documents occupy as many slots.
    """
    if num_keys is not None:
        rows = upcast(hidden).view(num_keys.shape[0], -1, hidden.shape[1])  # (B, S, E)
        real = torch.arange(rows.shape[1], device=hidden.device) < num_keys[:, None]
        return (rows * real[:, :, None]).sum(dim=1) / num_keys.clamp(min=1)[:, None]
    lengths = cu_seqlens.diff().long()
    document = torch.repeat_interleave(torch.arange(len(lengths), device=hidden.device), lengths)
    sums = upcast(hidden.new_zeros(len(lengths), hidden.shape[1])).index_add(0, document, upcast(hidden))
    return sums / lengths.clamp(min=1)[:, None]


def _classifier_dropout(config: MegaBertConfig) -> float:
    return config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout


def _classification_loss(logits: Tensor, labels: Tensor, config: MegaBertConfig) -> Tensor:
    """transformers' rule: problem_type if set, else by num_labels and the labels' dtype."""
    kind = config.problem_type
    if kind is None:
        integers = not labels.is_floating_point()
        kind = "regression" if config.num_labels == 1 else "single" if integers else "multi"
    if kind == "regression":
        return F.mse_loss(upcast(logits).squeeze(), labels.squeeze().to(upcast(logits).dtype))
    if kind.startswith("single"):
        return F.cross_entropy(upcast(logits), labels.view(-1).long())
    return F.binary_cross_entropy_with_logits(upcast(logits), labels.to(upcast(logits).dtype))


def _checked(input_ids: Tensor | None, more: dict[str, Any]) -> Tensor:
    """The ids. Raises ValueError for what transformers' BERT can and this model cannot; whatever else comes is ignored, as there."""
    for name, why in NOT_HERE.items():
        given = more.get(name)
        if given is not None and given is not False:
            raise ValueError(f"{name}: {why}.")
    if input_ids is None:
        raise ValueError("input_ids is missing.")
    return input_ids


def _wanted(asked: bool | None, default: bool | None) -> bool:
    return bool(default if asked is None else asked)


def _as_asked(output, return_dict: bool | None, config: MegaBertConfig):
    """transformers callers may ask for a tuple."""
    return output if _wanted(return_dict, getattr(config, "return_dict", True)) else output.to_tuple()
