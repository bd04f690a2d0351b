"""Compute JinaBERT v2's encoder with the equations that servers use, and with no code of megabert/model.

Source: https://github.com/huggingface/text-embeddings-inference, backends/candle/src/models/jina.rs, and
https://github.com/ggml-org/llama.cpp, src/models/jina-bert-v2.cpp, whose equations are the same.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from megabert.files.json_file import read_json


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
    config = read_json(folder / "config.json")
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    sizes = (config["num_hidden_layers"], config["num_attention_heads"], config["layer_norm_eps"])
    return JinaBert(tensors, *sizes, config["max_position_embeddings"])


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
