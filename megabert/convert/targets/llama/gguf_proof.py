"""Check that a model fits GGUF, and compare llama.cpp's output with the checkpoint's."""

import unicodedata
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megabert.convert.hf.native import describe_layers, has_bert_layers, is_mosaicbert, native_kind
from megabert.convert.targets import jina_port
from megabert.convert.targets.compared_texts import lines_with_ids
from megabert.convert.targets.llama import gguf_native
from megabert.convert.targets.llama.gguf_vocabulary import check_vocabulary, composes
from megabert.convert.targets.llama.gguf_writer import BLOCK, JINA, KINDS, gguf_names, path_of, write
from megabert.convert.targets.programs.run import run_python
from megabert.convert.targets.target import DiffersError, Expected, Proof, Target, largest_difference, smallest_cosine
from megabert.data.shards.manifest import TOKENIZER, TOKENIZER_CONFIG
from megabert.files.json_file import read_json
from megabert.model.configuration_megabert import MegaBertConfig

# The smallest cosine of llama.cpp's embeddings that is accepted of each file.
COSINES = {"f32": 0.9999, "f16": 0.999, "q8_0": 0.99}
# llama.cpp looks GELU up in a table of fp16, which changes embeddings by up to 3e-4 of the largest value.
LLAMA_TOLERANCE = 2e-3
# The largest error that rounding makes, relative to a tensor's largest value: half a step of fp16, one of 127 steps.
ROUNDING = {"f16": 2**-11, "q8_0": 1 / 127}
# The embeddings of this many texts are compared. They are few because the port computes in fp64.
COMPARED_TEXTS = 200
TOLERANCE = 1e-5
# llama.cpp's graph for embeddings is made for this many texts at once, and fails for a context that is no multiple.
CONTEXT = 256
# LLAMA_POOLING_TYPE_MEAN in llama.h.
MEAN = 1
USAGE = """from llama_cpp import Llama  # for texts of more than 512 tokens, multiples of 256 in place of 512
model = Llama("this folder/gguf/model-q8_0.gguf", embedding=True, n_ctx=512, n_batch=512, n_ubatch=512)
vector = model.embed("a text")"""


def check(config: MegaBertConfig, tokenizer: dict[str, Any], max_length: int) -> list[str]:
    if not (has_bert_layers(config) or is_mosaicbert(config) or native_kind(config) == "modernbert"):
        types = "" if config.token_types else "no token types and "
        raise ValueError(
            f"--for gguf: llama.cpp computes MosaicBERT, BERT with its like, and ModernBERT, and this model has {types}"
            f"{describe_layers(config)}. Leave gguf out."
        )
    notes = ["it has the encoder only; llama.cpp computes GELU in half precision", *check_vocabulary(tokenizer)]
    if config.hidden_size % BLOCK or config.intermediate_size % BLOCK:
        notes.append(f"rows whose length is no multiple of {BLOCK} stay in fp16 in the q8_0 file")
    return notes


def prove(folder: Path, expected: Expected) -> Proof:
    """Compare what the files hold, and what llama.cpp computes with them, with the checkpoint.

    The first shows smaller errors than llama.cpp's own rounding, the second that llama.cpp reads the files so.
    """
    exact = read_content(path_of(folder, "f32"))
    proof = _prove_by_port(exact, expected, int(read_json(folder / TOKENIZER_CONFIG)["model_max_length"]))
    for kind, tolerance in ROUNDING.items():
        _check_rounding(exact, read_content(path_of(folder, kind)), tolerance, path_of(folder, kind).name)
    if find_spec("llama_cpp") is None:
        return proof
    return _prove_by_llama_cpp(folder, expected, proof)


def _prove_by_port(content: gguf_native.Content, expected: Expected, length: int) -> Proof:
    """Compare embeddings, and the settings that the port does not read: those that no tensor's shape shows."""
    settings = {"pooling_type": MEAN, "attention.causal": False, "context_length": length}
    for name, value in settings.items():
        if (got := content.settings[name]) != value:
            raise DiffersError(f"{name} is {got}, expected {value}")
    ids = expected.ids[:COMPARED_TEXTS]
    what = f"embeddings of {len(ids)} texts by model-f32.gguf"
    if content.architecture in gguf_native.TENSOR_NAMES:
        pooled = gguf_native.embed(content, ids)
        program, version_found = "transformers' own model in fp64, not llama.cpp itself,", version("transformers")
    elif content.architecture != JINA:
        raise DiffersError(f"llama.cpp has no encoder {content.architecture!r} of ours")
    else:
        pooled = jina_port.embed(as_jina(content), ids)
        program, version_found = "an independent port of llama.cpp's equations in fp64, not llama.cpp itself,", "1"
    difference = largest_difference(pooled, expected.pooled[:COMPARED_TEXTS], TOLERANCE, what)
    note = "the ids were not compared: with the extra [serving], verifying the folder uses llama.cpp itself"
    return Proof(program, version_found, difference, what, (note,))


def _check_rounding(exact: gguf_native.Content, rounded: gguf_native.Content, tolerance: float, name: str) -> None:
    """Raise DiffersError unless settings are equal, and tensors but for rounding to fp16 or 8 bits."""
    ours, theirs = ({k: v for k, v in x.settings.items() if k != "general.file_type"} for x in (exact, rounded))
    if wrong := [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]:
        raise DiffersError(f"{name}: {min(wrong)} is not that of model-f32.gguf")
    if exact.tensors.keys() != rounded.tensors.keys():
        raise DiffersError(f"{name}: has other tensors than model-f32.gguf")
    for key, tensor in exact.tensors.items():
        error = (rounded.tensors[key] - tensor).abs().max()
        if not error <= tolerance * tensor.abs().max():
            raise DiffersError(
                f"{name}: {key} differs from that of model-f32.gguf by {error:.3g}, more than rounding does"
            )


def _prove_by_llama_cpp(folder: Path, expected: Expected, by_port: Proof) -> Proof:
    lines, ids = zip(*lines_with_ids(folder), strict=True)
    longest = max(len(row) for row in expected.ids)
    # A text that was cut has no end in common: llama.cpp cuts in another way.
    texts = [row for row, text in enumerate(expected.ids) if len(text) < longest]
    if composes(read_json(folder / TOKENIZER)):
        lines = tuple(unicodedata.normalize("NFC", line) for line in lines)
        texts = [row for row in texts if unicodedata.is_normalized("NFC", expected.texts[row])]
    asked = [expected.texts[row] for row in texts]
    context = -(-longest // CONTEXT) * CONTEXT
    least: list[float] = []
    version_found = ""
    for kind in KINDS:
        path = path_of(folder, kind)
        answer = run_python("open_llama_cpp.py", path, asked, lines=list(lines), context=context)
        version_found = answer.version
        if wrong := [row for row, row_ids in enumerate(ids) if answer.ids[row] != row_ids]:
            row = wrong[0]
            raise DiffersError(
                f"{path.name}: {len(wrong):,} of {len(ids):,} lines have other ids, such as {lines[row][:60]!r}: "
                f"{answer.ids[row][:12]}, expected {ids[row][:12]}"
            )
        what = f"embeddings of {len(texts):,} texts by {path.name}"
        pooled = np.load(answer.array)
        if kind == "f32":
            largest_difference(pooled, expected.pooled[texts], LLAMA_TOLERANCE, what)
        least.append(smallest_cosine(pooled, expected.pooled[texts], COSINES[kind], what))
    measure = f"1 - cosine of embeddings of {len(texts):,} texts in fp32; the ids of {len(ids):,} lines are equal"
    cosines = ", ".join(f"{kind}: smallest cosine {cosine:.6f}" for kind, cosine in zip(KINDS, least, strict=True))
    read_back = f"read back into {by_port.program.split(',')[0]}, the fp32 file differs by {by_port.difference:.1e}"
    return Proof("llama.cpp by llama-cpp-python", version_found, 1 - least[0], measure, (cosines, read_back))


def read_content(path: Path) -> gguf_native.Content:
    """Read a file back by the package gguf. Raises DiffersError if it is cut."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except (IndexError, ValueError) as error:
        raise DiffersError(f"{path.name} cannot be read: {error}") from error
    architecture = reader.fields["general.architecture"].contents()
    settings = gguf_native.Settings(
        {name.removeprefix(f"{architecture}."): value.contents() for name, value in reader.fields.items()}
    )
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).double()
        for tensor in reader.tensors
    }
    return gguf_native.Content(architecture, settings, tensors)


def as_jina(content: gguf_native.Content) -> jina_port.JinaBert:
    """Give the content the names of JinaBERT v2's layout. Raises DiffersError for tensors that do not fit."""
    settings = content.settings
    back = {new: theirs for theirs, new in gguf_names(settings["block_count"]).items()}
    renamed = {back.get(name, name): tensor for name, tensor in content.tensors.items()}
    sizes = gguf_native.sizes_of(settings) | {"type_vocab_size": settings["tokenizer.ggml.token_type_count"]}
    return jina_port.make_model(renamed, sizes, settings["attention.layer_norm_epsilon"])


TARGET = Target("gguf", check, write, prove, USAGE, packages=("gguf",), extra="gguf")
