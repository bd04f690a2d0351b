"""Write the encoder as GGUF files for llama.cpp, as a BERT, ModernBERT or JinaBERT v2, in fp32, fp16 and 8 bits."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabert.convert.hf.model_card import ARCHITECTURES
from megabert.convert.hf.native import has_bert_layers, is_mosaicbert, native_kind
from megabert.convert.targets.compared_texts import make_lines
from megabert.convert.targets.jina import to_jina
from megabert.convert.targets.llama.gguf_vocabulary import Vocabulary, describe_vocabulary
from megabert.convert.targets.target import ExportedFolder
from megabert.convert.weight_names import TOKEN_TYPES as TOKEN_TYPE_EMBEDDINGS
from megabert.model.configuration_megabert import MegaBertConfig

FOLDER = "gguf"
# llama.cpp's name of the architecture that MosaicBERT is.
JINA = "jina-bert-v2"
# Each file's kind, and its number in llama_ftype in llama.h.
KINDS = {"f32": 0, "f16": 1, "q8_0": 7}
# q8_0 quantizes this many numbers of a row together.
BLOCK = 32
# The names of JinaBERT v2's modules, to GGUF's.
TENSOR_NAMES = {
    "embeddings.word_embeddings": "token_embd",
    "embeddings.token_type_embeddings": "token_types",
    "embeddings.LayerNorm": "token_embd_norm",
}
LAYER_NAMES = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "mlp.gated_layers": "ffn_up",
    "mlp.wo": "ffn_down",
    "mlp.layernorm": "layer_output_norm",
}
# Our names of ModernBERT's modules, to GGUF's.
MODERNBERT_NAMES = {
    "bert.embeddings.word_embeddings": "token_embd",
    "bert.embeddings.norm": "token_embd_norm",
    "bert.encoder.final_norm": "output_norm",
}
MODERNBERT_LAYER_NAMES = {
    "attention_norm": "attn_norm",
    "attention.qkv": "attn_qkv",
    "attention.out": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
POSITIONS = "position_embd.weight"
TOKEN_TYPES = "token_types.weight"
# llama.cpp adds these tensors without converting them, so they stay in fp32.
ALWAYS_F32 = (TOKEN_TYPES, POSITIONS)


def to_gguf(exported: ExportedFolder) -> dict[str, Tensor]:
    """Rename the encoder's weights."""
    config, weights = exported.config, exported.weights
    if native_kind(config) == "modernbert":
        names = modernbert_names(config.num_hidden_layers)
        # GGUF has no place for the head.
        return {names[name]: tensor for name, tensor in weights.items() if name in names}
    if has_bert_layers(config):
        biases = {name: weights[name] for name in weights if name.endswith("mlp.up.bias")}
        renamed = {f"blk.{name.split('.')[3]}.ffn_up.bias": bias for name, bias in biases.items()}
        # llama.cpp's positions begin with the first token's, and there are as many as its context has tokens.
        table = weights["bert.embeddings.position_embeddings.weight"]
        renamed[POSITIONS] = table[config.position_offset :][: exported.max_length]
        if not config.token_types:
            # llama.cpp adds the first of them to every token.
            weights = weights | {TOKEN_TYPE_EMBEDDINGS: torch.zeros(1, config.hidden_size)}
    else:
        renamed = {}
    names = gguf_names(config.num_hidden_layers)
    return renamed | {names[name]: tensor for name, tensor in to_jina(weights, config.num_hidden_layers).items()}


def gguf_names(num_layers: int) -> dict[str, str]:
    """Map the name of each tensor of JinaBERT v2's layout to GGUF's."""
    modules = dict(TENSOR_NAMES)
    for layer in range(num_layers):
        modules |= {f"encoder.layer.{layer}.{theirs}": f"blk.{layer}.{new}" for theirs, new in LAYER_NAMES.items()}
    return {f"{theirs}.{part}": f"{new}.{part}" for theirs, new in modules.items() for part in ("weight", "bias")}


def modernbert_names(num_layers: int) -> dict[str, str]:
    """Map our name of each tensor of a ModernBERT's encoder to GGUF's."""
    modules = dict(MODERNBERT_NAMES)
    for layer in range(num_layers):
        modules |= {
            f"bert.encoder.layers.{layer}.{ours}": f"blk.{layer}.{new}" for ours, new in MODERNBERT_LAYER_NAMES.items()
        }
    return {f"{ours}.weight": f"{new}.weight" for ours, new in modules.items()}


def write(exported: ExportedFolder, folder: Path) -> str:
    (folder / FOLDER).mkdir()
    vocabulary = describe_vocabulary(exported.tokenizer, exported.config.vocab_size, make_lines(folder)[::10])
    tensors = to_gguf(exported)
    for kind in KINDS:
        _write_file(exported, tensors, vocabulary, folder, kind)
    return f"gguf {version('gguf')}"


def path_of(folder: Path, kind: str) -> Path:
    return folder / FOLDER / f"model-{kind}.gguf"


def _write_file(
    exported: ExportedFolder, tensors: dict[str, Tensor], vocabulary: Vocabulary, folder: Path, kind: str
) -> None:
    import gguf

    config = exported.config
    architecture, name = _architecture(config)
    writer = gguf.GGUFWriter(path_of(folder, kind), architecture)
    writer.add_name(name)
    writer.add_file_type(KINDS[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(exported.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    if TOKEN_TYPES in tensors:
        writer.add_token_type_count(len(tensors[TOKEN_TYPES]))
    if config.position == "rope":
        _add_positions(writer, config)
    _add_vocabulary(writer, vocabulary)
    for name, tensor in tensors.items():
        data, stored = _quantize(name, tensor.contiguous().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _architecture(config: MegaBertConfig) -> tuple[str, str]:
    """Return llama.cpp's name of the architecture, and the model's."""
    if is_mosaicbert(config):
        return JINA, "MosaicBERT"
    kind = native_kind(config)
    return ("modern-bert" if kind == "modernbert" else "bert"), ARCHITECTURES.get(kind or "bert", "BERT")


def _add_positions(writer: Any, config: MegaBertConfig) -> None:
    """Add RoPE's thetas and the window: llama.cpp's layers 0, k, 2k... are global, too."""
    writer.add_rope_freq_base(config.rope_theta)
    if config.local_attention_window is not None:
        writer.add_rope_freq_base_swa(config.local_rope_theta or config.rope_theta)
        writer.add_sliding_window(config.local_attention_window)
        writer.add_sliding_window_pattern(config.global_attention_every)


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.splits)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.charsmap:
        writer.add_precompiled_charsmap(vocabulary.charsmap)
    for name, value in vocabulary.settings.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    roles = {"bos": "cls", "eos": "sep", "unknown": "unk", "seperator": "sep", "padding": "pad", "cls": "cls"}
    for name, role in (roles | {"mask": "mask"}).items():
        if role in vocabulary.specials:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", vocabulary.specials[role])


def _quantize(name: str, tensor: np.ndarray, kind: str) -> tuple[np.ndarray, Any]:
    import gguf

    types = gguf.GGMLQuantizationType
    if kind == "f32" or tensor.ndim == 1 or name in ALWAYS_F32:
        return tensor, types.F32
    stored = types.Q8_0 if kind == "q8_0" and tensor.shape[-1] % BLOCK == 0 else types.F16
    return gguf.quants.quantize(tensor, stored), stored
