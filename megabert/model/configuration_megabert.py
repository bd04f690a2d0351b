"""The transformers config of one encoder: every setting that determines its parameters and its output."""

from transformers import PretrainedConfig

POSITIONS = ("alibi", "learned")
FFNS = ("geglu", "gelu")
PADDINGS = ("unpadded", "padded")
CLASSIFIER_POOLINGS = ("cls", "mean")
LAYER_NORM_DTYPES = ("bfloat16", "float32")


class MegaBertConfig(PretrainedConfig):
    """MosaicBERT (https://arxiv.org/abs/2312.17482) by default; the settings of its ablations turn it back into BERT.

    position: "alibi" adds -slope * |i - j| to the scores; "learned" adds a position embedding.
    ffn: "geglu" is GELU(gate) * value without biases in the up-projection; "gelu" is BERT's plain MLP.
    layer_norm_dtype: "bfloat16" keeps LayerNorm and the residual stream in the autocast dtype when
        autocast is on; "float32" computes them in fp32. Without autocast both use the weights' dtype.
    padding: "unpadded" computes real tokens only; "padded" computes every document's padding too.
    classifier_pooling: input of a sequence classifier: "cls", the first token as in BERT, or "mean", the mean of all.
    classifier_dropout: None means hidden_dropout_prob.
    z_loss: factor of the squared log-sum-exp that training adds to each masked token's loss.
    """

    model_type = "megabert"
    # save_pretrained() copies this code into the folder that it writes.
    _auto_class = "AutoConfig"

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
        self._check_settings(pad_token_id)
        kwargs |= {"pad_token_id": pad_token_id, "tie_word_embeddings": tie_word_embeddings}
        super().__init__(**kwargs)

    def _check_settings(self, pad_token_id: int | None) -> None:
        """Raise ValueError for a setting outside its range."""
        choices = {
            "position": POSITIONS,
            "ffn": FFNS,
            "padding": PADDINGS,
            "layer_norm_dtype": LAYER_NORM_DTYPES,
            "classifier_pooling": CLASSIFIER_POOLINGS,
        }
        for name, known in choices.items():
            if (got := getattr(self, name)) not in known:
                raise ValueError(f"model config: {name} is {got!r}, expected one of {', '.join(known)}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}."
            )
        probabilities = ["hidden_dropout_prob", "attention_probs_dropout_prob"]
        if self.classifier_dropout is not None:
            probabilities.append("classifier_dropout")
        for name in probabilities:
            probability = getattr(self, name)
            if not isinstance(probability, (int, float)) or not 0 <= probability <= 1:
                raise ValueError(f"model config: {name} is {probability!r}, expected a number from 0 to 1.")
        eps = self.layer_norm_eps
        if not isinstance(eps, float) or not 0 < eps < 1:
            raise ValueError(f"model config: layer_norm_eps is {eps!r}, expected a number between 0 and 1.")
        for name in ("initializer_range", "z_loss"):
            number = getattr(self, name)
            if not isinstance(number, (int, float)) or not 0 <= number < float("inf"):
                raise ValueError(f"model config: {name} is {number!r}, expected a number from 0.")
        if pad_token_id is not None and not isinstance(pad_token_id, int):
            raise ValueError(f"model config: pad_token_id is {pad_token_id!r}, expected a number.")
        if pad_token_id is not None and not 0 <= pad_token_id < self.vocab_size:
            raise ValueError(
                f"model config: pad_token_id is {pad_token_id}, "
                f"expected one of the {self.vocab_size} rows of the vocabulary."
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads
