"""Target gguf: the encoder for llama.cpp, as a BERT, ModernBERT or JinaBERT v2, in fp32, fp16 and 8 bits."""

import json
import unicodedata
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabert.convert.hf.native import is_mosaicbert, native_kind
from megabert.convert.targets import jina_port
from megabert.convert.targets.frame import (
    Differs,
    Expected,
    Proof,
    Source,
    Target,
    largest_difference,
    smallest_cosine,
)
from megabert.convert.targets.jina import to_jina
from megabert.convert.targets.llama import gguf_native
from megabert.convert.targets.llama.gguf_vocabulary import Vocabulary, check_vocabulary, composes, describe_vocabulary
from megabert.convert.targets.probe import lines_with_ids, make_lines
from megabert.convert.targets.programs.run import run_python
from megabert.data.shards.manifest import TOKENIZER
from megabert.model.configuration_megabert import MegaBertConfig

FOLDER = "gguf"
# The smallest cosine of an embedding that is accepted of each file.
FILES = {"f32": 0.9999, "f16": 0.999, "q8_0": 0.99}
# The embeddings of this many texts are compared. They are few because the port computes in fp64.
COMPARED_TEXTS = 200
# q8_0 quantizes this many numbers of a row together.
BLOCK = 32
TOLERANCE = 1e-5
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
# Architectures of ours that are llama.cpp's BERT.
BERTS = ("bert", "roberta")
# llama.cpp adds these tensors without converting them, so they stay in fp32.
ALWAYS_F32 = ("token_types.weight", POSITIONS)
USAGE = """from llama_cpp import LLAMA_POOLING_TYPE_MEAN, Llama
model = Llama("this folder/gguf/model-q8_0.gguf", embedding=True, pooling_type=LLAMA_POOLING_TYPE_MEAN)
vector = model.embed("a text")"""


def check(config: MegaBertConfig, tokenizer: dict[str, Any], max_length: int) -> list[str]:
    if native_kind(config) not in (*BERTS, "modernbert") and not is_mosaicbert(config):
        types = "" if config.token_types else "no token types and "
        raise ValueError(
            f"--for gguf: llama.cpp computes MosaicBERT, BERT, RoBERTa and ModernBERT, and this model has {types}"
            f"{config.position}, {config.ffn} and {config.norm_position}-norm layers. Leave gguf out."
        )
    notes = ["it has the encoder only; llama.cpp computes GELU in half precision", *check_vocabulary(tokenizer)]
    if config.hidden_size % BLOCK or config.intermediate_size % BLOCK:
        notes.append(f"rows whose length is no multiple of {BLOCK} stay in fp16 in the q8_0 file")
    return notes


def to_gguf(source: Source) -> dict[str, Tensor]:
    """Rename the encoder's weights."""
    config, weights = source.config, source.weights
    if native_kind(config) == "modernbert":
        names = modernbert_names(config.num_hidden_layers)
        # GGUF has no place for the head.
        return {names[name]: tensor for name, tensor in weights.items() if name in names}
    if native_kind(config) in BERTS:
        biases = {name: weights[name] for name in weights if name.endswith("mlp.up.bias")}
        renamed = {f"blk.{name.split('.')[3]}.ffn_up.bias": bias for name, bias in biases.items()}
        # llama.cpp's positions begin with the first token's, and there are as many as its context has tokens.
        table = weights["bert.embeddings.position_embeddings.weight"]
        renamed[POSITIONS] = table[config.position_offset :][: source.max_length]
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


def write(source: Source, folder: Path) -> str:
    (folder / FOLDER).mkdir()
    vocabulary = describe_vocabulary(source.tokenizer, source.config.vocab_size, make_lines(folder)[::10])
    tensors = to_gguf(source)
    for kind in FILES:
        _write_file(source, tensors, vocabulary, folder, kind)
    return f"gguf {version('gguf')}"


def _write_file(source: Source, tensors: dict[str, Tensor], vocabulary: Vocabulary, folder: Path, kind: str) -> None:
    import gguf

    config = source.config
    path = folder / FOLDER / f"model-{kind}.gguf"
    architecture, name = _architecture(config)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name(name)
    # The numbers are those of llama_ftype in llama.h.
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(source.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    if config.token_types:
        writer.add_token_type_count(config.type_vocab_size)
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
    names = {"bert": ("bert", "BERT"), "roberta": ("bert", "RoBERTa"), "modernbert": ("modern-bert", "ModernBERT")}
    return names.get(native_kind(config) or "", ("jina-bert-v2", "MosaicBERT"))


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


def prove(folder: Path, expected: Expected) -> Proof:
    """Compare embeddings and ids with llama.cpp's; where it is missing, read a file back and let the port compute."""
    if find_spec("llama_cpp") is not None:
        return _prove_by_llama_cpp(folder, expected)
    path = folder / FOLDER / "model-f32.gguf"
    texts = range(COMPARED_TEXTS)
    ids = [expected.ids[row] for row in texts]
    content = read_content(path)
    what = f"embeddings of {COMPARED_TEXTS} texts by {path.name}"
    if content.architecture in gguf_native.TENSOR_NAMES:
        pooled = gguf_native.embed(content, ids)
        program, version_found = "transformers' own model in fp64, not llama.cpp itself,", version("transformers")
    else:
        pooled = jina_port.embed(as_jina(content), ids)
        program, version_found = "an independent port of llama.cpp's equations in fp64, not llama.cpp itself,", "1"
    difference = largest_difference(pooled, expected.pooled[texts], TOLERANCE, what)
    note = "the ids were not compared: with the extra [serving], verifying the folder uses llama.cpp itself"
    return Proof(program, version_found, difference, what, (note,))


def _prove_by_llama_cpp(folder: Path, expected: Expected) -> Proof:
    lines, ids = zip(*lines_with_ids(folder), strict=True)
    longest = max(len(row) for row in expected.ids)
    # A text that was cut has no end in common: llama.cpp cuts in another way.
    texts = [row for row, text in enumerate(expected.ids) if len(text) < longest]
    if composes(json.loads((folder / TOKENIZER).read_text(encoding="utf-8"))):
        lines = tuple(unicodedata.normalize("NFC", line) for line in lines)
        texts = [row for row in texts if unicodedata.is_normalized("NFC", expected.texts[row])]
    least = []
    version_found = ""
    for kind, wanted in FILES.items():
        path = folder / FOLDER / f"model-{kind}.gguf"
        answer = run_python("open_llama_cpp.py", path, [expected.texts[row] for row in texts], lines=list(lines))
        version_found = answer.version
        if wrong := [row for row, row_ids in enumerate(ids) if answer.ids[row] != row_ids]:
            row = wrong[0]
            raise Differs(
                f"{path.name}: {len(wrong):,} of {len(ids):,} lines have other ids, such as {lines[row][:60]!r}: "
                f"{answer.ids[row][:12]}, expected {ids[row][:12]}"
            )
        what = f"embeddings of {len(texts):,} texts by {path.name}"
        least.append(smallest_cosine(np.load(answer.array), expected.pooled[texts], wanted, what))
    measure = f"1 - cosine of embeddings of {len(texts):,} texts in fp32; the ids of {len(ids):,} lines are equal"
    note = ", ".join(f"{kind}: smallest cosine {cosine:.6f}" for kind, cosine in zip(FILES, least, strict=True))
    return Proof("llama.cpp by llama-cpp-python", version_found, 1 - least[0], measure, (note,))


def read_content(path: Path) -> gguf_native.Content:
    """Read a file back by the package gguf."""
    import gguf

    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    settings = {name.removeprefix(f"{architecture}."): value.contents() for name, value in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).double()
        for tensor in reader.tensors
    }
    return gguf_native.Content(architecture, settings, tensors)


def as_jina(content: gguf_native.Content) -> jina_port.JinaBert:
    """Give the content the names of JinaBERT v2's layout. Raises Differs for missing tensors."""
    settings = content.settings
    back = {new: theirs for theirs, new in gguf_names(settings["block_count"]).items()}
    renamed = {back.get(name, name): tensor for name, tensor in content.tensors.items()}
    sizes = (settings["block_count"], settings["attention.head_count"], settings["attention.layer_norm_epsilon"])
    return jina_port.JinaBert(renamed, *sizes, settings["context_length"])


TARGET = Target("gguf", check, write, prove, USAGE, packages=("gguf",), extra="gguf")
