"""Write the target encoder: BERT, RoBERTa, GTE or ModernBERT of transformers without its head, for TEI and vLLM."""

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

from megabert.convert.from_hf import read_model
from megabert.convert.gte_files import to_gte_file
from megabert.convert.hf.config import from_their_config, write_native_config
from megabert.convert.hf.native import NAMES, NativeKind, describe_layers, native_kind
from megabert.convert.hf.reader import CONFIG, SAFETENSORS, read_config
from megabert.convert.hf.writer import save_tensors
from megabert.convert.targets import sentence_transformers
from megabert.convert.targets.compared_texts import check_ids
from megabert.convert.targets.target import (
    DiffersError,
    Expected,
    ExportedFolder,
    Proof,
    Target,
    batches,
    largest_difference,
    mean_of_tokens,
)
from megabert.convert.weight_names import TOKEN_TYPES, from_megabert
from megabert.data.shards.manifest import TOKENIZER, TOKENIZER_CONFIG
from megabert.files.json_file import read_json, write_json
from megabert.model.configuration_megabert import MegaBertConfig
from megabert.version import __version__

FOLDER = "encoder"
# What our names of the encoder's parameters begin with; a pooler belongs to a head.
ENCODER = ("bert.embeddings.", "bert.encoder.")
TOLERANCE = 1e-5
# Only transformers 5 reads these; its other settings say the same to the servers.
NEW_NAMES = ("rope_parameters", "layer_types")
# The embeddings of this many texts are compared.
COMPARED_TEXTS = 200
# vLLM stops at a tensor that the encoder does not have or that has a prefix.
PREFIXES: dict[NativeKind, str] = {"bert": "bert.", "roberta": "roberta.", "modernbert": "model.", "gte": "new."}
# vLLM has none of these classes, and TEI no ELECTRA. Their encoders are BERT's, DistilBERT's without token types.
AS_BERT = ("distilbert", "electra")
USAGE = """docker run -p 8080:80 -v "$PWD/this folder":/data ghcr.io/huggingface/text-embeddings-inference:cpu-1.8 \\
    --model-id /data/encoder
vllm serve "this folder/encoder" --runner pooling"""


def check(config: MegaBertConfig, tokenizer: dict[str, Any], max_length: int) -> list[str]:
    if native_kind(config) is None:
        raise ValueError(
            f"--for encoder: the model has {describe_layers(config)}, "
            "which are those of no class of transformers'. Leave encoder out; a MosaicBERT is written for TEI with "
            "--for jina."
        )
    return ["it has the encoder only, for TEI and vLLM, which do not read a folder with another head"]


def write(exported: ExportedFolder, folder: Path) -> str:
    kind, weights = native_kind(exported.config), exported.weights
    assert kind is not None, f"{folder}: no class of transformers computes this model"
    out = folder / FOLDER
    out.mkdir()
    for name in (TOKENIZER, TOKENIZER_CONFIG):
        shutil.copyfile(folder / name, out / name)
    bare = deepcopy(exported.config)
    # The folder may have a head, which the encoder does not.
    bare.architectures = None
    if kind in AS_BERT:
        kind = "bert"
    if kind == "bert" and not bare.token_types:
        # BERT adds a row of them to every token; rows of zeros change no output.
        bare.type_vocab_size = 2
        weights = weights | {TOKEN_TYPES: torch.zeros(2, bare.hidden_size)}
    write_native_config(out, bare, kind)
    settings = read_json(out / CONFIG)
    # vLLM chooses its class by this name.
    settings["architectures"] = [f"{NAMES[kind]}Model"]
    write_json(out / CONFIG, settings)
    encoder = {name: tensor for name, tensor in weights.items() if name.startswith(ENCODER)}
    named = from_megabert(encoder, kind, duplicates=False)
    named = to_gte_file(named) if kind == "gte" else named
    prefix = PREFIXES[kind]
    tensors = {name.removeprefix(prefix): tensor.contiguous() for name, tensor in named.items()}
    save_tensors(tensors, out / SAFETENSORS)
    shutil.copymode(out / CONFIG, out / SAFETENSORS)
    sentence_transformers.write(exported, out)
    return f"megabert {__version__}"


def prove(folder: Path, expected: Expected) -> Proof:
    """Compare embeddings with those of transformers' own class; the servers themselves are not run here."""
    import transformers

    out = folder / FOLDER
    length = int(read_json(folder / TOKENIZER_CONFIG)["model_max_length"])
    check_ids(out, expected, length)
    sentence_transformers.check_server_files(out, length)
    _check_settings(out)
    model, loaded = AutoModel.from_pretrained(out, output_loading_info=True, local_files_only=True)
    wrong = {name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in loaded[kind]}
    # BERT's pooler is trained with next sentences only, which no recipe does, and no embedding uses it.
    if left := sorted(str(name) for name in wrong if not str(name).startswith("pooler.")):
        raise DiffersError(f"transformers finds parameters that are missing or too many, such as {left[0]}")
    model = model.eval()
    what = f"embeddings of {COMPARED_TEXTS} texts"
    pooled = expected.pooled[:COMPARED_TEXTS].copy()
    with torch.no_grad():
        for group, rows, mask in batches(expected.ids[:COMPARED_TEXTS], 0):
            states = model(torch.from_numpy(rows), attention_mask=torch.from_numpy(mask)).last_hidden_state
            pooled[group] = mean_of_tokens(states.numpy(), mask)
    difference = largest_difference(pooled, expected.pooled[:COMPARED_TEXTS], TOLERANCE, what)
    note = "the servers were not run; a test compares the folder with the names and settings that they read"
    return Proof("transformers", transformers.__version__, difference, what, (note,))


def _check_settings(out: Path) -> None:
    """Check the tensors, and the settings that servers read in place of those that transformers 5 does.

    Raises ValueError for what cannot be read, which transformers would answer with errors of many kinds.
    """
    config, raw = read_model(out).config, read_config(out)
    kind: NativeKind | None = next((kind for kind in NAMES if kind == raw["model_type"]), None)
    if kind is None or raw.get("architectures") != [f"{NAMES[kind]}Model"]:
        raise DiffersError(
            f"{CONFIG}: architectures is {raw.get('architectures')!r}, but vLLM needs that of model_type"
        )
    older = {name: value for name, value in raw.items() if name not in NEW_NAMES}
    theirs, ours = (read.to_dict() for read in (from_their_config(out, older, kind), config))
    if wrong := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
        raise DiffersError(
            f"{CONFIG}: without {' and '.join(NEW_NAMES)}, which servers do not read, {wrong[0]} differs"
        )


TARGET = Target("encoder", check, write, prove, USAGE, language="bash")
