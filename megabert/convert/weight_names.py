"""The weights' names in other stacks: the published MosaicBERT checkpoints, and transformers' BERT.

One table says which of their tensors make one of ours. Reading and writing follow it, bitwise: nothing is computed, only
renamed, and for BERT split or joined. A state dict with an unknown or a missing name is refused, and so is one whose
decoder is not tied to its word embeddings, which our model could not hold. Only a whole head may be missing.

MosaicBERT: https://huggingface.co/mosaicml/mosaic-bert-base, bert_layers.py. BERT: transformers' BertForMaskedLM.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """One tensor of ours. theirs: those that make it, stacked along the first dimension; copies: where it appears again."""

    ours: str
    theirs: tuple[str, ...]
    copies: tuple[str, ...] = ()


# Modules by their names; the parameters below each are weight and bias, unless said.
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
PARTS = ("weight", "bias")
WORDS = "bert.embeddings.word_embeddings.weight"
DECODER = "cls.predictions.decoder"


def mosaicbert_table(num_layers: int) -> list[Entry]:
    """The published MosaicBERT: fused Wqkv, gated_layers without a bias, no position embedding."""
    table = _outside_layers([f"{DECODER}.bias"])
    for layer in range(num_layers):
        ours, theirs = f"bert.encoder.layers.{layer}.", f"bert.encoder.layer.{layer}."
        table += _modules({ours + a: theirs + b for a, b in MOSAICBERT_LAYER.items()})
        table.append(Entry(ours + "mlp.up.weight", (theirs + "mlp.gated_layers.weight",)))
    return table


def bert_table(num_layers: int) -> list[Entry]:
    """transformers' BertForMaskedLM: query, key and value apart, learned positions, the decoder's bias twice."""
    table = _outside_layers(["cls.predictions.bias", f"{DECODER}.bias"])
    positions = "bert.embeddings.position_embeddings.weight"
    table.append(Entry(positions, (positions,)))
    for layer in range(num_layers):
        ours, theirs = f"bert.encoder.layers.{layer}.", f"bert.encoder.layer.{layer}."
        table += _modules({ours + a: theirs + b for a, b in BERT_LAYER.items()})
        for part in PARTS:
            names = tuple(f"{theirs}attention.self.{name}.{part}" for name in ("query", "key", "value"))
            table.append(Entry(f"{ours}attention.qkv.{part}", names))
    return table


def _outside_layers(decoder_bias: list[str]) -> list[Entry]:
    types = "bert.embeddings.token_type_embeddings.weight"
    return [
        Entry(WORDS, (WORDS,), (f"{DECODER}.weight",)),
        Entry(types, (types,)),
        Entry("decoder.bias", (decoder_bias[0],), tuple(decoder_bias[1:])),
        *_modules(SHARED),
    ]


def _modules(names: Mapping[str, str]) -> list[Entry]:
    return [Entry(f"{ours}.{part}", (f"{theirs}.{part}",)) for ours, theirs in names.items() for part in PARTS]


TABLES = {"mosaicbert": mosaicbert_table, "bert": bert_table}

HEAD = ("transform.", "decoder.")  # ours: the masked language model's
SAME = ("bert.pooler.dense.", "classifier.", "qa_outputs.")  # what has one name in every stack
LEFT_OUT = ("cls.seq_relationship.",)  # next-sentence prediction, which nothing of ours has
BUFFERS = ("bert.embeddings.position_ids", "bert.embeddings.token_type_ids")  # counted from 0, and zeros
OLD_NAMES = {"gamma": "weight", "beta": "bias"}  # LayerNorm's, in checkpoints that were converted from TensorFlow


class Translation(NamedTuple):
    """weights: ours by name; missing: ours that they do not have, all of one head; left_out: theirs that we have no use for."""

    weights: dict[str, Tensor]
    missing: list[str]
    left_out: list[str]


def translate(state: Mapping[str, Tensor], kind: str) -> Translation:
    """Our names for a model of theirs, with or without a head. kind: "mosaicbert" or "bert".

    Raises ValueError for a name that is unknown or missing, or a tied tensor that is not.
    """
    state = standard_names(state)
    table = TABLES[kind](num_layers(state, "layer"))
    head = [entry for entry in table if entry.ours.startswith(HEAD)]
    missing = [entry.ours for entry in head]
    if any(name in state for entry in head for name in entry.theirs):
        missing = []
    table = [entry for entry in table if entry.ours not in missing]
    wanted = {name for entry in table for name in entry.theirs}
    copies = {name for entry in table for name in entry.copies}
    same = {name for name in state if name.startswith(SAME)}
    left_out = {name for name in state if name.startswith(LEFT_OUT)}
    _check_names(state, wanted, copies | same | left_out, kind)
    ours = {name: state[name] for name in sorted(same)}
    for entry in table:
        parts = [state[name] for name in entry.theirs]
        ours[entry.ours] = parts[0] if len(parts) == 1 else torch.cat(parts)
        for copy in entry.copies:
            if copy in state and not torch.equal(state[copy], ours[entry.ours]):
                raise ValueError(f"{copy} differs from {entry.theirs[0]}, but this model ties them.")
    return Translation(ours, missing, sorted(left_out))


def standard_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their names as their masked language model has them: a bare encoder lacks the prefix, old files name LayerNorm otherwise."""
    bare = any(name.startswith("embeddings.") for name in state)
    standard = {}
    for name, tensor in state.items():
        stem, _, last = name.rpartition(".")
        whole = f"{stem}.{OLD_NAMES.get(last, last)}" if stem.endswith("LayerNorm") else name
        if bare and whole.startswith(("embeddings.", "encoder.", "pooler.")):
            whole = f"bert.{whole}"
        if whole not in BUFFERS:
            standard[whole] = tensor
    return standard


def from_published(state: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Our MegaBertForMaskedLM's state dict from theirs. kind: "mosaicbert" or "bert".

    Raises ValueError for a name that is unknown or missing, or a tied tensor that is not.
    """
    found = translate(state, kind)
    if found.missing:
        raise ValueError(f"this state dict is not a {kind} masked language model: it has no head ({found.missing[0]}).")
    return found.weights | {"decoder.weight": found.weights[WORDS]}


def to_published(state: Mapping[str, Tensor], kind: str, copies: bool = True) -> dict[str, Tensor]:
    """Their state dict from our MegaBertForMaskedLM's, which may leave its tied decoder.weight out.

    copies: with the tensors that appear twice under their names, as their state_dict() has them and their files need not.
    """
    table = TABLES[kind](num_layers(state, "layers"))
    same = {name for name in state if name.startswith(SAME)}
    _check_names(state, {entry.ours for entry in table}, {"decoder.weight"} | same, f"megabert as {kind}")
    theirs = {name: state[name] for name in sorted(same)}
    for entry in table:
        parts = state[entry.ours].chunk(len(entry.theirs))
        theirs |= dict(zip(entry.theirs, parts, strict=True))
        if copies:
            theirs |= dict.fromkeys(entry.copies, state[entry.ours])
    return theirs


def num_layers(state: Mapping[str, Tensor], word: str) -> int:
    """How many layers the names tell of. word: what comes before their number, "layer" in theirs, "layers" in ours.

    Raises ValueError if some before the last are missing: however high its number, memory is needed for those there are.
    """
    numbers = {found[1] for name in state if (found := re.match(rf"bert\.encoder\.{word}\.([0-9]+)\.", name))}
    for number in range(len(numbers)):
        if str(number) not in numbers:
            highest = max(numbers, key=lambda digits: (len(digits), digits))
            raise ValueError(f"this state dict has tensors of layer {highest[:20]}, but none of layer {number}.")
    return len(numbers)


def _check_names(state: Mapping[str, Tensor], wanted: set[str], allowed: set[str], kind: str) -> None:
    for problem, names in (("unknown", state.keys() - wanted - allowed), ("missing", wanted - state.keys())):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise ValueError(f"this state dict is not a {kind} masked language model: {len(names)} {problem}: {first}")
