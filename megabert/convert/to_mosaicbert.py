"""Write the layout of the published MosaicBERT checkpoints: one pickle of tensors by their names, and a config that names BERT.

The modelling code is not ours to hand on: the config names it where it was published. So no other process can run the folder
here, and the gate is a reading of it: every tensor must come back as it was, bit for bit, and the same architecture.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megabert.convert.from_hf import read
from megabert.convert.hf.reading import CONFIG, LARGEST, PICKLED
from megabert.convert.hf.tokenizer import copy_tokenizer
from megabert.convert.weight_names import to_published
from megabert.convert.zero import read_checkpoint
from megabert.files.atomic import replace_folder, staged_folder
from megabert.files.checkpoint_format import find_checkpoint
from megabert.model.configuration_megabert import MegaBertConfig

# https://huggingface.co/mosaicml/mosaic-bert-base, in the hub's notation for code of another repository.
CODE = "mosaicml/mosaic-bert-base"
AUTO_MAP = {"AutoConfig": "configuration_bert.BertConfig", "AutoModelForMaskedLM": "bert_layers.BertForMaskedLM"}
SAME = (*LARGEST.keys() - {"num_labels"}, "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob",
        "classifier_dropout", "initializer_range", "pad_token_id", "problem_type")  # fmt: skip


class Published(NamedTuple):
    """num_tensors: as written, the tied one twice. initialized: parameters that the source lacks, by our names."""

    num_tensors: int
    initialized: list[str]


class Source(NamedTuple):
    """tokenizer: a folder; max_length: of a text, tokens."""

    weights: dict[str, Tensor]
    config: MegaBertConfig
    tokenizer: Path
    max_length: int
    initialized: list[str]


def publish(source: Path, out: Path, average: int = 1) -> Published:
    """Write a training checkpoint, or a folder of ours, in the published layout. average: of so many checkpoints the mean.

    Raises ValueError if it is not a MosaicBERT, if `out` is not empty, or if what is read back is not what was written, in
    which case nothing is left at `out`.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is not empty; choose another folder.")
    model = _read_source(source, average)
    if (kind := (model.config.position, model.config.ffn)) != ("alibi", "geglu"):
        raise ValueError(
            f"{source}: is {' and '.join(kind)}, and the published layout holds alibi and geglu only. Leave --layout out."
        )
    theirs = {name: tensor.contiguous() for name, tensor in to_published(model.weights, "mosaicbert").items()}
    with staged_folder(out) as folder:
        try:
            torch.save(theirs, folder / PICKLED)
        except RuntimeError as mistake:
            raise OSError(f"{folder / PICKLED}: cannot be written: {mistake}") from mistake
        (folder / CONFIG).write_text(json.dumps(_their_config(model.config), indent=1) + "\n")
        copy_tokenizer(model.tokenizer, folder, model.max_length)
        (folder / "README.md").write_text(f"# MosaicBERT, as it was published\n\nIts code is that of {CODE}.\n")
        _check(folder, model)
        replace_folder(folder, out)
    return Published(len(theirs), model.initialized)


def _read_source(source: Path, average: int) -> Source:
    if (source / CONFIG).is_file():
        if average != 1:
            raise ValueError(f"{source}: is a folder with one model; --average is for a run's checkpoints.")
        model = read(source)
        return Source(model.weights, model.config, source, model.config.max_position_embeddings, model.initialized)
    weights, config, state = read_checkpoint(source, average)
    return Source(weights, config, find_checkpoint(source), state.max_seq_len, [])


def _their_config(config: MegaBertConfig) -> dict:
    settings = {name: getattr(config, name) for name in SAME}
    labels = {"id2label": config.id2label, "label2id": config.label2id}
    code = {auto: f"{CODE}--{place}" for auto, place in AUTO_MAP.items()}
    return {
        "model_type": "bert", "architectures": ["BertForMaskedLM"], "auto_map": code, "hidden_act": "gelu",
        "alibi_starting_size": config.max_position_embeddings, "torch_dtype": "float32",
    } | settings | labels  # fmt: skip


def _check(folder: Path, model: Source) -> None:
    """Raises ValueError unless the folder reads as what was to be written."""
    back = read(folder)
    wrong = sorted(back.weights.keys() ^ model.weights.keys()) or [
        name for name, tensor in model.weights.items() if not torch.equal(back.weights[name], tensor)
    ]
    wrong += [name for name in (*SAME, "id2label") if getattr(back.config, name) != getattr(model.config, name)]
    if wrong or back.initialized or back.left_out:
        raise ValueError(f"{folder}: does not read as what was written: {', '.join([*wrong, *back.initialized][:3])}.")
