"""Rename weights between transformers' GTE class and the names in GTE's files, which other programs read, too."""

from collections.abc import Mapping

import torch
from torch import Tensor

# Parts of the names in files by those in the class; "gte." is "new." there.
GTE_FILE_NAMES = {
    ".layers.": ".encoder.layer.",
    "self_attn.o_proj": "attention.o_proj",
    "post_attention_layernorm": "attn_ln",
    "post_mlp_layernorm": "mlp_ln",
    "lm_head.layer_norm": "lm_head.norm",
}
# Tensors that are one in the files, in the order of their parts there: the gate is the second half.
GTE_FILE_PARTS = {
    "attention.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.up_gate_proj": ("mlp.up_proj", "mlp.gate_proj"),
}


def normalize_gte(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a file's names to the class's, which it may already have, and add the prefix that a bare encoder lacks.

    Raises ValueError for a tensor that cannot be divided into its parts, and if two get one name.
    """
    is_bare = any(name.startswith("embeddings.") for name in state)
    normalized: dict[str, Tensor] = {}
    for name, tensor in state.items():
        native = _to_class_name(f"gte.{name}" if is_bare else name)
        whole = next((whole for whole in GTE_FILE_PARTS if f"{whole}." in native), None)
        parts = (native,) if whole is None else [native.replace(whole, part) for part in GTE_FILE_PARTS[whole]]
        if tensor.dim() == 0 or len(tensor) % len(parts):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected a multiple of {len(parts)} rows.")
        if twice := next((part for part in parts if part in normalized), None):
            raise ValueError(f"{name} and another tensor are the same parameter, {twice}. Remove one of them.")
        normalized |= dict(zip(parts, tensor.chunk(len(parts)), strict=True))
    return normalized


def to_gte_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Use the names of files for those of the class: the inverse of normalize_gte()."""
    rest, named = dict(state), {}
    for whole, parts in GTE_FILE_PARTS.items():
        for name in [name for name in rest if parts[0] in name]:
            tensors = [rest.pop(name.replace(parts[0], part)) for part in parts]
            named[_to_file_name(name.replace(parts[0], whole))] = torch.cat(tensors)
    return named | {_to_file_name(name): tensor for name, tensor in rest.items()}


def _to_class_name(name: str) -> str:
    for native, in_file in GTE_FILE_NAMES.items():
        name = name.replace(in_file, native)
    return f"gte.{name.removeprefix('new.')}" if name.startswith("new.") else name


def _to_file_name(name: str) -> str:
    for native, in_file in GTE_FILE_NAMES.items():
        name = name.replace(native, in_file)
    return f"new.{name.removeprefix('gte.')}" if name.startswith("gte.") else name
