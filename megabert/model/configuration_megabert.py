"""The architecture of one encoder, as a transformers config: everything that decides its parameters and its output."""

from transformers import PretrainedConfig

POSITIONS = ("alibi", "learned")
FFNS = ("geglu", "gelu")
PADDINGS = ("unpadded", "padded")
CLASSIFIER_POOLINGS = ("cls", "mean")
LAYER_NORM_DTYPES = ("bfloat16", "float32")


class MegaBertConfig(PretrainedConfig):
    """MosaicBERT (https://arxiv.org/abs/2312.17482) by default; its ablation switches lead back to BERT.

    position: "alibi" adds -slope * |i - j| to the scores; "learned" adds a position embedding.
    ffn: "geglu" is GELU(gate) * value without biases in the up-projection; "gelu" is BERT's plain MLP.
    layer_norm_dtype: "bfloat16" keeps LayerNorm and the residual stream in the autocast dtype when
        autocast is on; "float32" computes them in fp32. Without autocast both use the weights' dtype.
    padding: "unpadded" computes real tokens only; "padded" computes every document's padding too.
    classifier_pooling: what a sequence classifier sees: the first token, as BERT, or the mean of all tokens.
    classifier_dropout: None means hidden_dropout_prob.
    z_loss: in training, this times the square of each masked token's log-sum-exp is added to its loss.
    """

    model_type = "megabert"
    _auto_class = "AutoConfig"  # save_pretrained() puts this code beside what it saves

    def __init__(
        self,
        vocab_size: int = 30_528,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        type_vocab_size: int = 2,
        max_position_embeddings: int = 512,
        position: str = "alibi",
        ffn: str = "geglu",
        layer_norm_dtype: str = "bfloat16",
        layer_norm_eps: float = 1e-12,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.0,
        classifier_dropout: float | None = None,
        classifier_pooling: str = "cls",
        initializer_range: float = 0.02,
        z_loss: float = 0.0,
        padding: str = "unpadded",
        pad_token_id: int | None = 0,
        tie_word_embeddings: bool = True,
        **kwargs,
    ):
        choices = {
            "position": (position, POSITIONS),
            "ffn": (ffn, FFNS),
            "padding": (padding, PADDINGS),
            "layer_norm_dtype": (layer_norm_dtype, LAYER_NORM_DTYPES),
            "classifier_pooling": (classifier_pooling, CLASSIFIER_POOLINGS),
        }
        for name, (got, known) in choices.items():
            if got not in known:
                raise ValueError(f"model config: {name} is {got!r}, expected one of {', '.join(known)}.")
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"model config: hidden_size {hidden_size} is not a multiple of num_attention_heads {num_attention_heads}."
            )
        shares = {
            "hidden_dropout_prob": hidden_dropout_prob,
            "attention_probs_dropout_prob": attention_probs_dropout_prob,
        }
        if classifier_dropout is not None:
            shares["classifier_dropout"] = classifier_dropout
        for name, share in shares.items():
            if not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(f"model config: {name} is {share!r}, expected a number from 0 to 1.")
        if not isinstance(layer_norm_eps, float) or not 0 < layer_norm_eps < 1:
            raise ValueError(f"model config: layer_norm_eps is {layer_norm_eps!r}, expected a number between 0 and 1.")
        for name, number in {"initializer_range": initializer_range, "z_loss": z_loss}.items():
            if not isinstance(number, (int, float)) or not 0 <= number < float("inf"):
                raise ValueError(f"model config: {name} is {number!r}, expected a number from 0.")
        if pad_token_id is not None and not isinstance(pad_token_id, int):
            raise ValueError(f"model config: pad_token_id is {pad_token_id!r}, expected a number.")
        if pad_token_id is not None and not 0 <= pad_token_id < vocab_size:
            raise ValueError(
                f"model config: pad_token_id is {pad_token_id}, expected one of the {vocab_size} rows of the vocabulary."
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.type_vocab_size = type_vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.position = position
        self.ffn = ffn
        self.layer_norm_dtype = layer_norm_dtype
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.classifier_pooling = classifier_pooling
        self.initializer_range = initializer_range
        self.z_loss = z_loss
        self.padding = padding
        kwargs |= {"pad_token_id": pad_token_id, "tie_word_embeddings": tie_word_embeddings}
        super().__init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
