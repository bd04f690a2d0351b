"""Convert model configs between MegaBERT, transformers' models and the published MosaicBERT."""

import json
from inspect import signature
from pathlib import Path
from typing import Any, Literal, cast

from transformers import BertConfig

from megabert.convert.bert_names import NAMES, BertLike
from megabert.convert.hf.bert_like_configs import MODEL_TYPES, to_bert_like_config, to_bert_settings
from megabert.convert.hf.heads import LABELS, MASKED_LM, head_of
from megabert.convert.hf.native import (
    NativeKind,
    check_fixed,
    from_gte_config,
    from_modernbert_config,
    to_gte_config,
    to_modernbert_config,
)
from megabert.convert.hf.reader import CONFIG, MAX_SIZES
from megabert.convert.weight_names import Kind
from megabert.data.shards.manifest import TOKENIZER
from megabert.data.shards.tokenizer import read_tokenizer, special_tokens
from megabert.model.configuration_megabert import MegaBertConfig

# Settings that have the same name and meaning in all three configs.
SHARED_SETTINGS = (
    *(name for name in MAX_SIZES if name != "num_labels"), "layer_norm_eps", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "classifier_dropout", "initializer_range", "pad_token_id",
)  # fmt: skip

# Settings of ours that BERT does not have, but classes with its layers.
BERT_LIKE_SETTINGS = ("position_offset", "classifier_activation", "attention_output_dropout_prob")
# Settings of transformers' BERT with the one value that our model supports, which is also BERT's default.
FIXED_SETTINGS = {"hidden_act": "gelu", "is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True}
# The default of a config.json without this setting. The other defaults equal ours.
BERT_ATTENTION_DROPOUT = 0.1
# The published MosaicBERT has this length and was trained on 128 tokens: ALiBi reads texts several times as long.
ALIBI_LENGTH = 512
REQUIRED_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")

# https://huggingface.co/mosaicml/mosaic-bert-base; "repository--module.Class" is the hub's notation for remote code.
MOSAICBERT_REPOSITORY = "mosaicml/mosaic-bert-base"
# The LayerNorm in MosaicBERT's masked language modelling head has this epsilon, whatever its config says.
MOSAICBERT_HEAD_EPS = 1e-12
MOSAICBERT_CLASSES = {
    "AutoConfig": "configuration_bert.BertConfig",
    "AutoModelForMaskedLM": "bert_layers.BertForMaskedLM",
    "AutoModelForSequenceClassification": "bert_layers.BertForSequenceClassification",
}


def detect_architecture(source: Path, raw: dict[str, Any], tensor_names: set[str]) -> Literal["megabert"] | Kind:
    """Tell which architecture a folder contains. Raises ValueError if it is another one."""
    model_type = raw.get("model_type")
    if model_type == MegaBertConfig.model_type:
        return "megabert"
    if model_type == "modernbert" or model_type == "gte":
        return model_type
    if model_type in MODEL_TYPES:
        return MODEL_TYPES[model_type]
    if model_type != "bert":
        known = ", ".join(map(repr, ("bert", *MODEL_TYPES, "modernbert", "gte")))
        raise ValueError(f"{source / CONFIG}: model_type is {model_type!r}, expected {known} or 'megabert'.")
    return "mosaicbert" if any(".Wqkv." in name for name in tensor_names) else "bert"


def check_no_own_code(source: Path, raw: dict[str, Any], kind: str) -> None:
    """Check that a folder of transformers' own class brings no code, which may compute something else."""
    auto_map = raw["auto_map"] if isinstance(raw.get("auto_map"), dict) else {}
    models = [name for name in auto_map if name.startswith("AutoModel")]
    if models and kind not in ("megabert", "mosaicbert"):
        raise ValueError(
            f"{source / CONFIG}: auto_map names code of its own for {models[0]}, {auto_map[models[0]]!r}, which may "
            "compute something else than transformers' class. If it does not, remove auto_map there."
        )


def from_megabert_config(source: Path, raw: dict[str, Any]) -> MegaBertConfig:
    """Read MegaBERT's own settings from config.json, ignoring those that name code, classes or files."""
    if raw.get("tie_word_embeddings", True) is not True:
        raise ValueError(
            f"{source / CONFIG}: tie_word_embeddings is {raw['tie_word_embeddings']!r}; this model ties them."
        )
    known = {*signature(MegaBertConfig.__init__).parameters} - {"self", "kwargs"}
    return _make_config(source, {name: value for name, value in raw.items() if name in known} | _read_labels(raw))


def from_their_config(source: Path, raw: dict[str, Any], kind: Kind, head: str | None = None) -> MegaBertConfig:
    """Convert another model's config. Raises ValueError for a setting that our model does not support.

    head: as read_head() returns it.
    """
    if kind in ("bert", "mosaicbert"):
        return from_bert_config(source, raw, kind)
    if kind in NAMES:
        return from_bert_config(source, to_bert_settings(source, raw, cast(BertLike, kind), head), kind)
    settings = (from_modernbert_config if kind == "modernbert" else from_gte_config)(source, raw)
    return _make_config(source, settings | _read_labels(raw))


def from_bert_config(source: Path, raw: dict[str, Any], kind: Kind) -> MegaBertConfig:
    """Convert the config of a BERT or a MosaicBERT. Raises ValueError for a setting that our model does not support.

    raw: with the settings that to_bert_settings() adds for other kinds.
    """
    check_fixed(source, raw, FIXED_SETTINGS)
    if kind != "mosaicbert" and (positions := raw.get("position_embedding_type", "absolute")) != "absolute":
        raise ValueError(
            f"{source / CONFIG}: position_embedding_type is {positions!r}; this model supports only 'absolute'."
        )
    if missing := [name for name in REQUIRED_SIZES if name not in raw]:
        raise ValueError(f"{source / CONFIG}: lacks {', '.join(missing)}.")
    settings = {name: raw[name] for name in SHARED_SETTINGS if raw.get(name) is not None} | _read_labels(raw)
    if "pad_token_id" in raw:
        # Without a padding token, the embedding of token 0 is trained as any other.
        settings["pad_token_id"] = raw["pad_token_id"]
    if kind == "mosaicbert":
        settings |= {"position": "alibi", "ffn": "geglu", "layer_norm_dtype": "bfloat16"}
    else:
        settings |= {"position": "learned", "ffn": "gelu", "layer_norm_dtype": "float32"}
        if kind in NAMES:
            settings |= {name: raw[name] for name in BERT_LIKE_SETTINGS}
        settings.setdefault("attention_probs_dropout_prob", BERT_ATTENTION_DROPOUT)
    config = _make_config(source, settings)
    if kind == "mosaicbert" and config.layer_norm_eps != MOSAICBERT_HEAD_EPS:
        raise ValueError(
            f"{source / CONFIG}: layer_norm_eps is {config.layer_norm_eps}, but MosaicBERT's masked language modelling "
            f"head always has {MOSAICBERT_HEAD_EPS}, and this model has one number for both. Outputs would differ: to "
            f"accept that, set layer_norm_eps to {MOSAICBERT_HEAD_EPS} there."
        )
    return config


def _read_labels(raw: dict[str, Any]) -> dict[str, Any]:
    """Read the settings of a classification head."""
    settings = {name: raw[name] for name in ("label2id", "problem_type") if raw.get(name) is not None}
    if raw.get("id2label") is not None:
        settings["id2label"] = {int(number): label for number, label in raw["id2label"].items()}
    elif "num_labels" in raw:
        settings["num_labels"] = raw["num_labels"]
    return settings


def _make_config(source: Path, settings: dict[str, Any]) -> MegaBertConfig:
    try:
        return MegaBertConfig(**settings)
    except ValueError as error:
        raise ValueError(f"{source / CONFIG}: {error}") from error


def set_max_length(config: MegaBertConfig, trained: int, wanted: int | None) -> int:
    """Return the maximum length of a text in an export. Where positions have no table, also set it in the config.

    trained: the longest piece in training; wanted: None for a default: `trained`, or with ALiBi at least ALIBI_LENGTH.
    Raises ValueError if learned positions have no row for every token.
    """
    limited = config.position == "learned"
    most = config.max_position_embeddings if limited else MAX_SIZES["max_position_embeddings"]
    default = max(trained, ALIBI_LENGTH) if config.position == "alibi" else min(trained, most)
    length = default if wanted is None else wanted
    if not 3 <= length <= most:
        raise ValueError(
            f"--max-length is {length:,}, expected 3 ([CLS], one token, [SEP]) to {most:,}"
            + (
                ", the rows of the learned positions. launch/convert_from_hf.py --max-length adds rows."
                if limited
                else "."
            )
        )
    if not limited:
        config.max_position_embeddings = length
    return length


def to_bert_config(config: MegaBertConfig) -> BertConfig:
    """Convert a config for transformers' own BERT, whose architecture it must have."""
    names = SHARED_SETTINGS if head_of(config) == MASKED_LM else (*SHARED_SETTINGS, *LABELS)
    settings = {name: getattr(config, name) for name in names}
    return BertConfig(hidden_act="gelu", architectures=[f"BertFor{head_of(config)}"], **settings)


def write_native_config(folder: Path, config: MegaBertConfig, kind: NativeKind) -> None:
    """Write config.json of transformers' own class with the config's head. The folder must have its tokenizer."""
    tokenizer = read_tokenizer(folder / TOKENIZER)
    ids = {role: tokenizer.token_to_id(token) for role, token in special_tokens(tokenizer).items()}
    special = {role: number for role, number in ids.items() if number is not None}
    if kind == "bert":
        to_bert_config(config).save_pretrained(folder)
    elif kind in NAMES:
        to_bert_like_config(config, cast(BertLike, kind), special).save_pretrained(folder)
    else:
        raw = (to_modernbert_config if kind == "modernbert" else to_gte_config)(config, special)
        (folder / CONFIG).write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n")


def to_mosaicbert_config(config: MegaBertConfig) -> dict[str, Any]:
    """Convert a config for the published MosaicBERT's modelling code, which it names at the hub."""
    auto_map = {auto: f"{MOSAICBERT_REPOSITORY}--{name}" for auto, name in MOSAICBERT_CLASSES.items()}
    same = (*SHARED_SETTINGS, "problem_type", "id2label", "label2id")
    return {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "auto_map": auto_map, "hidden_act": "gelu",
        "alibi_starting_size": config.max_position_embeddings, "torch_dtype": "float32",
    } | {name: getattr(config, name) for name in same}  # fmt: skip
