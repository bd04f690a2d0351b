"""Find transformers' own class for a config of ours, and convert ModernBERT and GTE configs in both directions.

Source: transformers 5.23, models/modernbert and models/gte. Configs that transformers 4 wrote have global_rope_theta,
local_rope_theta and global_attn_every_n_layers where those of transformers 5 have rope_parameters and layer_types.
"""

from pathlib import Path
from typing import Any, Literal

from megabert.convert.hf.heads import CHOICE, LABELS, MASKED_LM, TASKS, head_of
from megabert.convert.hf.reader import CONFIG
from megabert.model.configuration_megabert import MegaBertConfig

NativeKind = Literal["bert", "roberta", "distilbert", "electra", "modernbert", "gte"]
NAMES: dict[NativeKind, str] = {
    "bert": "Bert",
    "roberta": "Roberta",
    "distilbert": "DistilBert",
    "electra": "Electra",
    "modernbert": "ModernBert",
    "gte": "Gte",
}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

# Other names of transformers' for the exact GELU, which is computed with erf.
SAME_AS_GELU = ("gelu_python",)
# Settings with the one value that our model supports.
MODERNBERT_FIXED = {
    "hidden_activation": "gelu", "classifier_activation": "gelu", "attention_bias": False, "mlp_bias": False,
    "norm_bias": False, "classifier_bias": False, "decoder_bias": True, "tie_word_embeddings": True,
}  # fmt: skip
# Settings of decoders, which mask what follows a token: transformers' ModernBERT ignores them, and so would we.
NO_DECODER = {"is_decoder": False, "is_causal": False, "causal_mask": False}
GTE_FIXED = {
    "hidden_act": "gelu", "tie_word_embeddings": True, "layer_norm_type": "layer_norm", "pack_qkv": True,
    "position_embedding_type": "rope", "logn_attention_scale": False,
}  # fmt: skip
# The defaults of ModernBertConfig and GteConfig.
MODERNBERT_DEFAULTS = {"global": 160_000.0, "local": 10_000.0, "every": 3, "window": 128, "eps": 1e-5}
GTE_THETA = 160_000.0
FULL, SLIDING = "full_attention", "sliding_attention"
# The heads that transformers' classes have.
HEADS: dict[NativeKind, tuple[str, ...]] = {
    **dict.fromkeys(NAMES, (MASKED_LM, *TASKS)),
    "gte": (MASKED_LM, "SequenceClassification", "TokenClassification"),
}
# Heads with a pooler, or with a layer of their own in its place, and that layer's activation.
POOLED = ("SequenceClassification", CHOICE)
ACTIVATIONS: dict[NativeKind, str] = {
    "bert": "tanh",
    "roberta": "tanh",
    "distilbert": "relu",
    "electra": "gelu",
    "gte": "tanh",
}
# DistilBERT has this epsilon in every LayerNorm.
DISTILBERT_EPS = 1e-12


def native_kind(config: MegaBertConfig) -> NativeKind | None:
    """Return which of transformers' own models computes the same as ours, or None."""
    if _has_layers(config, "learned", "gelu"):
        return _bert_like_kind(config)
    if _has_layers(config, "rope", "geglu"):
        return "gte"
    bare = not (config.bias or config.norm_bias or config.token_types or config.embedding_neighbors)
    if config.norm_position == "pre" and (config.position, config.ffn) == ("rope", "geglu") and bare:
        return "modernbert"
    return None


def _bert_like_kind(config: MegaBertConfig) -> NativeKind | None:
    """Return which of the classes with BERT's layers has the config's embeddings, and its classifier's activation."""
    if config.position_offset:
        in_place = config.pad_token_id is not None and config.position_offset == config.pad_token_id + 1
        return "roberta" if in_place and config.token_types else None
    if config.token_types:
        return "electra" if config.classifier_activation == ACTIVATIONS["electra"] else "bert"
    return "distilbert" if config.layer_norm_eps == DISTILBERT_EPS else None


def native_class(config: MegaBertConfig) -> str | None:
    """Return the name of the class of transformers that computes the same as our class with its head, or None."""
    kind, head = native_kind(config), head_of(config)
    if kind is None or head not in HEADS[kind]:
        return None
    if kind != "modernbert" and head == "SequenceClassification" and config.classifier_pooling != "cls":
        return None
    if kind in ACTIVATIONS and head in POOLED and config.classifier_activation != ACTIVATIONS[kind]:
        return None
    return f"{NAMES[kind]}For{head}"


def is_mosaicbert(config: MegaBertConfig) -> bool:
    """Return whether the encoder is MosaicBERT's: ALiBi, GeGLU and token types."""
    return _has_layers(config, "alibi", "geglu") and config.token_types


def has_bert_layers(config: MegaBertConfig) -> bool:
    """Return whether the layers are BERT's, whatever the token types, the classifier and the first position."""
    return _has_layers(config, "learned", "gelu")


def describe_layers(config: MegaBertConfig) -> str:
    """Describe what other projects' layouts depend on. -> "alibi, geglu and post-norm layers" """
    neighbors = f" after embedding_neighbors {config.embedding_neighbors}" if config.embedding_neighbors else ""
    return f"{config.position}, {config.ffn} and {config.norm_position}-norm layers{neighbors}"


def _has_layers(config: MegaBertConfig, position: str, ffn: str) -> bool:
    """Return whether the layers are these, post-norm, with all biases and global attention, and plain embeddings."""
    block = (config.position, config.ffn, config.norm_position, config.global_attention_every)
    plain = config.bias and config.norm_bias and not config.embedding_neighbors
    return block == (position, ffn, "post", 1) and plain


def from_modernbert_config(source: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of MegaBertConfig. Raises ValueError for what our model does not support."""
    _check(source, raw, MODERNBERT_FIXED | NO_DECODER, "modernbert")
    every = _global_every(source, raw)
    dropouts = {raw.get(name, 0.0) for name in ("embedding_dropout", "mlp_dropout")}
    if len(dropouts) > 1:
        raise ValueError(
            f"{source / CONFIG}: embedding_dropout is {raw.get('embedding_dropout', 0.0)} and mlp_dropout "
            f"{raw.get('mlp_dropout', 0.0)}; this model has one dropout for both. Set them to the same number there, "
            "which changes no output."
        )
    theta, local = _modernbert_thetas(source, raw)
    window = _window(source, raw)
    return {
        "position": "rope",
        "rope_theta": theta,
        "local_rope_theta": local if every > 1 else None,
        "norm_position": "pre",
        "bias": False,
        "norm_bias": False,
        "global_attention_every": every,
        "local_attention_window": window if every > 1 else None,
        "ffn": "geglu",
        "layer_norm_dtype": "float32",
        "layer_norm_eps": raw.get("norm_eps", MODERNBERT_DEFAULTS["eps"]),
        "type_vocab_size": 0,
        "hidden_dropout_prob": dropouts.pop(),
        "attention_probs_dropout_prob": raw.get("attention_dropout", 0.0),
        "attention_output_dropout_prob": raw.get("attention_dropout", 0.0),
        "classifier_dropout": raw.get("classifier_dropout", 0.0),
        "classifier_pooling": raw.get("classifier_pooling", "cls"),
        "max_position_embeddings": raw.get("max_position_embeddings", 8192),
        "pad_token_id": raw.get("pad_token_id", 50283),
    } | _same(raw, "initializer_range")  # fmt: skip


def _modernbert_thetas(source: Path, raw: dict[str, Any]) -> tuple[float, float]:
    """Read the thetas of global and of local layers. Raises ValueError if they are given in a place that is ignored."""
    theta = _theta(source, raw, FULL, "global_rope_theta", MODERNBERT_DEFAULTS["global"])
    # In transformers 4 a null stands for the theta of the global layers.
    default = theta if raw.get("local_rope_theta", 0) is None else MODERNBERT_DEFAULTS["local"]
    local = _theta(source, raw, SLIDING, "local_rope_theta", default)
    if raw.get("rope_theta", theta) != theta:
        raise ValueError(
            f"{source / CONFIG}: rope_theta is {raw['rope_theta']!r}, which ModernBERT does not read: the theta of its "
            f"global layers is {theta!r}. Set global_rope_theta there, or remove rope_theta."
        )
    return theta, local


def _window(source: Path, raw: dict[str, Any]) -> int:
    """Read the window of local layers, tokens on both sides together. Raises ValueError if two settings differ."""
    window = raw.get("local_attention", MODERNBERT_DEFAULTS["window"])
    if isinstance(window, int) and raw.get("sliding_window", window // 2) != window // 2:
        raise ValueError(
            f"{source / CONFIG}: sliding_window is {raw['sliding_window']!r}, but half of local_attention is "
            f"{window // 2}: versions of transformers differ in which of them they read. Set local_attention to the "
            "window with which the model was trained, tokens on both sides together, and remove sliding_window."
        )
    return window


def from_gte_config(source: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of MegaBertConfig. Raises ValueError for what our model does not support."""
    _check(source, raw, GTE_FIXED, "gte")
    same = _same(
        raw, "hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout", "initializer_range",
        "layer_norm_eps",
    )  # fmt: skip
    return {
        "position": "rope",
        "rope_theta": _theta(source, raw, None, "rope_theta", GTE_THETA),
        "ffn": "geglu",
        "layer_norm_dtype": "bfloat16",
        "type_vocab_size": raw.get("type_vocab_size", 1),
        "max_position_embeddings": raw.get("max_position_embeddings", 8192),
        "pad_token_id": raw.get("pad_token_id", 1),
    } | same


def check_fixed(source: Path, raw: dict[str, Any], fixed: dict[str, Any]) -> None:
    """Raise ValueError for a setting with another value than the one that our model supports."""
    for name, value in fixed.items():
        given = raw.get(name, value)
        if given != value and not (value == "gelu" and given in SAME_AS_GELU):
            raise ValueError(f"{source / CONFIG}: {name} is {given!r}; this model supports only {value!r}.")


def _check(source: Path, raw: dict[str, Any], fixed: dict[str, Any], kind: NativeKind) -> None:
    check_fixed(source, raw, fixed)
    if missing := [name for name in SIZES if name not in raw]:
        raise ValueError(f"{source / CONFIG}: lacks {', '.join(missing)}.")
    for name in raw.get("architectures") or []:
        known = [f"{NAMES[kind]}Model", *(f"{NAMES[kind]}For{head}" for head in HEADS[kind])]
        if name not in known:
            raise ValueError(
                f"{source / CONFIG}: is a {name}, expected {', '.join(known[:-1])} or {known[-1]}. Convert the model "
                "that it was fine-tuned from."
            )


def _same(raw: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: raw[name] for name in (*SIZES, *names) if raw.get(name) is not None}


def _global_every(source: Path, raw: dict[str, Any]) -> int:
    """Return k if layers 0, k, 2k... are global. Raises ValueError if others are."""
    layers, types = raw["num_hidden_layers"], raw.get("layer_types")
    every = raw.get("global_attn_every_n_layers", MODERNBERT_DEFAULTS["every"])
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"{source / CONFIG}: global_attn_every_n_layers is {every!r}, expected a number from 1.")
    if types is None:
        return every
    for candidate in (every, *range(1, layers + 1)):
        if types == layer_types(layers, candidate):
            return candidate
    raise ValueError(
        f"{source / CONFIG}: layer_types is {types!r}; this model supports only {layers} layers of which the first and "
        f"then every k-th is {FULL!r}, and the others are {SLIDING!r}."
    )


def layer_types(layers: int, every: int) -> list[str]:
    return [FULL if layer % every == 0 else SLIDING for layer in range(layers)]


def _theta(source: Path, raw: dict[str, Any], part: str | None, old_name: str, default: float) -> float:
    """Read a theta in the layout of transformers 5 or 4. Raises ValueError for another kind of RoPE than the plain."""
    path = source / CONFIG
    parameters = raw.get("rope_parameters")
    if parameters is not None and part is not None and isinstance(parameters, dict):
        if unknown := sorted(parameters.keys() - {FULL, SLIDING}):
            raise ValueError(
                f"{path}: rope_parameters has {', '.join(unknown)}, expected objects for {FULL} and {SLIDING}."
            )
        parameters = parameters.get(part)
    parameters = {} if parameters is None else parameters
    scaling = raw.get("rope_scaling")
    if not isinstance(parameters, dict) or not (scaling is None or isinstance(scaling, dict)):
        raise ValueError(f"{path}: rope_parameters or rope_scaling is not an object.")
    for settings in (parameters, scaling or {}):
        kind = settings.get("rope_type", settings.get("type", "default"))
        if kind != "default" or settings.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                f"{path}: RoPE is {settings!r}; this model supports only rope_type 'default' of all features."
            )
    if "rope_theta" in (scaling or {}):
        raise ValueError(
            f"{path}: rope_scaling has a rope_theta. Set {old_name} there instead, and remove rope_scaling."
        )
    theta = parameters.get("rope_theta", raw.get(old_name))
    return default if theta is None else theta


def to_modernbert_config(config: MegaBertConfig, special_ids: dict[str, int]) -> dict[str, Any]:
    """Return config.json for transformers' ModernBertForMaskedLM, in the layouts of transformers 4 and 5."""
    local_theta = config.local_rope_theta or config.rope_theta
    window = config.local_attention_window or MODERNBERT_DEFAULTS["window"]
    thetas = {FULL: config.rope_theta, SLIDING: local_theta}
    return _common(config, "modernbert", special_ids) | MODERNBERT_FIXED | {
        "norm_eps": config.layer_norm_eps,
        # vLLM reads both norm_eps and layer_norm_eps. It also reads the next setting, which changes no output.
        "layer_norm_eps": config.layer_norm_eps,
        "deterministic_flash_attn": False,
        "initializer_cutoff_factor": 2.0,
        "embedding_dropout": config.hidden_dropout_prob,
        "mlp_dropout": config.hidden_dropout_prob,
        "attention_dropout": config.attention_probs_dropout_prob,
        "classifier_dropout": config.classifier_dropout or 0.0,
        "classifier_pooling": config.classifier_pooling,
        "local_attention": window,
        "global_attn_every_n_layers": config.global_attention_every,
        "global_rope_theta": config.rope_theta,
        "local_rope_theta": local_theta,
        "layer_types": layer_types(config.num_hidden_layers, config.global_attention_every),
        "rope_parameters": {part: {"rope_type": "default", "rope_theta": theta} for part, theta in thetas.items()},
    }  # fmt: skip


def to_gte_config(config: MegaBertConfig, special_ids: dict[str, int]) -> dict[str, Any]:
    """Return config.json for transformers' GteForMaskedLM, with the settings that older readers of GTE need, too."""
    return _common(config, "gte", special_ids) | {
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.hidden_dropout_prob,
        "attention_probs_dropout_prob": config.attention_probs_dropout_prob,
        "classifier_dropout": config.classifier_dropout,
        "type_vocab_size": config.type_vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "layer_norm_type": "layer_norm",
        "position_embedding_type": "rope",
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def _common(config: MegaBertConfig, kind: NativeKind, special_ids: dict[str, int]) -> dict[str, Any]:
    """special_ids: by role. A tokenizer's [CLS] and [SEP] begin and end a text."""
    roles = {"bos": "cls", "eos": "sep"} if kind == "gte" else {"bos": "cls", "eos": "sep", "cls": "cls", "sep": "sep"}
    return {
        "model_type": kind,
        "architectures": [native_class(config)],
        "tie_word_embeddings": True,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": "float32",
    } | {name: getattr(config, name) for name in SIZES} | {
        f"{name}_token_id": special_ids[role] for name, role in roles.items() if role in special_ids
    } | {name: getattr(config, name) for name in LABELS if head_of(config) != MASKED_LM}  # fmt: skip
