"""Make the model's configuration from the recipe's section `model`."""

from megabert.config.model_section import ModelConfig
from megabert.model.configuration_megabert import MegaBertConfig


def architecture_of(model: ModelConfig, vocab_size: int, pad_token_id: int = 0) -> MegaBertConfig:
    """Return the configuration for a vocabulary, whose size is rounded up to model.pad_vocab_to_multiple_of."""
    multiple = model.pad_vocab_to_multiple_of
    return MegaBertConfig(
        vocab_size=-(-vocab_size // multiple) * multiple,
        pad_token_id=pad_token_id,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_hidden_layers,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=model.max_position_embeddings,
        position_offset=model.position_offset,
        position=model.position,
        rope_theta=model.rope_theta,
        local_rope_theta=model.local_rope_theta,
        norm_position=model.norm_position,
        bias=model.bias,
        norm_bias=model.norm_bias,
        type_vocab_size=model.num_token_types,
        embedding_neighbors=model.embedding_neighbors,
        global_attention_every=model.global_attention_every,
        local_attention_window=model.local_attention_window,
        ffn=model.ffn,
        layer_norm_dtype=model.layer_norm_dtype,
        layer_norm_eps=model.layer_norm_eps,
        hidden_dropout_prob=model.hidden_dropout,
        attention_probs_dropout_prob=model.attention_dropout,
        attention_output_dropout_prob=model.attention_output_dropout,
        initializer_range=model.initializer_range,
        z_loss=model.z_loss,
        padding=model.padding,
    )
