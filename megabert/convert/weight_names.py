"""Rename weights between MegaBERT, the published MosaicBERT checkpoints, and transformers' own classes."""

import re
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from megabert.convert.bert_names import NAMES, BertLike, from_bert_names, rename_all, to_bert_names
from megabert.convert.gte_files import normalize_gte

Kind = Literal["mosaicbert", "bert", "roberta", "distilbert", "electra", "modernbert", "gte"]


class WeightMapping(NamedTuple):
    """One of our tensors, by name. Import and export follow the same table of these, and change no bits.

    theirs: their tensors that make it, concatenated along the first dimension; duplicates: their other names for it.
    """

    ours: str
    theirs: tuple[str, ...]
    duplicates: tuple[str, ...] = ()


# Module names, ours to theirs. Each module has a weight and a bias.
SHARED = {
    "bert.embeddings.norm": "bert.embeddings.LayerNorm",
    "transform.dense": "cls.predictions.transform.dense",
    "transform.norm": "cls.predictions.transform.LayerNorm",
}
SHARED_LAYER = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
}
MOSAICBERT_LAYER = SHARED_LAYER | {
    "attention.qkv": "attention.self.Wqkv",
    "mlp.down": "mlp.wo",
    "mlp_norm": "mlp.layernorm",
}
BERT_LAYER = SHARED_LAYER | {
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
# The encoder's name in ModernBERT.
THEIR_MODEL = "model"
MODERNBERT = {
    "bert.embeddings.norm": f"{THEIR_MODEL}.embeddings.norm",
    "bert.encoder.final_norm": f"{THEIR_MODEL}.final_norm",
    "transform.dense": "head.dense",
    "transform.norm": "head.norm",
}
MODERNBERT_LAYER = {
    "attention_norm": "attn_norm",
    "attention.qkv": "attn.Wqkv",
    "attention.out": "attn.Wo",
    "mlp_norm": "mlp_norm",
    "mlp.up": "mlp.Wi",
    "mlp.down": "mlp.Wo",
}
GTE = {
    "bert.embeddings.norm": "gte.embeddings.LayerNorm",
    "transform.dense": "lm_head.dense",
    "transform.norm": "lm_head.layer_norm",
}
GTE_LAYER = {
    "attention.out": "self_attn.o_proj",
    "attention_norm": "post_attention_layernorm",
    "mlp.down": "mlp.down_proj",
    "mlp_norm": "post_mlp_layernorm",
}
PARTS = ("weight", "bias")
TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
WORD_EMBEDDINGS = "bert.embeddings.word_embeddings.weight"
# This tensor is the same as the word embeddings.
TIED_DECODER = "decoder.weight"
THEIR_DECODER = "cls.predictions.decoder"


def mosaicbert_table(num_layers: int) -> list[WeightMapping]:
    """Map the published MosaicBERT: fused Wqkv, gated_layers without a bias, no position embedding.

    Source: https://huggingface.co/mosaicml/mosaic-bert-base, bert_layers.py.
    """
    table = _outside_layers([f"{THEIR_DECODER}.bias"])
    for layer in range(num_layers):
        ours, theirs = f"bert.encoder.layers.{layer}.", f"bert.encoder.layer.{layer}."
        table += _map_modules({ours + a: theirs + b for a, b in MOSAICBERT_LAYER.items()})
        table.append(WeightMapping(ours + "mlp.up.weight", (theirs + "mlp.gated_layers.weight",)))
    return table


def bert_table(num_layers: int, kind: Kind = "bert") -> list[WeightMapping]:
    """Map transformers' BertForMaskedLM: separate query, key and value, learned positions, two names of decoder.bias.

    kind: of a class with the same layers, whose weights have BERT's names here. DistilBERT has no token types, and it
    and ELECTRA have one name of decoder.bias.
    """
    names = ["cls.predictions.bias", f"{THEIR_DECODER}.bias"]
    table = _outside_layers(names if kind in ("bert", "roberta") else names[:1], token_types=kind != "distilbert")
    positions = "bert.embeddings.position_embeddings.weight"
    table.append(WeightMapping(positions, (positions,)))
    for layer in range(num_layers):
        ours, theirs = f"bert.encoder.layers.{layer}.", f"bert.encoder.layer.{layer}."
        table += _map_modules({ours + a: theirs + b for a, b in BERT_LAYER.items()})
        for part in PARTS:
            names = tuple(f"{theirs}attention.self.{name}.{part}" for name in ("query", "key", "value"))
            table.append(WeightMapping(f"{ours}attention.qkv.{part}", names))
    return table


def modernbert_table(num_layers: int) -> list[WeightMapping]:
    """Map transformers' ModernBertForMaskedLM: one bias, the decoder's; no norm before the first attention."""
    table = [
        WeightMapping(WORD_EMBEDDINGS, (f"{THEIR_MODEL}.embeddings.tok_embeddings.weight",), ("decoder.weight",)),
        WeightMapping("decoder.bias", ("decoder.bias",)),
        *_map_modules(MODERNBERT, ("weight",)),
    ]
    for layer in range(num_layers):
        ours, theirs = f"bert.encoder.layers.{layer}.", f"{THEIR_MODEL}.layers.{layer}."
        names = {a: b for a, b in MODERNBERT_LAYER.items() if layer or a != "attention_norm"}
        table += _map_modules({ours + a: theirs + b for a, b in names.items()}, ("weight",))
    return table


def gte_table(num_layers: int, token_types: bool = True) -> list[WeightMapping]:
    """Map transformers' GteForMaskedLM: separate query, key and value, and separate gate and value of the MLP."""
    embeddings = "gte.embeddings."
    table = [
        WeightMapping(WORD_EMBEDDINGS, (f"{embeddings}word_embeddings.weight",), ("lm_head.decoder.weight",)),
        WeightMapping("decoder.bias", ("lm_head.decoder.bias",)),
        *_map_modules(GTE),
    ]
    if token_types:
        table.append(WeightMapping(TOKEN_TYPES, (f"{embeddings}token_type_embeddings.weight",)))
    for layer in range(num_layers):
        ours, theirs = f"bert.encoder.layers.{layer}.", f"gte.layers.{layer}."
        table += _map_modules({ours + a: theirs + b for a, b in GTE_LAYER.items()})
        halves = tuple(f"{theirs}mlp.{name}_proj.weight" for name in ("gate", "up"))
        table.append(WeightMapping(f"{ours}mlp.up.weight", halves))
        for part in PARTS:
            names = tuple(f"{theirs}self_attn.{name}_proj.{part}" for name in ("q", "k", "v"))
            table.append(WeightMapping(f"{ours}attention.qkv.{part}", names))
    return table


def _outside_layers(decoder_bias: list[str], token_types: bool = True) -> list[WeightMapping]:
    return [
        WeightMapping(WORD_EMBEDDINGS, (WORD_EMBEDDINGS,), (f"{THEIR_DECODER}.weight",)),
        *([WeightMapping(TOKEN_TYPES, (TOKEN_TYPES,))] if token_types else []),
        WeightMapping("decoder.bias", (decoder_bias[0],), tuple(decoder_bias[1:])),
        *_map_modules(SHARED),
    ]


def _map_modules(names: Mapping[str, str], parts: tuple[str, ...] = PARTS) -> list[WeightMapping]:
    return [WeightMapping(f"{ours}.{part}", (f"{theirs}.{part}",)) for ours, theirs in names.items() for part in parts]


def _table(kind: Kind, num_layers: int, names: Collection[str]) -> list[WeightMapping]:
    """names: the names in a state dict of either side, which may or may not have token types."""
    if kind == "gte":
        return gte_table(num_layers, any("token_type_embeddings" in name for name in names))
    if kind == "mosaicbert":
        return mosaicbert_table(num_layers)
    return modernbert_table(num_layers) if kind == "modernbert" else bert_table(num_layers, kind)


# What stands before the number of a layer in each model's names.
OUR_LAYERS = "bert.encoder.layers"
BERT_LAYERS = "bert.encoder.layer"
LAYERS: dict[Kind, str] = {"modernbert": f"{THEIR_MODEL}.layers", "gte": "gte.layers"}

# The parameters of our masked language modelling head.
MLM_HEAD_PREFIXES = ("transform.", "decoder.")
# The modules of heads for tasks, ours to theirs. ModernBERT calls the last layer of every head classifier.
SAME_HEADS = {name: name for name in ("bert.pooler.dense", "classifier", "qa_outputs")}
TASK_HEADS: dict[Kind, dict[str, str]] = {
    "gte": {"bert.pooler.dense": "gte.pooler.dense", "classifier": "classifier"},
    "modernbert": {"classifier": "classifier"},
}
ANSWERS = {"qa_outputs": "classifier"}
# Parameters that our model does not have: of next-sentence prediction, of ELECTRA's discriminator, and of a pooler
# without use, see to_bert_names().
UNUSED_PREFIXES = ("cls.seq_relationship.", "discriminator_predictions.", "roberta.pooler.")
# Buffers that transformers computes from the config, whatever a file has.
UNUSED_SUFFIXES = ("rotary_emb.inv_freq", "rotary_emb.original_inv_freq")
# A classifier of ours has its pooler under another name, see MegaBertForSequenceClassification.
POOLER = {f"pre_classifier.dense.{part}": f"bert.pooler.dense.{part}" for part in PARTS}
# What torch.compile, DistributedDataParallel, FSDP, activation checkpointing and Lightning add to the names of a model.
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "model"}
# First words of names that are not a wrapper's. Any other word that all names begin with is removed: of a GTE's "new.",
# too, which transformers 5 also writes before the names of heads, and before "gte.", if it saves what it read so.
ROOTS = {"bert", "roberta", "distilbert", "electra", "embeddings"}
# These buffers are constants: 0, 1, 2, ... and zeros.
BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")
# The names in checkpoints that were converted from TensorFlow.
LEGACY_LAYER_NORM = {"gamma": "weight", "beta": "bias"}


class RenamedWeights(NamedTuple):
    """weights: by our names; missing: our names of a head that the source lacks; unused: their tensors without use."""

    weights: dict[str, Tensor]
    missing: list[str]
    unused: list[str]


def to_megabert(state: Mapping[str, Tensor], kind: Kind, answers: bool = False) -> RenamedWeights:
    """Rename another model's weights, which may lack the masked language modelling head.

    answers: whether the last layer of a ModernBERT's head scores the ends of answers. Raises ValueError if a name is
    unknown or missing, or if a tied tensor differs from the one that it is tied to.
    """
    state = NORMALIZE[kind](state) if kind in NORMALIZE else normalize_names(state, kind)
    table = _table(kind, num_layers(state, LAYERS.get(kind, BERT_LAYERS)), state)
    head = [entry for entry in table if entry.ours.startswith(MLM_HEAD_PREFIXES)]
    missing = [entry.ours for entry in head]
    if kind == "modernbert" and "classifier.weight" in state and "decoder.bias" not in state:
        # Its classifiers have the transform, too.
        missing = ["decoder.bias"]
    elif any(name in state for entry in head for name in entry.theirs):
        missing = []
    table = [entry for entry in table if entry.ours not in missing]
    required = {name for entry in table for name in entry.theirs}
    duplicates = {name for entry in table for name in entry.duplicates}
    heads = _task_heads(kind, answers)
    unused = {name for name in state if name.startswith(UNUSED_PREFIXES) or name.endswith(UNUSED_SUFFIXES)}
    _check_names(state, required, duplicates | set(heads.values()) | unused, kind)
    ours = {name: state[theirs] for name, theirs in heads.items() if theirs in state}
    for entry in table:
        parts = [state[name] for name in entry.theirs]
        ours[entry.ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
        for duplicate in entry.duplicates:
            if duplicate in state and not _equal(state[duplicate], ours[entry.ours]):
                raise ValueError(f"{duplicate} differs from {entry.theirs[0]}, but this model ties them.")
    return RenamedWeights(ours, missing, sorted(unused))


def _task_heads(kind: Kind, answers: bool) -> dict[str, str]:
    """Return our names of the parameters of heads for tasks, and theirs."""
    modules = ANSWERS if kind == "modernbert" and answers else TASK_HEADS.get(kind, SAME_HEADS)
    return {f"{ours}.{part}": f"{theirs}.{part}" for ours, theirs in modules.items() for part in PARTS}


def normalize_names(state: Mapping[str, Tensor], kind: Kind = "bert") -> dict[str, Tensor]:
    """Use the names of BertForMaskedLM: add the prefix that a bare encoder lacks, rename old LayerNorms."""
    if kind in NAMES:
        state = to_bert_names(state, cast(BertLike, kind))
    is_bare_encoder = any(name.startswith("embeddings.") for name in state)

    def rename(name: str) -> str:
        stem, _, last = name.rpartition(".")
        new = f"{stem}.{LEGACY_LAYER_NORM.get(last, last)}" if stem.endswith("LayerNorm") else name
        return f"bert.{new}" if is_bare_encoder and new.startswith(("embeddings.", "encoder.", "pooler.")) else new

    return {name: tensor for name, tensor in rename_all(state, rename).items() if name not in BUFFERS}


def normalize_modernbert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the prefix that a bare encoder lacks, and that strip_wrappers() takes for a wrapper's."""
    bare = ("embeddings.", "layers.", "final_norm.")
    return rename_all(state, lambda name: f"model.{name}" if name.startswith(bare) else name)


NORMALIZE = {"modernbert": normalize_modernbert, "gte": normalize_gte}


def strip_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Remove from names what training with a wrapper adds: module.bert.x and _orig_mod.bert.x become bert.x.

    Any other first word that all names share is removed too: student.bert.x becomes bert.x. Raises ValueError if two
    tensors get one name.
    """
    stripped: dict[str, Tensor] = {}
    for name, tensor in state.items():
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS)
        if plain in stripped:
            raise ValueError(f"{name} is there twice, with and without the prefix of a wrapper.")
        stripped[plain] = tensor
    words = {name.partition(".")[0] for name in stripped}
    while len(words) == 1 and not words & ROOTS and all("." in name for name in stripped):
        stripped = {name.partition(".")[2]: tensor for name, tensor in stripped.items()}
        words = {name.partition(".")[0] for name in stripped}
    return stripped


def normalize_our_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Use the names of MegaBertForMaskedLM and of BERT's pooler; remove the tied tensor.

    Raises ValueError if a tensor differs from the one that it equals in all our folders.
    """
    is_bare_encoder = any(name.startswith("embeddings.") for name in state)
    named = {f"bert.{name}" if is_bare_encoder else name: tensor for name, tensor in state.items()}
    for name, other in POOLER.items():
        if name in named:
            named.setdefault(other, named[name])
    for name, other in {TIED_DECODER: WORD_EMBEDDINGS, **POOLER}.items():
        copy = named.pop(name, None)
        if copy is not None and other in named and not _equal(copy, named[other]):
            raise ValueError(f"{name} differs from {other}, but this model ties them.")
    return named


def add_classifiers_pooler(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights with the name of the pooler that a classifier loads, too, if there is one."""
    # A copy, because safetensors writes no two tensors that share memory.
    return dict(weights) | {name: weights[other].clone() for name, other in POOLER.items() if other in weights}


def from_megabert(
    state: Mapping[str, Tensor], kind: Kind, duplicates: bool = True, head: str | None = None
) -> dict[str, Tensor]:
    """Rename the weights of one of our models with a head, or of MegaBertForMaskedLM without its head.

    The tied decoder.weight may be missing. duplicates: also return the tensors that have a second name, as their
    state_dict() does and their files need not. head: the task of the head, one of heads.TASKS, if it is for a task.
    """
    state = {POOLER.get(name, name): tensor for name, tensor in state.items()}
    table = _table(kind, num_layers(state, OUR_LAYERS), state)
    heads = _task_heads(kind, answers="qa_outputs.weight" in state)
    if "decoder.bias" not in state:
        # ModernBERT's classifiers have the transform, too.
        kept = ("transform.",) if kind == "modernbert" and heads.keys() & state.keys() else ()
        table = [
            entry._replace(duplicates=())
            for entry in table
            if not entry.ours.startswith(MLM_HEAD_PREFIXES) or entry.ours.startswith(kept)
        ]
    _check_names(state, {entry.ours for entry in table}, {TIED_DECODER, *heads}, f"megabert as {kind}")
    theirs = {name: state[ours] for ours, name in heads.items() if ours in state}
    for entry in table:
        parts = state[entry.ours].chunk(len(entry.theirs))
        theirs |= dict(zip(entry.theirs, parts, strict=True))
        if duplicates:
            theirs |= dict.fromkeys(entry.duplicates, state[entry.ours])
    return from_bert_names(theirs, cast(BertLike, kind), head) if kind in NAMES else theirs


def num_layers(state: Mapping[str, Tensor], before: str = OUR_LAYERS) -> int:
    """Count the layers in a state dict. before: what stands before a layer's number, see LAYERS.

    Raises ValueError if a number below the highest is missing, so that one huge number cannot make a huge table.
    """
    numbers = {match[1] for name in state if (match := re.match(rf"{re.escape(before)}\.([0-9]+)\.", name))}
    for number in range(len(numbers)):
        if str(number) not in numbers:
            highest = max(numbers, key=lambda digits: (len(digits), digits))
            raise ValueError(f"this state dict has tensors of layer {highest[:20]}, but none of layer {number}.")
    return len(numbers)


def _check_names(state: Mapping[str, Tensor], required: set[str], optional: set[str], kind: str) -> None:
    for problem, names in (("unknown", state.keys() - required - optional), ("missing", required - state.keys())):
        if names:
            tensors = dict.fromkeys(names, torch.empty(0))
            shown = from_bert_names(tensors, cast(BertLike, kind)) if kind in NAMES else tensors
            first = ", ".join(sorted(shown)[:3])
            raise ValueError(f"this state dict is not a {kind} masked language model: {len(names)} {problem}: {first}")


def _equal(one: Tensor, other: Tensor) -> bool:
    """Compare two tensors; torch.equal raises for tensors of different types."""
    return one.dtype == other.dtype and torch.equal(one, other)
