"""Define the transformers config of one encoder: every setting that determines its parameters and its output."""

from transformers import PretrainedConfig

POSITIONS = ("alibi", "learned", "rope")
NORM_POSITIONS = ("post", "pre")
FFNS = ("geglu", "gelu")
PADDINGS = ("unpadded", "padded")
CLASSIFIER_POOLINGS = ("cls", "mean")
CLASSIFIER_ACTIVATIONS = ("tanh", "gelu", "relu")
LAYER_NORM_DTYPES = ("bfloat16", "float32")
# Sizes and the smallest value of each.
SIZES = {
    "vocab_size": 1, "hidden_size": 1, "num_hidden_layers": 0, "num_attention_heads": 1, "intermediate_size": 1,
    "type_vocab_size": 0, "max_position_embeddings": 1, "position_offset": 0,
    "embedding_neighbors": 0,
}  # fmt: skip
# A far smaller epsilon is 0 in fp32, and a constant row then becomes NaN.
SMALLEST_EPS = 1e-30


class MegaBertConfig(PretrainedConfig):
    """MosaicBERT (https://arxiv.org/abs/2312.17482) by default; other settings make it BERT, ModernBERT or GTE.

    position: "alibi" adds -slope * |i - j| to the scores; "learned" adds a position embedding; "rope" rotates queries
        and keys (https://arxiv.org/abs/2104.09864).
    max_position_embeddings: tokens of the longest text. position_offset: rows of learned positions before the first
        token's, as RoBERTa has (https://arxiv.org/abs/1907.11692): its pad_token_id + 1. Positions then count the
        tokens other than pad_token_id, which itself has the last of these rows; with 0 they count places, as in BERT.
    rope_theta: base of RoPE's wavelengths; local_rope_theta: that of local layers, None for the same.
    norm_position: "post" normalises after each residual sum, as BERT; "pre" before attention (except in the first
        layer) and MLP, and once at the end, as ModernBERT (https://arxiv.org/abs/2412.13663).
    bias: of the linear layers of attention, MLP and head; norm_bias: of every LayerNorm. The decoder always has one,
        the up-projection of "geglu" never.
    global_attention_every: layers 0, k, 2k... attend to whole documents, the others to local_attention_window tokens:
        half of it, rounded down, on each side of a token, in addition to the token itself.
        k may exceed the number of layers, as in a ModernBERT that was cut to two; then only the first is global.
    type_vocab_size: 0 for no token type embeddings; token_type_ids are then ignored, as in ModernBERT.
    embedding_neighbors: tokens on each side of which a linear map of the embedding is added to the token's own, before
        the first layer; 0 for none, as in all published models.
    attention_output_dropout_prob: after attention's output projection; None means hidden_dropout_prob.
    ffn: "geglu" is GELU(gate) * value without biases in the up-projection; "gelu" is BERT's plain MLP.
    layer_norm_dtype: "bfloat16" keeps LayerNorm and the residual stream in the autocast dtype when
        autocast is on; "float32" computes them in fp32. Without autocast both use the weights' dtype.
    padding: "unpadded" computes real tokens only; "padded" computes every document's padding too.
    classifier_pooling: input of a sequence classifier: "cls", the first token as in BERT, or "mean", the mean of all.
    classifier_activation: of the layer before a classifier of documents or choices: "tanh" as BERT's and RoBERTa's,
        "gelu" as ELECTRA's, "relu" as DistilBERT's. ModernBERT's transform has none of them.
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
        embedding_neighbors: int = 0,
        max_position_embeddings: int = 512,
        position_offset: int = 0,
        position: str = "alibi",
        rope_theta: float = 10_000.0,
        local_rope_theta: float | None = None,
        norm_position: str = "post",
        bias: bool = True,
        norm_bias: bool = True,
        global_attention_every: int = 1,
        local_attention_window: int | None = None,
        ffn: str = "geglu",
        layer_norm_dtype: str = "bfloat16",
        layer_norm_eps: float = 1e-12,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.0,
        attention_output_dropout_prob: float | None = None,
        classifier_dropout: float | None = None,
        classifier_pooling: str = "cls",
        classifier_activation: str = "tanh",
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
        self.embedding_neighbors = embedding_neighbors
        self.max_position_embeddings = max_position_embeddings
        self.position_offset = position_offset
        self.position = position
        self.rope_theta = rope_theta
        self.local_rope_theta = local_rope_theta
        self.norm_position = norm_position
        self.bias = bias
        self.norm_bias = norm_bias
        self.global_attention_every = global_attention_every
        self.local_attention_window = local_attention_window
        self.ffn = ffn
        self.layer_norm_dtype = layer_norm_dtype
        self.layer_norm_eps = layer_norm_eps
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.attention_output_dropout_prob = attention_output_dropout_prob
        self.classifier_dropout = classifier_dropout
        self.classifier_pooling = classifier_pooling
        self.classifier_activation = classifier_activation
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
            "norm_position": NORM_POSITIONS,
            "ffn": FFNS,
            "padding": PADDINGS,
            "layer_norm_dtype": LAYER_NORM_DTYPES,
            "classifier_pooling": CLASSIFIER_POOLINGS,
            "classifier_activation": CLASSIFIER_ACTIVATIONS,
        }
        for name, known in choices.items():
            if (got := getattr(self, name)) not in known:
                raise ValueError(f"model config: {name} is {got!r}, expected one of {', '.join(known)}.")
        for name, least in SIZES.items():
            if type(size := getattr(self, name)) is not int or size < least:
                raise ValueError(f"model config: {name} is {size!r}, expected a whole number from {least}.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"model config: hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}."
            )
        if reason := self._why_not_positions():
            raise ValueError(f"model config: {reason}")
        for name in ("bias", "norm_bias"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"model config: {name} is {getattr(self, name)!r}, expected true or false.")
        probabilities = ["hidden_dropout_prob", "attention_probs_dropout_prob"]
        optional = ("attention_output_dropout_prob", "classifier_dropout")
        probabilities += [name for name in optional if getattr(self, name) is not None]
        for name in probabilities:
            probability = getattr(self, name)
            if type(probability) not in (int, float) or not 0 <= probability <= 1:
                raise ValueError(f"model config: {name} is {probability!r}, expected a number from 0 to 1.")
        eps = self.layer_norm_eps
        if not isinstance(eps, float) or not SMALLEST_EPS <= eps < 1:
            raise ValueError(f"model config: layer_norm_eps is {eps!r}, expected a number from {SMALLEST_EPS} to 1.")
        for name in ("initializer_range", "z_loss"):
            number = getattr(self, name)
            if type(number) not in (int, float) or not 0 <= number < float("inf"):
                raise ValueError(f"model config: {name} is {number!r}, expected a number from 0.")
        if pad_token_id is not None and type(pad_token_id) is not int:
            raise ValueError(f"model config: pad_token_id is {pad_token_id!r}, expected a number.")
        if pad_token_id is not None and not 0 <= pad_token_id < self.vocab_size:
            raise ValueError(
                f"model config: pad_token_id is {pad_token_id}, "
                f"expected one of the {self.vocab_size} rows of the vocabulary."
            )

    def _why_not_positions(self) -> str | None:
        """Return why the settings of positions and windows make no sense together, or None."""
        position, every, window = self.position, self.global_attention_every, self.local_attention_window
        thetas = {name: getattr(self, name) for name in ("rope_theta", "local_rope_theta")}
        for name, theta in thetas.items():
            if theta is not None and (not isinstance(theta, (int, float)) or not 1 < theta < float("inf")):
                return f"{name} is {theta!r}, expected a number above 1."
        if position != "rope" and (thetas["rope_theta"] != 10_000 or thetas["local_rope_theta"] is not None):
            name = "local_rope_theta" if thetas["local_rope_theta"] is not None else "rope_theta"
            return f"{name} is {thetas[name]}, which has no effect with position {position}. Leave it out."
        if position != "learned" and self.position_offset:
            offset = self.position_offset
            return f"position_offset is {offset}, which has no effect with position {position}. Leave it out."
        if position == "rope" and self.head_dim % 2:
            return f"position rope rotates pairs of features, but the head size is {self.head_dim}, an odd number."
        if type(every) is not int or every < 1:
            return f"global_attention_every is {every!r}, expected a number from 1."
        if window is not None and (type(window) is not int or window < 2):
            return f"local_attention_window is {window!r}, expected a number from 2: one token on each side."
        if (every > 1) != (window is not None):
            return (
                f"global_attention_every is {every} and local_attention_window {window}: local layers need "
                "a window, and a window needs local layers. Set both, or neither."
            )
        if every == 1 and thetas["local_rope_theta"] is not None:
            return (
                f"local_rope_theta is {thetas['local_rope_theta']}, but global_attention_every 1 makes "
                "every layer global. Leave it out."
            )
        return None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def reach(self) -> int | None:
        """Tokens that a local layer sees on each side of a token; None where every layer is global."""
        return None if self.local_attention_window is None else self.local_attention_window // 2

    @property
    def position_rows(self) -> int:
        """Rows of the table of learned positions."""
        return self.max_position_embeddings + self.position_offset

    def is_local(self, layer: int) -> bool:
        return layer % self.global_attention_every > 0

    @property
    def dropout_of_classifier(self) -> float:
        return self.hidden_dropout_prob if self.classifier_dropout is None else self.classifier_dropout

    @property
    def token_types(self) -> bool:
        return self.type_vocab_size > 0

    @property
    def has_transform_head(self) -> bool:
        """Whether classifiers transform hidden states as the masked language model does, and there is no pooler.

        ModernBERT's classifiers do, and start from the weights of that transform.
        """
        return self.norm_position == "pre"
