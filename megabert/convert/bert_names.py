"""Rename weights between transformers' BERT and classes with the same layers: RoBERTa, DistilBERT and ELECTRA."""

import re
from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

BertLike = Literal["roberta", "distilbert", "electra"]

# Modules or tensors by BERT's names, and by theirs.
NAMES: dict[BertLike, dict[str, str]] = {
    "roberta": {
        "bert": "roberta",
        "cls.predictions": "lm_head",
        "cls.predictions.transform.dense": "lm_head.dense",
        "cls.predictions.transform.LayerNorm": "lm_head.layer_norm",
    },
    "distilbert": {
        "bert": "distilbert",
        "bert.encoder": "distilbert.transformer",
        "bert.pooler.dense": "pre_classifier",
        "cls.predictions.transform.dense": "vocab_transform",
        "cls.predictions.transform.LayerNorm": "vocab_layer_norm",
        "cls.predictions.decoder.weight": "vocab_projector.weight",
        "cls.predictions.bias": "vocab_projector.bias",
    },
    "electra": {
        "bert": "electra",
        "cls.predictions.transform": "generator_predictions",
        "cls.predictions.decoder.weight": "generator_lm_head.weight",
        "cls.predictions.bias": "generator_lm_head.bias",
    },
}
# The same below the number of a layer.
LAYER_NAMES: dict[BertLike, dict[str, str]] = {
    "roberta": {},
    "distilbert": {
        "attention.self.query": "attention.q_lin",
        "attention.self.key": "attention.k_lin",
        "attention.self.value": "attention.v_lin",
        "attention.output.dense": "attention.out_lin",
        "attention.output.LayerNorm": "sa_layer_norm",
        "intermediate.dense": "ffn.lin1",
        "output.dense": "ffn.lin2",
        "output.LayerNorm": "output_layer_norm",
    },
    "electra": {},
}
# The same for heads that two of them build in another way than BERT.
OF_TEXTS = {"bert.pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"}
OF_CHOICES = {"bert.pooler.dense": "sequence_summary.summary"}
HEAD_NAMES: dict[BertLike, dict[str, dict[str, str]]] = {
    "roberta": {"SequenceClassification": OF_TEXTS},
    "distilbert": {},
    "electra": {"SequenceClassification": OF_TEXTS, "MultipleChoice": OF_CHOICES},
}
LAYER = re.compile(r"(.*\.layer\.[0-9]+)\.(.*)")
BARE = ("embeddings.", "encoder.", "transformer.", "pooler.")


def to_bert_names(state: Mapping[str, Tensor], kind: BertLike) -> dict[str, Tensor]:
    """Use BERT's names for an encoder with or without its head.

    The pooler beside a classifier that has a layer of its own keeps its name: old versions of transformers saved one,
    and computed nothing with it.
    """
    base = NAMES[kind]["bert"]
    is_bare = any(name.startswith("embeddings.") for name in state)
    has_layer = any(name.startswith("classifier.dense.") for name in state)
    names, layer_names = _inverse(NAMES[kind], *HEAD_NAMES[kind].values()), _inverse(LAYER_NAMES[kind])

    def rename(name: str) -> str:
        full = f"{base}.{name}" if is_bare and name.startswith(BARE) else name
        is_unused = has_layer and full.startswith(f"{base}.pooler.")
        return full if is_unused else _rename(full, names, layer_names)

    return rename_all(state, rename)


def rename_all(state: Mapping[str, Tensor], rename: Callable[[str], str]) -> dict[str, Tensor]:
    """Rename each tensor. Raises ValueError if two get one name, such as LayerNorm.gamma and LayerNorm.weight."""
    origins: dict[str, str] = {}
    for name in state:
        if (other := origins.setdefault(rename(name), name)) != name:
            raise ValueError(f"{other} and {name} are the same parameter by two names. Remove one of them.")
    return {new: state[name] for new, name in origins.items()}


def from_bert_names(state: Mapping[str, Tensor], kind: BertLike, head: str | None = None) -> dict[str, Tensor]:
    """Use the names of the class with this head, one of heads.TASKS, or None for that of masked language modelling."""
    names = NAMES[kind] | HEAD_NAMES[kind].get(head or "", {})
    return {_rename(name, names, LAYER_NAMES[kind]): tensor for name, tensor in state.items()}


def _inverse(*tables: Mapping[str, str]) -> dict[str, str]:
    return {theirs: ours for table in tables for ours, theirs in table.items()}


def _rename(name: str, names: Mapping[str, str], layer_names: Mapping[str, str]) -> str:
    if match := LAYER.fullmatch(name):
        return f"{_replace(match[1], names)}.{_replace(match[2], layer_names)}"
    return _replace(name, names)


def _replace(name: str, names: Mapping[str, str]) -> str:
    """Replace the longest module of `names` with which the name begins."""
    found = max((module for module in names if f"{name}.".startswith(f"{module}.")), key=len, default="")
    return names.get(found, "") + name.removeprefix(found)
