"""Write the target jina for TEI's own engine: MosaicBERT in the layout of JinaBERT v2, whose equations are the same."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megabert.convert.hf.native import describe_layers, is_mosaicbert, native_kind
from megabert.convert.hf.reader import CONFIG, SAFETENSORS
from megabert.convert.hf.writer import save_tensors
from megabert.convert.targets import jina_port, sentence_transformers
from megabert.convert.targets.compared_texts import check_ids
from megabert.convert.targets.target import DiffersError, Expected, ExportedFolder, Proof, Target, largest_difference
from megabert.data.shards.manifest import TOKENIZER, TOKENIZER_CONFIG
from megabert.files.json_file import read_json, write_json
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.version import __version__

FOLDER = "jina"
# TEI makes a table of heads x length x length in fp32: 200 MB for 12 heads and this length.
LONGEST = 2048
# The embeddings of this many texts are compared. They are few because the port computes in fp64.
COMPARED_TEXTS = 200
TOLERANCE = 1e-5
LAYER = {
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.down": "mlp.wo",
    "mlp_norm": "mlp.layernorm",
}
USAGE = """docker run -p 8080:80 -v "$PWD/this folder":/data ghcr.io/huggingface/text-embeddings-inference:cpu-1.8 \\
    --model-id /data/jina
curl 127.0.0.1:8080/embed -H 'Content-Type: application/json' -d '{"inputs": "a text"}'"""


def check(config: MegaBertConfig, tokenizer: dict[str, Any], max_length: int) -> list[str]:
    if not is_mosaicbert(config):
        raise ValueError(
            f"--for jina: the model has {describe_layers(config)}, but "
            "the layout is MosaicBERT's: alibi, geglu and post-norm. "
            f"Leave jina out{', and write this model with --for encoder' if native_kind(config) else ''}."
        )
    notes = ["it has the encoder only, and is for TEI; transformers and vLLM do not know the layout and refuse it"]
    if max_length > LONGEST:
        notes.append(f"TEI holds a table of heads x length x length, so there texts are cut at {LONGEST:,} tokens")
    return notes


def to_jina(weights: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Rename the encoder's weights, and split the fused query, key and value."""
    theirs = {
        f"embeddings.{name}.weight": weights[f"bert.embeddings.{name}.weight"]
        for name in ("word_embeddings", "token_type_embeddings")
    }
    for part in ("weight", "bias"):
        theirs[f"embeddings.LayerNorm.{part}"] = weights[f"bert.embeddings.norm.{part}"]
    for layer in range(num_layers):
        a, b = f"bert.encoder.layers.{layer}.", f"encoder.layer.{layer}."
        for part in ("weight", "bias"):
            split = weights[f"{a}attention.qkv.{part}"].chunk(3)
            for name, tensor in zip(("query", "key", "value"), split, strict=True):
                theirs[f"{b}attention.self.{name}.{part}"] = tensor
            theirs |= {f"{b}{new}.{part}": weights[f"{a}{old}.{part}"] for old, new in LAYER.items()}
        theirs[f"{b}mlp.gated_layers.weight"] = weights[f"{a}mlp.up.weight"]
    return theirs


def make_config(config: MegaBertConfig, length: int) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "type_vocab_size", "pad_token_id", "layer_norm_eps", "hidden_dropout_prob",
             "attention_probs_dropout_prob", "initializer_range")  # fmt: skip
    return (
        jina_port.SETTINGS
        | {
            "architectures": ["JinaBertModel"],
            "emb_pooler": "mean",
            "torch_dtype": "float32",
            "max_position_embeddings": length,
        }
        | {name: getattr(config, name) for name in names}
    )


def write(exported: ExportedFolder, folder: Path) -> str:
    out, length = folder / FOLDER, min(exported.max_length, LONGEST)
    out.mkdir()
    write_json(out / CONFIG, make_config(exported.config, length))
    tensors = to_jina(exported.weights, exported.config.num_hidden_layers)
    tensors[jina_port.GUARD] = torch.zeros(1, exported.config.hidden_size)
    save_tensors({name: tensor.contiguous() for name, tensor in tensors.items()}, out / SAFETENSORS)
    shutil.copymode(out / CONFIG, out / SAFETENSORS)
    shutil.copyfile(folder / TOKENIZER, out / TOKENIZER)
    settings = read_json(folder / TOKENIZER_CONFIG) | {"model_max_length": length}
    write_json(out / TOKENIZER_CONFIG, settings)
    sentence_transformers.write(exported._replace(max_length=length), out)
    return f"megabert {__version__}"


def prove(folder: Path, expected: Expected) -> Proof:
    """Compare the states of the export check's texts, and embeddings of some texts, with those of the port in fp64."""
    out = folder / FOLDER
    model = jina_port.read_folder(out)
    length = min(int(read_json(folder / TOKENIZER_CONFIG)["model_max_length"]), LONGEST)
    if model.max_length != length:
        raise DiffersError(f"max_position_embeddings is {model.max_length}, expected {length}")
    check_ids(out, expected, length)
    sentence_transformers.check_server_files(out, length)
    texts = [row for row in range(COMPARED_TEXTS) if len(expected.ids[row]) <= model.max_length]
    pooled = jina_port.embed(model, [expected.ids[row] for row in texts])
    embeddings = f"embeddings of {len(texts)} texts"
    ids, mask = (torch.from_numpy(expected.inputs[name]) for name in ("input_ids", "attention_mask"))
    real = mask.bool()
    differences = [largest_difference(pooled, expected.pooled[texts], TOLERANCE, embeddings)]
    states = jina_port.encode(model, ids, mask)[real].numpy()
    differences.append(largest_difference(states, expected.states, TOLERANCE, "states"))
    approximate = jina_port.encode(model.to(torch.float32), ids, mask, tanh=True)[real].numpy()
    change = np.abs(approximate - states).max()
    note = f"TEI computes in fp32 with GELU's tanh approximation, which changes states by up to {change:.1e}"
    what = f"states and {embeddings}"
    return Proof(
        "an independent port of TEI's equations in fp64, not TEI itself,", "1", max(differences), what, (note,)
    )


TARGET = Target("jina", check, write, prove, USAGE, language="bash")
