"""Wrap MegaBERT and its heads as transformers models, for padded rows and for the trainer's packed tokens.

With cu_seqlens a call is packed: every tensor is (T, ...). Without, tensors are (B, S) with an attention_mask; the rows
are unpadded at the start of the forward pass, and its results are padded again at the end.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput

# All files of this folder are imported here: of an exported folder, transformers 4 caches only what this file imports.
from .attention import PLANNERS
from .buckets import plan_buckets  # noqa: F401
from .configuration_megabert import MegaBertConfig
from .embeddings import Embeddings
from .inputs import Inputs, check_shape, flatten_choices, in_one_graph, read_tokens, refuse_unsupported
from .layers import Decoder, Encoder, MlmTransform, Norm, Pooler, pre_norm_stds
from .losses import choice_loss, classification_loss, span_loss, token_loss
from .ops import MaskedLoss
from .padding import Sequences, Tokens, first_tokens, mean_of_documents, spread_documents
from .windows import plan_windows  # noqa: F401

Output = TypeVar("Output", bound=ModelOutput)


class MegaBertPreTrainedModel(PreTrainedModel):
    """Initial weights, and the beginning and end that the forward passes of all heads share.

    _auto_class of its subclasses makes save_pretrained() copy this code into the folder that it writes.
    """

    config: MegaBertConfig  # pyrefly: ignore[bad-override-mutable-attribute]
    config_class = MegaBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    # Without this, transformers' Trainer concludes from **kwargs that the model divides its loss by num_items_in_batch,
    # and with gradient accumulation sums the gradients of the micro-batches instead of averaging them.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flash_attn_2 = True
    _no_split_modules = ["PostNormBlock", "PreNormBlock", "Embeddings"]  # noqa: RUF012 (transformers reads it as a class attribute)

    def _init_weights(self, module: nn.Module) -> None:
        """Initialise as BERT: weights from N(0, initializer_range), [PAD]'s row and biases 0, LayerNorm 1 and 0.

        With norm_position "pre" as ModernBERT (https://arxiv.org/abs/2412.13663, appendix A): from normal distributions
        cut off at two standard deviations, which are smaller for what is added to the residual stream.
        """
        if self.config.norm_position == "pre":
            for part, std in pre_norm_stds(module, self.config).items():
                nn.init.trunc_normal_(part.weight, std=std, a=-2 * std, b=2 * std)
        elif isinstance(module, (nn.Linear, nn.Embedding, Decoder)):
            nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx])
        if isinstance(module, Norm):
            nn.init.ones_(module.weight)
        if isinstance(module, (nn.Linear, Decoder, Norm)) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def _add_head(self, config: MegaBertConfig, of_documents: bool = False) -> None:
        """Add what stands before a classifier's last layer: ModernBERT's transform, or for documents BERT's pooler."""
        if config.has_transform_head:
            self.transform = MlmTransform(config)
        elif of_documents:
            self.pre_classifier = Pooler(config, config.classifier_activation)

    def _transform(self, hidden: Tensor) -> Tensor:
        """Apply what _add_head() added."""
        head = getattr(self, "transform", None) or getattr(self, "pre_classifier", None)
        return hidden if head is None else head(hidden)

    def _read(self, inputs: Inputs, others: Mapping[str, object]) -> Tokens:
        """Convert a call's arguments to tokens. others: the arguments that forward() does not name."""
        # The config decides where the caller does not, as for hidden states.
        in_config = {"output_attentions": self.config.output_attentions}
        refuse_unsupported(in_config | {name: value for name, value in others.items() if value is not None})
        # A graph cannot leave padding out, except with flash-attn, at which graphs break anyway.
        static = in_one_graph() and self.config._attn_implementation != "flash_attention_2"
        learned = self.config.position == "learned" and not in_one_graph()
        longest = self.config.max_position_embeddings if learned else None
        padding_id = self.config.pad_token_id if self.config.position_offset else None
        return read_tokens(inputs, self.config.hidden_size, static, longest, padding_id)

    def _every_layer(self, output_hidden_states: bool | None) -> bool:
        """Return whether this call gives the hidden states of every layer; by default the config decides."""
        return bool(self.config.output_hidden_states if output_hidden_states is None else output_hidden_states)

    def _output(
        self,
        kind: type[Output],
        tokens: Tokens,
        states: list[Tensor],
        return_dict: bool | None,
        **fields: Tensor | None,
    ) -> Output | tuple:
        """Build the output object of a forward pass, or a tuple where the caller or the config asks for one.

        states: the (T, E) before each layer and after the last one, or none.
        """
        output = kind(hidden_states=tuple(tokens.spread(state) for state in states) or None, **fields)
        if return_dict is None:
            # With torchscript, transformers 4 returns tuples, which torch.jit.trace takes.
            return_dict = getattr(self.config, "return_dict", True) and not getattr(self.config, "torchscript", False)
        return output if return_dict else output.to_tuple()


class MegaBertModel(MegaBertPreTrainedModel):
    """The embeddings, the encoder and optionally the pooler, which ModernBERT does not have.

    position_ids matter with learned positions, where they begin at 0 even with a position_offset, and with RoPE; ALiBi
    uses the tokens' places.
    """

    _auto_class = "AutoModel"

    def __init__(self, config: MegaBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        if (name := config._attn_implementation or "sdpa") not in PLANNERS:
            raise ValueError(f"attn_implementation is {name!r}, expected one of {', '.join(PLANNERS)}.")
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.pooler = Pooler(config) if add_pooling_layer and not config.has_transform_head else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding), (
            f"word embeddings are a {type(value).__name__}, expected an nn.Embedding"
        )
        self.embeddings.word_embeddings = value

    def encode(
        self, tokens: Tokens, kept_tokens: Tensor | None = None, every_layer: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last hidden states (T, E), or with kept_tokens (M,) those tokens' (M, E); see Encoder.forward."""
        hidden = self.embeddings(tokens)
        return self.encoder(hidden, tokens, kept_tokens, every_layer)

    def pool(self, hidden: Tensor, sequences: Sequences) -> Tensor:
        """Pool the first token of each document: (T, E) -> (B, E). An empty document has a hidden state of zeros."""
        assert self.pooler is not None, "this model was built without a pooler"
        documents, first = first_tokens(sequences)
        return self.pooler(spread_documents(hidden.index_select(0, first), documents, sequences))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seqlens, max_seqlen)
        tokens = self._read(Inputs(*given), kwargs)
        hidden, states = self.encode(tokens, every_layer=self._every_layer(output_hidden_states))
        pooled = None if self.pooler is None else self.pool(hidden, tokens.sequences)
        fields = {"last_hidden_state": tokens.spread(hidden), "pooler_output": pooled}
        return self._output(BaseModelOutputWithPooling, tokens, states, return_dict, **fields)


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
        num_documents: int | None = None,
    ) -> MaskedLoss:
        """Compute the training loss: the end of the last layer, the head and the loss are on masked tokens only.

        input_ids, position_ids: (T,); cu_seqlens: (B + 1,); masked_positions: (M,) indices into T;
        masked_labels: (M,), IGNORE_INDEX where a position is unused; num_documents: all later documents are empty.
        Returns sums, not means.
        """
        check_shape("masked_labels", masked_labels, tuple(masked_positions.shape), "the shape of masked_positions")
        tokens = Tokens(input_ids, position_ids, None, Sequences(cu_seqlens, max_seqlen, num_documents=num_documents))
        hidden, _ = self.bert.encode(tokens, kept_tokens=masked_positions.long())
        return self.decoder(self.transform(hidden), masked_labels)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        masked_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput | MaskedLoss | tuple:
        """Compute logits and loss as transformers does; with the fields of a PackedBatch return masked_loss().

        Its masked_labels have no name in the signature, where transformers' Trainer looks for the names of labels.
        """
        if masked_positions is not None:
            batch: dict[str, Any] = {
                "input_ids": input_ids,
                "position_ids": position_ids,
                "cu_seqlens": cu_seqlens,
                "max_seqlen": max_seqlen,
                "masked_positions": masked_positions,
                "masked_labels": kwargs.get("masked_labels"),
            }
            if missing := [name for name, value in batch.items() if value is None]:
                raise ValueError(f"masked_positions are those of a PackedBatch, which has {', '.join(missing)} too.")
            return self.masked_loss(**batch, num_documents=kwargs.get("num_documents"))
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seqlens, max_seqlen)
        tokens = self._read(Inputs(*given), kwargs)
        hidden, states = self.bert.encode(tokens, every_layer=self._every_layer(output_hidden_states))
        logits = self.decoder(self.transform(hidden))  # (T, V)
        loss = token_loss(logits, labels, tokens)
        return self._output(MaskedLMOutput, tokens, states, return_dict, loss=loss, logits=tokens.spread(logits))


class MegaBertForSequenceClassification(MegaBertPreTrainedModel):
    """Classifies documents, or with num_labels 1 does a regression. An empty document has a hidden state of zeros.

    Its pooler is called pre_classifier, because peft trains and saves every module whose name ends with "classifier".
    Where it has ModernBERT's transform instead, that has the name and the weights of the masked language model's.
    """

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        # Two labels are the default of transformers.
        self.num_labels = config.num_labels or 2
        self.bert = MegaBertModel(config, add_pooling_layer=False)
        self._add_head(config, of_documents=True)
        self.dropout = nn.Dropout(config.dropout_of_classifier)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """labels: (B,) integers; (B,) floats for a regression; (B, num_labels) for several labels per document."""
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, cu_seqlens, max_seqlen)
        tokens = self._read(Inputs(*given), kwargs)
        every_layer = self._every_layer(output_hidden_states)
        if self.config.classifier_pooling == "mean":
            hidden, states = self.bert.encode(tokens, every_layer=every_layer)
            hidden = mean_of_documents(hidden, tokens.sequences.cu_seqlens, tokens.sequences.num_keys)
        else:
            documents, first = first_tokens(tokens.sequences)
            hidden, states = self.bert.encode(tokens, kept_tokens=first, every_layer=every_layer)
            hidden = spread_documents(hidden, documents, tokens.sequences)
        logits = self.classifier(self.dropout(self._transform(hidden)))  # (B, num_labels)
        loss = classification_loss(logits, labels, self.config)
        return self._output(SequenceClassifierOutput, tokens, states, return_dict, loss=loss, logits=logits)


class MegaBertForMultipleChoice(MegaBertPreTrainedModel):
    """Scores C choices per question, each a row of its own."""

    _auto_class = "AutoModelForMultipleChoice"

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.bert = MegaBertModel(config, add_pooling_layer=False)
        self._add_head(config, of_documents=True)
        self.dropout = nn.Dropout(config.dropout_of_classifier)
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MultipleChoiceModelOutput | tuple:
        """input_ids and the other inputs: (B, C, S), inputs_embeds (B, C, S, E); labels: (B,) the right choice."""
        choices, inputs = flatten_choices(
            Inputs(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        )
        tokens = self._read(inputs, kwargs)
        documents, first = first_tokens(tokens.sequences)
        every_layer = self._every_layer(output_hidden_states)
        hidden, states = self.bert.encode(tokens, kept_tokens=first, every_layer=every_layer)
        pooled = self._transform(spread_documents(hidden, documents, tokens.sequences))
        logits = self.classifier(self.dropout(pooled)).view(-1, choices)  # (B, C)
        loss = choice_loss(logits, labels)
        return self._output(MultipleChoiceModelOutput, tokens, states, return_dict, loss=loss, logits=logits)


class MegaBertForTokenClassification(MegaBertPreTrainedModel):
    _auto_class = "AutoModelForTokenClassification"

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        # Two labels are the default of transformers.
        self.num_labels = config.num_labels or 2
        self.bert = MegaBertModel(config, add_pooling_layer=False)
        self._add_head(config)
        self.dropout = nn.Dropout(config.dropout_of_classifier)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """labels: (B, S), IGNORE_INDEX where a token has none."""
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        tokens = self._read(Inputs(*given), kwargs)
        hidden, states = self.bert.encode(tokens, every_layer=self._every_layer(output_hidden_states))
        logits = self.classifier(self.dropout(self._transform(hidden)))  # (T, num_labels)
        loss = token_loss(logits, labels, tokens)
        return self._output(TokenClassifierOutput, tokens, states, return_dict, loss=loss, logits=tokens.spread(logits))


class MegaBertForQuestionAnswering(MegaBertPreTrainedModel):
    _auto_class = "AutoModelForQuestionAnswering"

    def __init__(self, config: MegaBertConfig):
        super().__init__(config)
        self.bert = MegaBertModel(config, add_pooling_layer=False)
        self._add_head(config)
        self.dropout = nn.Dropout(config.dropout_of_classifier if config.has_transform_head else 0.0)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> QuestionAnsweringModelOutput | tuple:
        """start_positions, end_positions: (B,) or (B, 1) slots; those outside the row are ignored, as in BERT."""
        given = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        tokens = self._read(Inputs(*given), kwargs)
        hidden, states = self.bert.encode(tokens, every_layer=self._every_layer(output_hidden_states))
        start, end = tokens.spread(self.qa_outputs(self.dropout(self._transform(hidden)))).unbind(dim=-1)  # (B, S) each
        loss = span_loss(start, end, start_positions, end_positions)
        fields = {"loss": loss, "start_logits": start, "end_logits": end}
        return self._output(QuestionAnsweringModelOutput, tokens, states, return_dict, **fields)
