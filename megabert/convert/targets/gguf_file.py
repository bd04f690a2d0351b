"""Target gguf: the encoder for llama.cpp, as a BERT or a JinaBERT v2, in fp32, in fp16 and with 8-bit weights."""

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
    NotOpened,
    Proof,
    Source,
    Target,
    largest_difference,
    smallest_cosine,
)
from megabert.convert.targets.gguf_vocabulary import check_vocabulary, describe_vocabulary
from megabert.convert.targets.jina import to_jina
from megabert.convert.targets.probe import lines_with_ids, make_lines
from megabert.convert.targets.programs.run import run_python
from megabert.model.configuration_megabert import MegaBertConfig

FOLDER = "gguf"
# The smallest cosine of an embedding that is accepted of each file.
FILES = {"f32": 0.9999, "f16": 0.999, "q8_0": 0.99}
PROVEN = 200  # texts for the port, which computes in fp64
BLOCK = 32  # of q8_0, along a row
TOLERANCE = 1e-5
# The names of JinaBERT v2's modules, to GGUF's.
NAMES = {
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
POSITIONS = "position_embd.weight"
ALWAYS_F32 = ("token_types.weight", POSITIONS)  # llama.cpp adds these as they are
USE = """from llama_cpp import LLAMA_POOLING_TYPE_MEAN, Llama
model = Llama("this folder/gguf/model-q8_0.gguf", embedding=True, pooling_type=LLAMA_POOLING_TYPE_MEAN)
vector = model.embed("a text")"""


def check(config: MegaBertConfig, tokenizer: dict[str, Any], max_length: int) -> list[str]:
    if native_kind(config) != "bert" and not is_mosaicbert(config):
        raise ValueError(
            f"--for gguf: only MosaicBERT and BERT are written, and this model has {config.position}, {config.ffn} and "
            f"{config.norm_position}-norm layers. Leave gguf out."
        )
    check_vocabulary(tokenizer)
    notes = ["it has the encoder only; llama.cpp computes GELU in half precision"]
    if config.hidden_size % BLOCK or config.intermediate_size % BLOCK:
        notes.append(f"rows whose length is no multiple of {BLOCK} stay in fp16 in the q8_0 file")
    return notes


def to_gguf(source: Source) -> dict[str, Tensor]:
    """Rename the encoder's weights."""
    config, weights = source.config, source.weights
    if native_kind(config) == "bert":
        biases = {name: weights[name] for name in weights if name.endswith("mlp.up.bias")}
        renamed = {f"blk.{name.split('.')[3]}.ffn_up.bias": bias for name, bias in biases.items()}
        renamed[POSITIONS] = weights["bert.embeddings.position_embeddings.weight"]
    else:
        renamed = {}
    names = gguf_names(config.num_hidden_layers)
    return renamed | {names[name]: tensor for name, tensor in to_jina(weights, config.num_hidden_layers).items()}


def gguf_names(num_layers: int) -> dict[str, str]:
    """Map the name of each tensor of JinaBERT v2's layout to GGUF's."""
    modules = dict(NAMES)
    for layer in range(num_layers):
        modules |= {f"encoder.layer.{layer}.{theirs}": f"blk.{layer}.{new}" for theirs, new in LAYER_NAMES.items()}
    return {f"{theirs}.{part}": f"{new}.{part}" for theirs, new in modules.items() for part in ("weight", "bias")}


def write(source: Source, folder: Path) -> str:
    (folder / FOLDER).mkdir()
    tensors = to_gguf(source)
    for kind in FILES:
        _write_file(source, tensors, folder, kind)
    return f"gguf {version('gguf')}"


def _write_file(source: Source, tensors: dict[str, Tensor], folder: Path, kind: str) -> None:
    import gguf

    config = source.config
    bert = native_kind(config) == "bert"
    path = folder / FOLDER / f"model-{kind}.gguf"
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_architecture(config)])
    writer.add_name("BERT" if bert else "MosaicBERT")
    writer.add_file_type({"f32": 0, "f16": 1, "q8_0": 7}[kind])  # llama_ftype in llama.h
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(source.max_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(config.type_vocab_size)
    _add_vocabulary(writer, source, folder)
    for name, tensor in tensors.items():
        data, stored = _quantize(name, tensor.contiguous().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _architecture(config: MegaBertConfig) -> Any:
    import gguf

    return gguf.MODEL_ARCH.BERT if native_kind(config) == "bert" else gguf.MODEL_ARCH.JINA_BERT_V2


def _add_vocabulary(writer: Any, source: Source, folder: Path) -> None:
    lines = make_lines(folder)[::10]
    vocabulary = describe_vocabulary(source.tokenizer, source.config.vocab_size, lines)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
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


def prove(folder: Path, expected: Expected) -> Proof | NotOpened:
    """Compare embeddings and ids with llama.cpp's; where it is missing, read a file back and let the port compute."""
    if find_spec("llama_cpp") is not None:
        return _prove_by_llama_cpp(folder, expected)
    path = folder / FOLDER / "model-f32.gguf"
    model = read_file(path)
    if POSITIONS in model.tensors:
        return NotOpened("llama-cpp-python: pip install 'megabert[serving]'")
    texts = range(PROVEN)
    what = f"embeddings of {PROVEN} texts by {path.name}"
    pooled = jina_port.embed(model, [expected.ids[row] for row in texts])
    difference = largest_difference(pooled, expected.pooled[texts], TOLERANCE, what)
    note = "the ids were not compared: with the extra [serving], verifying the folder uses llama.cpp itself"
    program = "an independent port of llama.cpp's equations in fp64, not llama.cpp itself,"
    return Proof(program, "1", difference, what, (note,))


def _prove_by_llama_cpp(folder: Path, expected: Expected) -> Proof:
    lines, ids = zip(*lines_with_ids(folder), strict=True)
    longest = max(len(row) for row in expected.ids)
    # A text that was cut has no end in common: llama.cpp cuts in another way.
    texts = [row for row, text in enumerate(expected.ids) if len(text) < longest]
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


def read_file(path: Path) -> jina_port.JinaBert:
    """Read a file back by the package gguf, with the names of JinaBERT v2's layout. Raises Differs for missing tensors.

    A BERT's own tensors, which that layout lacks, keep their names.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    field = {name.partition(".")[2]: value.contents() for name, value in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).double()
        for tensor in reader.tensors
    }
    back = {new: theirs for theirs, new in gguf_names(field["block_count"]).items()}
    renamed = {back.get(name, name): tensor for name, tensor in tensors.items()}
    sizes = (field["block_count"], field["attention.head_count"], field["attention.layer_norm_epsilon"])
    return jina_port.JinaBert(renamed, *sizes, field["context_length"])


TARGET = Target("gguf", check, write, prove, USE, packages=("gguf",), extra="gguf")
