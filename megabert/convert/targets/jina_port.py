"""Compute JinaBERT v2's encoder with the equations that servers use, and with no code of megabert/model.

Source: https://github.com/huggingface/text-embeddings-inference, backends/candle/src/models/jina.rs, and
https://github.com/ggml-org/llama.cpp, src/models/jina-bert-v2.cpp, whose equations are the same.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from megabert.convert.hf.reader import read_config, read_weights
from megabert.convert.targets.target import DiffersError

# transformers and vLLM would take the folder for a BERT and draw the parameters that it lacks at random. A table of
# positions with one row, which no program that knows the layout reads, makes them refuse it.
GUARD = "embeddings.position_embeddings.weight"
# TEI distinguishes the layout from BERT's by the first of these settings, and chooses its equations by the others.
SETTINGS = {
    "_name_or_path": "jinaai/jina-bert-implementation",
    "model_type": "bert",
    "position_embedding_type": "alibi",
    "feed_forward_type": "geglu",
    "hidden_act": "gelu",
}
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
         "type_vocab_size", "max_position_embeddings")  # fmt: skip


class JinaBert(NamedTuple):
    """tensors: by the layout's names, fp64."""

    tensors: dict[str, Tensor]
    layers: int
    heads: int
    eps: float
    max_length: int

    def to(self, dtype: torch.dtype) -> "JinaBert":
        return self._replace(tensors={name: tensor.to(dtype) for name, tensor in self.tensors.items()})


def read_folder(folder: Path) -> JinaBert:
    """Read a model. Raises ValueError for damaged files, and DiffersError for other tensors than the config implies."""
    config = read_config(folder)
    if missing := [name for name in SIZES if name not in config]:
        raise DiffersError(f"config.json lacks {', '.join(missing)}")
    if not isinstance(eps := config.get("layer_norm_eps"), float):
        raise DiffersError(f"config.json: layer_norm_eps is {eps!r}, expected a number")
    for name, value in SETTINGS.items():
        if config.get(name) != value:
            raise DiffersError(f"config.json: {name} is {config.get(name)!r}, expected {value!r}")
    tensors = {name: tensor.double() for name, tensor in read_weights(folder).items()}
    guard = tensors.pop(GUARD, torch.empty(0))
    if guard.shape != (1, config["hidden_size"]):
        raise DiffersError(f"{GUARD} must have one row, so that programs that do not know the layout refuse it")
    return make_model(tensors, config, eps)


def make_model(tensors: dict[str, Tensor], sizes: Mapping[str, Any], eps: float) -> JinaBert:
    """Check the tensors. Raises DiffersError unless they are those that the sizes, by their names in SIZES, imply."""
    found, expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected_shapes(sizes)
    names = found.keys() | expected.keys()
    if wrong := sorted(name for name in names if found.get(name) != expected.get(name)):
        got, wanted = (shapes.get(wrong[0], "none") for shapes in (found, expected))
        raise DiffersError(f"{wrong[0]} has shape {got}, but the settings imply {wanted}")
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if width % heads:
        raise DiffersError(f"the width {width} is no multiple of the number of heads, {heads}")
    return JinaBert(tensors, sizes["num_hidden_layers"], heads, eps, sizes["max_position_embeddings"])


def expected_shapes(sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor of the layout, but for GUARD."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    tables = {"word_embeddings": sizes["vocab_size"], "token_type_embeddings": sizes["type_vocab_size"]}
    shapes: dict[str, tuple[int, ...]] = {f"embeddings.{name}.weight": (rows, width) for name, rows in tables.items()}
    square: tuple[int, ...] = (width, width)
    modules = ("self.query", "self.key", "self.value", "output.dense")
    linears = {f"attention.{name}": square for name in modules} | {"mlp.wo": (width, inner)}
    norms = ["embeddings.LayerNorm"]
    for layer in range(sizes["num_hidden_layers"]):
        name = f"encoder.layer.{layer}."
        shapes |= {f"{name}{module}.weight": shape for module, shape in linears.items()}
        shapes |= {f"{name}{module}.bias": shape[:1] for module, shape in linears.items()}
        shapes[f"{name}mlp.gated_layers.weight"] = (2 * inner, width)
        norms += [f"{name}attention.output.LayerNorm", f"{name}mlp.layernorm"]
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    return shapes


def slopes(heads: int) -> list[float]:
    """Give ALiBi's slope of each head; beyond a power of two, every second one of the next power."""
    power = 2 ** int(math.log2(heads))
    first, second = 2 ** (-8 / power), 2 ** (-4 / power)
    return [first ** (h + 1) if h < power else second ** (2 * (h - power) + 1) for h in range(heads)]


def encode(model: JinaBert, ids: Tensor, mask: Tensor, tanh: bool = False) -> Tensor:
    """Return the states (B, S, E) of ids (B, S), all of type 0. tanh: with the approximation of GELU."""
    weights = model.tensors
    words = weights["embeddings.word_embeddings.weight"]
    hidden = _norm(model, words[ids] + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    place = torch.arange(ids.shape[1])
    distance = (place[:, None] - place[None, :]).abs().to(words.dtype)
    bias = -torch.tensor(slopes(model.heads), dtype=words.dtype)[:, None, None] * distance  # (H, S, S)
    scores = bias + torch.where(mask.bool(), 0.0, -torch.inf).to(words.dtype)[:, None, None, :]  # (B, H, S, S)
    for layer in range(model.layers):
        name = f"encoder.layer.{layer}."
        mixed = _linear(model, _attend(model, hidden, scores, name), f"{name}attention.output.dense")
        hidden = _norm(model, mixed + hidden, f"{name}attention.output.LayerNorm")
        gate, value = (hidden @ weights[f"{name}mlp.gated_layers.weight"].T).chunk(2, dim=-1)
        gated = F.gelu(gate, approximate="tanh" if tanh else "none") * value
        hidden = _norm(model, _linear(model, gated, f"{name}mlp.wo") + hidden, f"{name}mlp.layernorm")
    return hidden


def _attend(model: JinaBert, hidden: Tensor, scores: Tensor, name: str) -> Tensor:
    batch, length, width = hidden.shape
    query, key, value = (
        _linear(model, hidden, f"{name}attention.self.{part}").view(batch, length, model.heads, -1).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    scaled = query @ key.transpose(2, 3) / math.sqrt(width // model.heads)  # (B, H, S, S)
    return ((scaled + scores).softmax(dim=-1) @ value).transpose(1, 2).reshape(batch, length, width)


def _linear(model: JinaBert, x: Tensor, name: str) -> Tensor:
    return x @ model.tensors[f"{name}.weight"].T + model.tensors[f"{name}.bias"]


def _norm(model: JinaBert, x: Tensor, name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], model.tensors[f"{name}.weight"], model.tensors[f"{name}.bias"], model.eps)


def embed(model: JinaBert, ids: list[list[int]]) -> np.ndarray:
    """Average the states of each text alone: (N, E)."""
    rows = [encode(model, torch.tensor([text]), torch.ones(1, len(text))).mean(dim=1)[0] for text in ids]
    return torch.stack(rows).numpy()
