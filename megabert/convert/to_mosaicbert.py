"""Export a MosaicBERT in the layout of the published checkpoints: one pickle of tensors, and a BERT config."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megabert.convert.deepspeed_checkpoint import find_checkpoints, read_checkpoints
from megabert.convert.from_hf import read_model
from megabert.convert.hf.config import MOSAICBERT_REPOSITORY, SHARED_SETTINGS, to_mosaicbert_config
from megabert.convert.hf.reader import CONFIG, PYTORCH_BIN
from megabert.convert.hf.tokenizer import copy_tokenizer
from megabert.convert.weight_names import from_megabert
from megabert.files.atomic import replace_folder, staged_folder
from megabert.model.configuration_megabert import MegaBertConfig

README = f"""# MosaicBERT, in the layout of the published checkpoints

Its modelling code is that of {MOSAICBERT_REPOSITORY}.
"""


class MosaicBertExport(NamedTuple):
    """num_tensors: written, counting the tied one twice. initialized: our names of parameters that the source lacks."""

    num_tensors: int
    initialized: list[str]


class SourceModel(NamedTuple):
    """tokenizer: a folder; max_length: of a text, in tokens."""

    weights: dict[str, Tensor]
    config: MegaBertConfig
    tokenizer: Path
    max_length: int
    initialized: list[str]


def export_mosaicbert(source: Path, out: Path, average: int = 1) -> MosaicBertExport:
    """Write a training checkpoint, or a MegaBERT folder, in the published MosaicBERT layout.

    average: number of checkpoints whose mean is exported. Raises ValueError if the model is not a MosaicBERT, if `out`
    is not empty, or if the folder does not read back as it was written, in which case nothing is left at `out`.
    """
    out = out.resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is not empty; choose another folder.")
    model = _read_source(source, average)
    if (architecture := (model.config.position, model.config.ffn)) != ("alibi", "geglu"):
        raise ValueError(
            f"{source}: has {' and '.join(architecture)}, but the published MosaicBERT layout supports only alibi and "
            "geglu. Leave out --layout."
        )
    theirs = {name: tensor.contiguous() for name, tensor in from_megabert(model.weights, "mosaicbert").items()}
    with staged_folder(out) as folder:
        try:
            torch.save(theirs, folder / PYTORCH_BIN)
        except RuntimeError as error:
            raise OSError(f"{folder / PYTORCH_BIN}: cannot be written: {error}") from error
        (folder / CONFIG).write_text(json.dumps(to_mosaicbert_config(model.config), indent=1) + "\n")
        copy_tokenizer(model.tokenizer, folder, model.max_length)
        (folder / "README.md").write_text(README)
        _check_reads_back(folder, model)
        replace_folder(folder, out)
    return MosaicBertExport(len(theirs), model.initialized)


def _read_source(source: Path, average: int) -> SourceModel:
    if (source / CONFIG).is_file():
        if average != 1:
            raise ValueError(f"{source}: is a folder with one model; --average needs a run with several checkpoints.")
        model = read_model(source)
        return SourceModel(model.weights, model.config, source, model.config.max_position_embeddings, model.initialized)
    checkpoints = find_checkpoints(source, average)
    weights, config, state = read_checkpoints(checkpoints)
    return SourceModel(weights, config, checkpoints[0], state.max_seq_len, [])


def _check_reads_back(folder: Path, model: SourceModel) -> None:
    """Raises ValueError unless the folder reads as the model that was written.

    No other process can load the folder as a check, because its modelling code is not ours to redistribute.
    """
    back = read_model(folder)
    wrong = sorted(back.weights.keys() ^ model.weights.keys()) or [
        name for name, tensor in model.weights.items() if not torch.equal(back.weights[name], tensor)
    ]
    settings = (*SHARED_SETTINGS, "problem_type", "id2label")
    wrong += [name for name in settings if getattr(back.config, name) != getattr(model.config, name)]
    wrong += [*back.initialized, *back.unused]
    if wrong:
        raise ValueError(f"{folder}: does not read back as it was written: {', '.join(wrong[:3])}.")
