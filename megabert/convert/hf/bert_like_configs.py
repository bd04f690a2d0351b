"""Convert RoBERTa, DistilBERT and ELECTRA configs to BERT's and back.

Source: transformers 5.23, models/roberta, xlm_roberta, camembert, distilbert and electra.
"""

from pathlib import Path
from typing import Any

from transformers import DistilBertConfig, ElectraConfig, PretrainedConfig, RobertaConfig

from megabert.convert.bert_names import BertLike
from megabert.convert.hf.heads import CHOICE, LABELS, MASKED_LM, head_of
from megabert.convert.hf.native import ACTIVATIONS, DISTILBERT_EPS, check_fixed
from megabert.convert.hf.reader import CONFIG, SIZE_ALIASES
from megabert.model.configuration_megabert import MegaBertConfig

# XLM-RoBERTa and CamemBERT compute what RoBERTa computes, and their weights have its names.
MODEL_TYPES: dict[str, BertLike] = {
    "roberta": "roberta",
    "xlm-roberta": "roberta",
    "camembert": "roberta",
    "distilbert": "distilbert",
    "electra": "electra",
}
# Our settings, by DistilBERT's names.
DISTILBERT_NAMES = SIZE_ALIASES["distilbert"] | {
    "dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "activation": "hidden_act",
}
DISTILBERT_FIXED = {"activation": "gelu"}
# The defaults of their configs where they are not BERT's.
ROBERTA_PAD = 1
ELECTRA_EMBEDDING_SIZE = 128
DISTILBERT_CLASSIFIER_DROPOUT = 0.2
ELECTRA_SUMMARY_DROPOUT = 0.1
# The layer before the scores of ELECTRA's choices.
ELECTRA_SUMMARY = {"summary_type": "first", "summary_use_proj": True, "summary_activation": "gelu"}
# Settings that all four configs have by one name.
SHARED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range", "pad_token_id")
SHARED_WITH_BERT = (
    *SHARED, "intermediate_size", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps",
    "type_vocab_size", "classifier_dropout",
)  # fmt: skip


def to_bert_settings(source: Path, raw: dict[str, Any], kind: BertLike, head: str | None) -> dict[str, Any]:
    """Return config.json in the words of BERT's and, for what BERT does not have, in ours.

    head: as read_head() returns it. Raises ValueError for what our model cannot compute.
    """
    ours = {"position_offset": 0, "classifier_activation": ACTIVATIONS[kind], "attention_output_dropout_prob": None}
    settings = raw | ours
    if kind == "roberta":
        settings |= _roberta_positions(source, raw)
    elif kind == "electra":
        settings |= _electra_settings(source, raw, head)
    else:
        check_fixed(source, raw, DISTILBERT_FIXED)
        if missing := [
            name for name, ours in SIZE_ALIASES["distilbert"].items() if name not in raw and ours not in raw
        ]:
            raise ValueError(f"{source / CONFIG}: lacks {', '.join(missing)}.")
        settings = {DISTILBERT_NAMES.get(name, name): value for name, value in settings.items()}
        of_pooled = head not in ("TokenClassification", "QuestionAnswering")
        dropout = raw.get("seq_classif_dropout", DISTILBERT_CLASSIFIER_DROPOUT) if of_pooled else None
        settings |= {
            "type_vocab_size": 0, "layer_norm_eps": DISTILBERT_EPS, "classifier_dropout": dropout,
            "attention_output_dropout_prob": 0.0,
        }  # fmt: skip
    return settings


def _roberta_positions(source: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the table of positions, whose first rows belong to padding and to no token."""
    pad, rows = raw.get("pad_token_id", ROBERTA_PAD), raw.get("max_position_embeddings", 512)
    if isinstance(pad, bool) or not isinstance(pad, int) or not 0 <= pad < rows - 1:
        raise ValueError(
            f"{source / CONFIG}: pad_token_id is {pad!r} and max_position_embeddings {rows}; RoBERTa's positions begin "
            "after the row of pad_token_id, so that one must be a row of them and not the last."
        )
    return {"pad_token_id": pad, "position_offset": pad + 1, "max_position_embeddings": rows - pad - 1}


def _electra_settings(source: Path, raw: dict[str, Any], head: str | None) -> dict[str, Any]:
    embedding_size = raw.get("embedding_size", ELECTRA_EMBEDDING_SIZE)
    if embedding_size != raw.get("hidden_size", embedding_size):
        raise ValueError(
            f"{source / CONFIG}: embedding_size is {embedding_size} and hidden_size {raw['hidden_size']}: this model "
            "has no projection between embeddings and layers, so that both must be equal, as in ELECTRA-Base's and "
            "-Large's discriminators."
        )
    settings: dict[str, Any] = {}
    if head == CHOICE:
        check_fixed(source, raw, ELECTRA_SUMMARY)
        if first := raw.get("summary_first_dropout"):
            raise ValueError(f"{source / CONFIG}: summary_first_dropout is {first!r}; this model supports only 0.")
        settings["classifier_dropout"] = raw.get("summary_last_dropout", ELECTRA_SUMMARY_DROPOUT)
    return settings


def to_bert_like_config(config: MegaBertConfig, kind: BertLike, special_ids: dict[str, int]) -> PretrainedConfig:
    """Convert a config for transformers' own class, whose architecture it must have.

    special_ids: by role. A tokenizer's [CLS] and [SEP], or <s> and </s>, begin and end a text.
    """
    head = head_of(config)
    names = SHARED if kind == "distilbert" else SHARED_WITH_BERT
    names = names if head == MASKED_LM else (*names, *LABELS)
    settings: dict[str, Any] = {name: getattr(config, name) for name in names}
    if kind == "roberta":
        ids: dict[str, Any] = {"bos_token_id": special_ids.get("cls"), "eos_token_id": special_ids.get("sep")}
        return RobertaConfig(
            **settings, **ids, max_position_embeddings=config.position_rows, architectures=[f"RobertaFor{head}"]
        )
    settings["max_position_embeddings"] = config.max_position_embeddings
    dropout = config.dropout_of_classifier
    if kind == "electra":
        settings |= {"embedding_size": config.hidden_size} | (
            {"summary_last_dropout": dropout} if head == CHOICE else {}
        )
        return ElectraConfig(**settings, architectures=[f"ElectraFor{head}"])
    return DistilBertConfig(
        **settings,
        hidden_dim=config.intermediate_size,
        dropout=config.hidden_dropout_prob,
        attention_dropout=config.attention_probs_dropout_prob,
        seq_classif_dropout=dropout,
        architectures=[f"DistilBertFor{head}"],
    )
