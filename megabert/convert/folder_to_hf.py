"""Export a MegaBERT folder, with any head, as transformers' own class where one computes the same, and check it."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megabert.convert.check import export_check, export_record
from megabert.convert.check.export_record import Measurements
from megabert.convert.check.folder_record import is_model_file
from megabert.convert.from_hf import read_model
from megabert.convert.hf.config import set_max_length
from megabert.convert.hf.heads import MASKED_LM, class_of, head_of
from megabert.convert.hf.native import native_class
from megabert.convert.hf.reader import CONFIG, read_config
from megabert.convert.hf.resize import ImportedModel
from megabert.convert.hf.tokenizer import copy_tokenizer
from megabert.convert.to_hf import ExportOptions, fingerprint_export, read_finished, write_model
from megabert.convert.weight_names import POOLER, TIED_DECODER
from megabert.data.shards.manifest import TOKENIZER
from megabert.files.atomic import replace_folder, staged_folder
from megabert.model.configuration_megabert import MegaBertConfig

README = """# {name}

Exported by launch/convert_to_hf.py from a MegaBERT folder.

- never trained, initialized by an import: {initialized}
- in the MegaBERT folder but no part of this class: {left_out}
"""


class FolderExport(NamedTuple):
    """name: of the class; initialized: its parameters that an import had initialized.

    left_out: our names of trained parameters that the class does not have.
    """

    measured: Measurements
    name: str
    initialized: list[str]
    left_out: list[str]


def is_model_folder(path: Path) -> bool:
    return (path / CONFIG).is_file()


def export_folder(source: Path, out: Path, options: ExportOptions) -> FolderExport:
    """Export the MegaBERT folder `source`: an import, a fine-tuned model, or what save_pretrained() wrote.

    Raises ValueError if it cannot be exported, or if the check fails, in which case `out` stays as it was.
    """
    _check_source(source, options)
    name, out = str(out), out.resolve()
    files = sorted(path for path in source.iterdir() if is_model_file(path.name))
    fingerprint = fingerprint_export(files, options)
    model = read_model(source)
    config, weights = model.config, select_weights(model)
    left_out = sorted(model.weights.keys() - set(model.initialized) - {POOLER.get(key, key) for key in weights})
    initialized = [key for key in model.initialized if key in weights]
    class_name = native_class(config) or f"MegaBertFor{head_of(config)}"
    if (measured := read_finished(out, fingerprint)) is not None:
        return FolderExport(measured, class_name, initialized, left_out)
    max_length = set_max_length(
        config, config.max_position_embeddings, options.max_length or config.max_position_embeddings
    )
    with staged_folder(out) as folder:
        copy_tokenizer(source, folder, max_length)
        export_check.write_expected_outputs(build_head(weights, config), folder, folder, max_length)
        written = write_model(folder, weights, config, options.max_shard_size)
        parts = {"initialized": initialized, "left_out": left_out}
        lines = {key: ", ".join(f"`{part}`" for part in names) or "none" for key, names in parts.items()}
        (folder / "README.md").write_text(README.format(name=class_name, **lines), encoding="utf-8")
        export_record.write_record(folder, fingerprint, max_length, written, head=head_of(config))
        # The check's process loads the weights again, so they are freed here.
        del model, weights, written
        measured = export_check.check_new_export(folder, name)
        replace_folder(folder, out)
    return FolderExport(measured, class_name, initialized, left_out)


def _check_source(source: Path, options: ExportOptions) -> None:
    if (kind := read_config(source).get("model_type")) != MegaBertConfig.model_type:
        raise ValueError(
            f"{source / CONFIG}: model_type is {kind!r}, expected a MegaBERT folder or a run. Convert it with "
            "launch/convert_from_hf.py first."
        )
    if options.average != 1:
        raise ValueError(f"{source}: is a folder with one model; --average needs a run with several checkpoints.")
    if options.targets:
        raise ValueError(f"{source}: is a folder of a model; --for needs a run or a checkpoint. Leave out --for.")
    if not (source / TOKENIZER).is_file():
        raise ValueError(
            f"{source}: has no {TOKENIZER}, with which an export is checked. launch/convert_from_hf.py --tokenizer "
            "gives a folder the one that it was trained with."
        )


def select_weights(model: ImportedModel) -> dict[str, Tensor]:
    """Return the weights of our class with the folder's head, by its names. Raises ValueError if one is missing."""
    with torch.device("meta"):
        names = [name for name, _ in class_of(model.config)(model.config).named_parameters() if name != TIED_DECODER]
    if missing := [name for name in names if POOLER.get(name, name) not in model.weights]:
        raise ValueError(f"the folder lacks {missing[0]}, which {class_of(model.config).__name__} has.")
    return {name: model.weights[POOLER.get(name, name)] for name in names}


def build_head(weights: dict[str, Tensor], config: MegaBertConfig) -> PreTrainedModel:
    """Build our class with the config's head around weights without copying them."""
    if head_of(config) == MASKED_LM:
        return export_check.build_model(weights, config)
    with torch.device("meta"):
        module = class_of(config)(config)
    module.load_state_dict(weights, assign=True)
    return module.eval().requires_grad_(False)
