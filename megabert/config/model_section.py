"""Define the recipe's section `model`: the encoder's architecture."""

import re
from dataclasses import dataclass
from typing import Literal

from megabert.config.settings import check_limits, setting

CHECKPOINTING = re.compile(r"none|every_layer|every_(\d+)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The encoder's architecture."""

    num_hidden_layers: int = setting(12, "[1, 1000]")
    """number of layers"""
    hidden_size: int = setting(768, "[1, 65536]")
    """width of the residual stream, features"""
    num_attention_heads: int = setting(12, "[1, 1024]")
    """attention heads per layer"""
    intermediate_size: int = setting(3072, "[1, 1048576]")
    """width of the MLP, features (geglu: of each half)"""
    position: Literal["alibi", "learned", "rope"] = "alibi"
    """alibi: attention scores get a bias of -slope * distance; learned: position embeddings; rope: rotated queries and
    keys"""
    rope_theta: float = setting(10_000.0, "(1, 1e12]")
    """base of RoPE's wavelengths"""
    local_rope_theta: float | None = setting(None, "(1, 1e12]")
    """the same for local layers; null: model.rope_theta"""
    norm_position: Literal["post", "pre"] = "post"
    """post: a norm after each residual sum, as BERT; pre: before attention and MLP, and a final norm, as ModernBERT"""
    bias: bool = True
    """whether the linear layers of attention, MLP and head have biases"""
    norm_bias: bool = True
    """whether LayerNorm has a bias"""
    token_types: bool = True
    """whether there are embeddings of token types"""
    type_vocab_size: int = setting(2, "[1, 100000]")
    """number of token types; used only with token_types. BERT has two, RoBERTa one"""
    embedding_neighbors: int = setting(0, "[0, 16]")
    """tokens on each side whose embeddings are mixed into a token's before the first layer; 0: none, as in BERT"""
    global_attention_every: int = setting(1, "[1, 1000]")
    """layers 0, k, 2k... attend to whole documents, the others to a window; 1: all to whole documents"""
    local_attention_window: int | None = setting(None, "[2, 1048576]")
    """tokens that a local layer sees around a token, half of them on each side"""
    ffn: Literal["geglu", "gelu"] = "geglu"
    """geglu: gated MLP; gelu: BERT's MLP"""
    layer_norm_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """precision of LayerNorm and the residual stream under bf16 autocast"""
    layer_norm_eps: float = setting(1e-12, "[1e-30, 0.1]")
    """added to the variance in LayerNorm"""
    hidden_dropout: float = setting(0.1, "[0, 1)")
    """dropout probability of embeddings, of each block's outputs, and inside the GLU"""
    attention_dropout: float = setting(0.0, "[0, 1)")
    """dropout probability of attention weights"""
    attention_output_dropout: float | None = setting(None, "[0, 1)")
    """dropout probability after attention's output projection; null: model.hidden_dropout"""
    padding: Literal["unpadded", "padded"] = "unpadded"
    """padded: compute the padding too, as the BERT baseline does"""
    max_position_embeddings: int = setting(512, "[1, 1048576]")
    """longest text, tokens; used only by position: learned"""
    position_offset: int = setting(0, "[0, 1048576]")
    """rows of learned positions before the first token's, as RoBERTa has: the id of its padding token and 1"""
    pad_vocab_to_multiple_of: int = setting(64, "[1, 65536]")
    """round the number of embedding rows up to a multiple of this"""
    initializer_range: float = setting(0.02, "(0, 1]")
    """standard deviation of the initial weights"""
    z_loss: float = setting(0.0, "[0, 1]")
    """add z_loss * log(sum of exp(logits))^2 to the training loss of each masked token, to keep logits small; 1e-4 is
    usual"""
    init_from: str | None = setting(None, may_change=True)
    """folder written by launch/convert_from_hf.py: start with its weights. A resumed run uses its checkpoint instead"""
    gradient_checkpointing: str = setting("none", may_change=True)
    """recompute activations in the backward pass: none, every_layer or every_K (every K-th layer)"""

    def __post_init__(self):
        check_limits(self, "model.")
        if not CHECKPOINTING.fullmatch(self.gradient_checkpointing) or self.checkpoint_every < 0:
            raise ValueError(
                f"model.gradient_checkpointing is {self.gradient_checkpointing!r}, "
                "expected none, every_layer or every_K with K >= 1, such as every_2."
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model.hidden_size is {self.hidden_size}, expected a multiple of "
                f"model.num_attention_heads ({self.num_attention_heads})."
            )

        if reason := self._why_not_positions():
            raise ValueError(reason)

    def _why_not_positions(self) -> str | None:
        """Return why the settings of positions and windows make no sense together, or None."""
        every, window, local_theta = self.global_attention_every, self.local_attention_window, self.local_rope_theta
        if self.position != "rope" and (self.rope_theta != 10_000 or local_theta is not None):
            name = "rope_theta" if local_theta is None else "local_rope_theta"
            return f"model.{name} has no effect with model.position {self.position}. Leave it out, or set that to rope."
        if self.position != "learned" and self.position_offset:
            return f"model.position_offset has no effect with model.position {self.position}. Leave it out."
        if self.position == "rope" and self.hidden_size // self.num_attention_heads % 2:
            return (
                f"model.position rope rotates pairs of features, but model.hidden_size {self.hidden_size} over "
                f"{self.num_attention_heads} heads is an odd number of them. Set model.hidden_size to a multiple of "
                f"{2 * self.num_attention_heads}."
            )
        if (every > 1) != (window is not None):
            return (
                f"model.global_attention_every is {every} and model.local_attention_window {window}: local layers need "
                "a window, and a window needs local layers. Set both, or neither."
            )
        if every == 1 and local_theta is not None:
            return "model.local_rope_theta has no effect where every layer is global. Leave it out."
        return None

    @property
    def num_token_types(self) -> int:
        """Rows of the table of token types; 0 for none."""
        return self.type_vocab_size if self.token_types else 0

    @property
    def checkpoint_every(self) -> int:
        """0: no layer is recomputed; 1: every layer; K: every K-th layer."""
        if self.gradient_checkpointing == "none":
            return 0
        number = self.gradient_checkpointing.removeprefix("every_")
        return 1 if number == "layer" else int(number) or -1

    @property
    def recomputed_layers(self) -> int:
        """Layers whose activations are recomputed: the first and every K-th after it."""
        return -(-self.num_hidden_layers // self.checkpoint_every) if self.checkpoint_every else 0
