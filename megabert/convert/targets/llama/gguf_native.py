"""Compute embeddings with the BERT or ModernBERT in a GGUF file by transformers' own class, in place of llama.cpp."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import BertConfig, BertModel, ModernBertConfig, ModernBertModel, PreTrainedModel

from megabert.convert.targets.target import DiffersError

# The modules' names in transformers, by llama.cpp's architecture and names. {} is the layer.
TENSOR_NAMES = {
    "bert": {
        "token_embd": "embeddings.word_embeddings",
        "position_embd": "embeddings.position_embeddings",
        "token_types": "embeddings.token_type_embeddings",
        "token_embd_norm": "embeddings.LayerNorm",
        "blk.{}.attn_q": "encoder.layer.{}.attention.self.query",
        "blk.{}.attn_k": "encoder.layer.{}.attention.self.key",
        "blk.{}.attn_v": "encoder.layer.{}.attention.self.value",
        "blk.{}.attn_output": "encoder.layer.{}.attention.output.dense",
        "blk.{}.attn_output_norm": "encoder.layer.{}.attention.output.LayerNorm",
        "blk.{}.ffn_up": "encoder.layer.{}.intermediate.dense",
        "blk.{}.ffn_down": "encoder.layer.{}.output.dense",
        "blk.{}.layer_output_norm": "encoder.layer.{}.output.LayerNorm",
    },
    "modern-bert": {
        "token_embd": "embeddings.tok_embeddings",
        "token_embd_norm": "embeddings.norm",
        "blk.{}.attn_norm": "layers.{}.attn_norm",
        "blk.{}.attn_qkv": "layers.{}.attn.Wqkv",
        "blk.{}.attn_output": "layers.{}.attn.Wo",
        "blk.{}.ffn_norm": "layers.{}.mlp_norm",
        "blk.{}.ffn_up": "layers.{}.mlp.Wi",
        "blk.{}.ffn_down": "layers.{}.mlp.Wo",
        "output_norm": "final_norm",
    },
}


class Settings(dict[str, Any]):
    """The settings of a file. Raises DiffersError for one that it lacks."""

    def __missing__(self, name: str) -> Any:
        raise DiffersError(f"the file lacks the setting {name}")


class Content(NamedTuple):
    """What a GGUF file holds. settings: without the architecture's name in front; tensors: fp64, by GGUF's names."""

    architecture: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]


def embed(content: Content, ids: list[list[int]]) -> np.ndarray:
    """Return the mean of each text's states, (N, E) fp32. Raises DiffersError for missing or extra tensors."""
    model = _make_model(content)
    renamed = {_rename(name, content.architecture): tensor for name, tensor in content.tensors.items()}
    shapes = {name: tensor.shape for name, tensor in renamed.items()}
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    if wrong := {name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name)}:
        raise DiffersError(f"the file's tensors are not those of the model: {sorted(wrong)[0]}")
    model.load_state_dict(renamed, strict=False, assign=True)
    with torch.no_grad():
        rows = [model(torch.tensor([row])).last_hidden_state[0].mean(dim=0) for row in ids]
    return torch.stack(rows).float().numpy()


def _rename(name: str, architecture: str) -> str:
    module, _, part = name.rpartition(".")
    layer = module.split(".")[1] if module.startswith("blk.") else ""
    general = module.replace(f"blk.{layer}.", "blk.{}.")
    return f"{TENSOR_NAMES[architecture].get(general, general)}.{part}".replace("{}", layer)


def sizes_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sizes of a model that the file's settings give, by transformers' names."""
    return {
        "vocab_size": len(settings["tokenizer.ggml.tokens"]),
        "hidden_size": settings["embedding_length"],
        "num_hidden_layers": settings["block_count"],
        "num_attention_heads": settings["attention.head_count"],
        "intermediate_size": settings["feed_forward_length"],
        "max_position_embeddings": settings["context_length"],
    }


def _make_model(content: Content) -> PreTrainedModel:
    """Make the model that the file's settings describe, in fp64, without weights."""
    settings = content.settings
    sizes = sizes_of(settings) | {"pad_token_id": None}
    epsilon = settings["attention.layer_norm_epsilon"]
    if content.architecture == "bert":
        config = BertConfig(
            **sizes, layer_norm_eps=epsilon, type_vocab_size=settings["tokenizer.ggml.token_type_count"]
        )
        return BertModel(config, add_pooling_layer=False).double().eval()
    layers, every = settings["block_count"], settings.get("attention.sliding_window_pattern", 1)
    thetas = {"full_attention": settings["rope.freq_base"]}
    thetas["sliding_attention"] = settings.get("rope.freq_base_swa", settings["rope.freq_base"])
    special: dict[str, Any] = dict.fromkeys(f"{role}_token_id" for role in ("bos", "eos", "cls", "sep"))
    positions: dict[str, Any] = {
        "layer_types": ["sliding_attention" if layer % every else "full_attention" for layer in range(layers)],
        "local_attention": settings.get("attention.sliding_window", 128),
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
    }
    config = ModernBertConfig(**sizes, **special, **positions, norm_eps=epsilon)
    return ModernBertModel(config).double().eval()
