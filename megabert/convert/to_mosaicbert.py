"""Export a MosaicBERT in the layout of the published checkpoints: one pickle of tensors, and a BERT config."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from megabert.convert.deepspeed_checkpoint import find_checkpoints, read_checkpoints
from megabert.convert.from_hf import read_model
from megabert.convert.hf.config import (
    MOSAICBERT_HEAD_EPS,
    MOSAICBERT_REPOSITORY,
    SHARED_SETTINGS,
    set_max_length,
    to_mosaicbert_config,
)
from megabert.convert.hf.reader import CONFIG, PYTORCH_BIN
from megabert.convert.hf.tokenizer import copy_tokenizer
from megabert.convert.weight_names import from_megabert
from megabert.files.atomic import replace_folder, staged_folder
from megabert.files.checkpoint_format import files_of
from megabert.files.hashing import file_sha256
from megabert.files.json_file import write_json
from megabert.model.configuration_megabert import MegaBertConfig

README = f"""# MosaicBERT, in the layout of the published checkpoints

Its modelling code is that of {MOSAICBERT_REPOSITORY}.

- not in the original source, and not here: {{missing}}
"""


class MosaicBertExport(NamedTuple):
    """num_tensors: written, counting the tied one twice. missing: our names of parameters that no source had.

    reused: nothing was written, because the folder has every byte of this export.
    """

    num_tensors: int
    missing: list[str]
    reused: bool


class SourceModel(NamedTuple):
    """weights: without those that an import initialized, which are missing. tokenizer: a folder.

    trained_length: longest text in training; max_length: of an export before this, if any.
    """

    weights: dict[str, Tensor]
    config: MegaBertConfig
    tokenizer: Path
    trained_length: int
    max_length: int | None
    missing: list[str]


def export_mosaicbert(source: Path, out: Path, average: int = 1, max_length: int | None = None) -> MosaicBertExport:
    """Write a training checkpoint, or a MegaBERT folder, in the published MosaicBERT layout.

    A masked language modelling head that nothing has trained is left out, as in a folder of a classifier.

    average: number of checkpoints whose mean is exported. max_length: of a text, in tokens; None for the default of
    to_hf.py. Raises ValueError if the published code would not compute the same, if `out` holds anything else, or if
    the folder does not read back as it was written, in which case nothing is left at `out`.
    """
    out = out.resolve()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; choose another folder.")
    model = _read_source(source, average)
    _check_is_mosaicbert(source, model)
    wanted = model.max_length if max_length is None else max_length
    max_length = set_max_length(model.config, model.trained_length, wanted)
    theirs = {name: tensor.contiguous() for name, tensor in from_megabert(model.weights, "mosaicbert").items()}
    with staged_folder(out) as folder:
        try:
            torch.save(theirs, folder / PYTORCH_BIN)
        except RuntimeError as error:
            advice = "If the disk is full, free some space or choose another place."
            raise OSError(f"{out / PYTORCH_BIN}: cannot be written: {error}. {advice}") from error
        settings = to_mosaicbert_config(model.config) | {"architectures": [_find_class(model)]}
        write_json(folder / CONFIG, settings)
        copy_tokenizer(model.tokenizer, folder, max_length)
        (folder / "README.md").write_text(README.format(missing=", ".join(model.missing) or "none"), encoding="utf-8")
        _check_reads_back(folder, model, out)
        reused = out.is_dir() and _hash_files(folder) == _hash_files(out)
        if not reused:
            replace_folder(folder, out, lambda: _check_empty(out))
    return MosaicBertExport(len(theirs), model.missing, reused)


def _check_empty(out: Path) -> None:
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty, and not this export; choose another folder.")


def _check_is_mosaicbert(source: Path, model: SourceModel) -> None:
    """Raise ValueError unless the published code computes what our model computes."""
    config = model.config
    post_norm = MegaBertConfig(vocab_size=config.vocab_size, pad_token_id=config.pad_token_id)
    for name in ("norm_position", "bias", "norm_bias", "global_attention_every", "token_types", "embedding_neighbors"):
        if (value := getattr(config, name)) != (needed := getattr(post_norm, name)):
            raise ValueError(
                f"{source}: has {name} {value}, but the published MosaicBERT layout supports only {needed}. "
                "Leave out --layout."
            )
    if (architecture := (config.position, config.ffn)) != ("alibi", "geglu"):
        raise ValueError(
            f"{source}: has {' and '.join(architecture)}, but the published MosaicBERT layout supports only alibi and "
            "geglu. Leave out --layout."
        )
    if config.layer_norm_eps != MOSAICBERT_HEAD_EPS:
        raise ValueError(
            f"{source}: has layer_norm_eps {config.layer_norm_eps}, but the published MosaicBERT's head always has "
            f"{MOSAICBERT_HEAD_EPS}. Leave out --layout."
        )
    if "classifier.weight" in model.weights and config.classifier_pooling != "cls":
        raise ValueError(
            f"{source}: its classifier pools the {config.classifier_pooling} of all tokens, but the published "
            "MosaicBERT's the first token. Leave out --layout."
        )
    is_choice = config.architectures == ["MegaBertForMultipleChoice"]
    is_of_tokens = "classifier.weight" in model.weights and "bert.pooler.dense.weight" not in model.weights
    if is_choice or is_of_tokens or "qa_outputs.weight" in model.weights:
        kind = "choices" if is_choice else "tokens" if is_of_tokens else "answers"
        raise ValueError(
            f"{source}: has a head for {kind}, but the published MosaicBERT has heads for masked language modelling "
            "and for the classes of documents only. Leave out --layout."
        )


def _find_class(model: SourceModel) -> str:
    """Return the published class whose head the model has; its encoder alone is that of a masked language model."""
    is_classifier = "classifier.weight" in model.weights and model.missing
    return "BertForSequenceClassification" if is_classifier else "BertForMaskedLM"


def _hash_files(folder: Path) -> dict[str, str]:
    return {name: file_sha256(folder / name) for name in files_of(folder)}


def _read_source(source: Path, average: int) -> SourceModel:
    if (source / CONFIG).is_file():
        if average != 1:
            raise ValueError(f"{source}: is a folder with one model; --average needs a run with several checkpoints.")
        model = read_model(source)
        length = model.config.max_position_embeddings
        trained = {name: tensor for name, tensor in model.weights.items() if name not in model.initialized}
        return SourceModel(trained, model.config, source, length, length, model.initialized)
    checkpoints = find_checkpoints(source, average)
    weights, config, state = read_checkpoints(checkpoints)
    return SourceModel(weights, config, checkpoints[0], state.max_seq_len, None, [])


def _check_reads_back(folder: Path, model: SourceModel, out: Path) -> None:
    """Raise ValueError, which names `out`, unless the folder reads as the model that was written.

    No other process can load the folder as a check, because its modelling code is not ours to redistribute.
    """
    back = read_model(folder)
    read = back.weights.keys() - set(back.initialized)
    wrong = sorted(read ^ model.weights.keys()) or [
        name for name, tensor in model.weights.items() if not torch.equal(back.weights[name], tensor)
    ]
    settings = (*SHARED_SETTINGS, "problem_type", "id2label")
    wrong += [name for name in settings if getattr(back.config, name) != getattr(model.config, name)]
    wrong += [*sorted(set(back.initialized) ^ set(model.missing)), *back.unused]
    if wrong:
        raise ValueError(f"{out}: does not read back as it was written: {', '.join(wrong[:3])}.")
